// The loops between the matrix products of a Llama on a CPU, each one pass over its data: norms, gates, turning by angles,
// attention of one query a row, the choice of a token. torch has them as four to twenty operations, each through memory.
//
// T is float or bfloat16; every sum is in float, a result is rounded once. Sixteen numbers at a time; rows are shared out over
// the threads of the OpenMP that torch has loaded, and a row's sum does not depend on how many there are.

#include "cpu_vectors.h"

namespace {

inline Floats sigmoid(Floats x) { return 1.f / (1.f + exp(-x)); }

// total = x + y (y may be missing: then it is x); out = total at unit mean square times the weight.
template <class T>
void norm(const T* x, const T* y, const T* weight, T* total, T* out, float* size, int64_t rows, int64_t width, float eps) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T* from = (y ? total : x) + row * width;
    Floats squares{};
    for (int64_t i = 0; i < width; i += LANES) {
      int64_t at = row * width + i, n = width - i;
      if (y) store(total + at, load(x + at, n) + load(y + at, n), n);
      Floats v = load(from + i, n);  // as it was rounded
      squares += v * v;
    }
    float scale = 1.f / std::sqrt(sum(squares) / width + eps);
    size[row] = scale;
    for (int64_t i = 0; i < width; i += LANES)
      store(out + row * width + i, load(from + i, width - i) * scale * load(weight + i, width - i), width - i);
  }
}

// out = above + the gradient of x, given that of its norm.
template <class T>
void norm_backward(const T* g, const T* x, const T* weight, const float* size, const T* above, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T *g_row = g + row * width, *x_row = x + row * width, *above_row = above + row * width;
    float scale = size[row];
    Floats products{};
    for (int64_t i = 0; i < width; i += LANES)
      products += load(g_row + i, width - i) * load(weight + i, width - i) * load(x_row + i, width - i);
    float common = sum(products) * scale * scale / width;
    for (int64_t i = 0; i < width; i += LANES) {
      Floats inner = load(g_row + i, width - i) * load(weight + i, width - i) - load(x_row + i, width - i) * common;
      store(out + row * width + i, load(above_row + i, width - i) + inner * scale, width - i);
    }
  }
}

// out = silu(gate) * up, of rows (gate, up).
template <class T>
void gated(const T* gate_up, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gate_up + row * 2 * width, *ups = gates + width;
    for (int64_t i = 0; i < width; i += LANES) {
      Floats gate = load(gates + i, width - i);
      store(out + row * width + i, gate * sigmoid(gate) * load(ups + i, width - i), width - i);
    }
  }
}

template <class T>
void gated_backward(const T* g, const T* gate_up, T* out, int64_t rows, int64_t width) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T *gates = gate_up + row * 2 * width, *ups = gates + width;
    T* to = out + row * 2 * width;
    for (int64_t i = 0; i < width; i += LANES) {
      Floats gate = load(gates + i, width - i), up = load(ups + i, width - i), above = load(g + row * width + i, width - i);
      Floats open = sigmoid(gate), active = gate * open;
      store(to + i, above * up * (open + active * (1.f - open)), width - i);
      store(to + width + i, above * active, width - i);
    }
  }
}

// y[row] += x[row] a for four rows and V times sixteen columns (fewer, where there are fewer); rows of x, a and y lie so far apart.
template <int V, class T, class Y>
void multiply_some(const float* x, int64_t x_apart, const T* a, int64_t a_apart, Y* y, int64_t y_apart, int64_t rows, int64_t width,
                   int64_t columns) {
  Floats found[4][V] = {};
  for (int64_t d = 0; d < width; d++) {
    Floats column[V];
    for (int v = 0; v < V; v++) column[v] = V > 1 ? load(a + d * a_apart + v * LANES) : load(a + d * a_apart, columns);
    for (int row = 0; row < 4; row++)
      for (int v = 0; v < V; v++) found[row][v] += x[row * x_apart + d] * column[v];
  }
  for (int64_t row = 0; row < rows; row++)
    for (int v = 0; v < V; v++) {
      Y* to = y + row * y_apart + v * LANES;
      int64_t n = V > 1 ? LANES : columns;
      store(to, load(to, n) + found[row][v], n);
    }
}

template <class T, class Y>
void multiply(const float* x, int64_t x_apart, const T* a, Y* y, int64_t y_apart, int64_t rows, int64_t width, int64_t columns) {
  int64_t j = 0;
  for (; columns - j >= 4 * LANES; j += 4 * LANES) multiply_some<4>(x, x_apart, a + j, columns, y + j, y_apart, rows, width, 4 * LANES);
  for (; columns - j >= 2 * LANES; j += 2 * LANES) multiply_some<2>(x, x_apart, a + j, columns, y + j, y_apart, rows, width, 2 * LANES);
  for (; j < columns; j += LANES)
    multiply_some<1>(x, x_apart, a + j, columns, y + j, y_apart, rows, width, columns - j < LANES ? columns - j : LANES);
}

// y += (x a) b: the low-rank adapters of a few rows, of several layers side by side; a [width, rank] of all of them, b one [ranks[i],
// columns[i]] after the other.
template <class T>
void adapt(const T* x, const T* a, const T* b, T* y, int64_t rows, int64_t width, int64_t rank, int64_t all_columns, int64_t parts,
           const int64_t* ranks, const int64_t* columns) {
#pragma omp parallel
  {
    std::vector<float> read(4 * width), small(4 * rank);
#pragma omp for
    for (int64_t row = 0; row < rows; row += 4) {
      int64_t here = rows - row < 4 ? rows - row : 4, numbers = here * width;
      for (int64_t i = 0; i < numbers; i += LANES) store(read.data() + i, load(x + row * width + i, numbers - i), numbers - i);
      std::fill(small.begin(), small.end(), 0.f);
      multiply(read.data(), width, a, small.data(), rank, here, width, rank);
      const float* from = small.data();
      const T* with = b;
      T* to = y + row * all_columns;
      for (int64_t i = 0; i < parts; i++) {
        multiply(from, rank, with, to, all_columns, here, ranks[i], columns[i]);
        from += ranks[i], with += ranks[i] * columns[i], to += columns[i];
      }
    }
  }
}

// Turn the first `heads` heads of every row by the angles of its position, in place; back with `sign` -1.
template <class T>
void turn(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t width, int64_t stride, float sign) {
  int64_t half = width / 2;
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    const T *c = cos + row * width, *s = sin + row * width;
    for (int64_t head = 0; head < heads; head++) {
      T *first = x + row * stride + head * width, *second = first + half;
      for (int64_t i = 0; i < half; i += LANES) {
        int64_t n = half - i;
        Floats a = load(first + i, n), b = load(second + i, n);
        Floats sin_a = load(s + i, n), sin_b = load(s + half + i, n);
        Floats from_b = b * (sign > 0 ? sin_a : sin_b), from_a = a * (sign > 0 ? sin_b : sin_a);
        store(first + i, a * load(c + i, n) - from_b * sign, n);
        store(second + i, b * load(c + half + i, n) + from_a * sign, n);
      }
    }
  }
}

// Where a key or value of the t-th token lies: keys in tiles of sixteen tokens, [tiles, width, 16], values as they come.
inline int64_t in_tile(int64_t t, int64_t d, int64_t width) { return (t / LANES * width + d) * LANES + t % LANES; }

// scores[g][t] = queries[g] . key[t], of the tokens of some tiles.
template <int G, class T>
void score(const float* queries, const T* keys, float* scores, int64_t tiles, int64_t width, int64_t room) {
  for (int64_t tile = 0; tile < tiles; tile++, keys += width * LANES) {
    Floats even[G] = {}, odd[G] = {};
    int64_t d = 0;
    for (; d + 1 < width; d += 2) {
      Floats key = load(keys + d * LANES), next = load(keys + (d + 1) * LANES);
      for (int g = 0; g < G; g++) {
        even[g] += queries[g * width + d] * key;
        odd[g] += queries[g * width + d + 1] * next;
      }
    }
    if (d < width)
      for (int g = 0; g < G; g++) even[g] += queries[g * width + d] * load(keys + d * LANES);
    for (int g = 0; g < G; g++) store(scores + g * room + tile * LANES, even[g] + odd[g]);
  }
}

// out[g] += sum_t weights[g][t] value[t], W times sixteen numbers wide.
template <int G, int W, class T>
void gather(const float* weights, const T* values, float* out, int64_t tokens, int64_t width, int64_t room, int64_t wide) {
  Floats found[G][W];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < W; i++) found[g][i] = load(out + g * width + i * LANES, wide - i * LANES);
  for (int64_t t = 0; t < tokens; t++)
    for (int i = 0; i < W; i++) {
      Floats value = load(values + t * width + i * LANES, wide - i * LANES);
      for (int g = 0; g < G; g++) found[g][i] += weights[g * room + t] * value;
    }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < W; i++) store(out + g * width + i * LANES, found[g][i], wide - i * LANES);
}

template <int G, class T>
void gather(const float* weights, const T* values, float* out, int64_t tokens, int64_t width, int64_t room) {
  int64_t i = 0;
  for (; i + 4 * LANES <= width; i += 4 * LANES) gather<G, 4>(weights, values + i, out + i, tokens, width, room, 4 * LANES);
  for (; i < width; i += LANES) gather<G, 1>(weights, values + i, out + i, tokens, width, room, width - i < LANES ? width - i : LANES);
}

// The largest of scale x over the first n, and of `top`.
inline float top_of(const float* x, int64_t n, float scale, float top) {
  Floats most = all(top);
  for (int64_t i = 0; i < n; i += LANES) most = larger(first(load(x + i, n - i) * scale, n - i < LANES ? n - i : LANES, NONE), most);
  return largest(most);
}

// x = exp(scale x - level) of the first n, 0 of the others; they are added to `total`.
inline void weigh(float* x, int64_t n, int64_t columns, float scale, float level, Floats& total) {
  for (int64_t i = 0; i < columns; i += LANES) {
    int64_t seen = n - i < 0 ? 0 : n - i < LANES ? n - i : LANES;
    Floats weight = seen ? first(exp(load(x + i, columns - i) * scale - level), seen, 0.f) : all(0.f);
    total += weight;
    store(x + i, weight, columns - i);
  }
}

// One query a row: G heads that share keys, over a prompt's tokens and the row's own.
template <int G, class T>
void attend(const T* query, const T* prompt_key, const T* prompt_value, int64_t length, const T* key,
            const T* value, int64_t own, int64_t width, float scale, T* out, std::vector<float>& work) {
  int64_t tiles = (length + LANES - 1) / LANES, own_tiles = (own + LANES - 1) / LANES, room = (tiles + own_tiles) * LANES;
  work.resize(G * (room + 2 * width));
  float *scores = work.data(), *queries = scores + G * room, *found = queries + G * width;
  for (int g = 0; g < G; g++)
    for (int64_t d = 0; d < width; d += LANES)
      store(queries + g * width + d, load(query + g * width + d, width - d) * scale, width - d);
  score<G>(queries, prompt_key, scores, tiles, width, room);
  score<G>(queries, key, scores + tiles * LANES, own_tiles, width, room);
  float totals[G];
  for (int g = 0; g < G; g++) {
    float *shared = scores + g * room, *mine = shared + tiles * LANES;
    float top = top_of(mine, own, 1, top_of(shared, length, 1, NONE));
    Floats total{};
    weigh(shared, length, tiles * LANES, 1, top, total);
    weigh(mine, own, own_tiles * LANES, 1, top, total);
    totals[g] = sum(total);
  }
  memset(found, 0, G * width * sizeof(float));
  gather<G>(scores, prompt_value, found, length, width, room);
  gather<G>(scores + tiles * LANES, value, found, own, width, room);
  for (int g = 0; g < G; g++)
    for (int64_t d = 0; d < width; d += LANES)
      store(out + g * width + d, load(found + g * width + d, width - d) / totals[g], width - d);
}

struct Sizes {
  int64_t rows, queries, kv, width, longest, own, own_tiles;
};

// Write down key and value of each row's new token, and read what its query finds.
//
// heads [rows, queries + 2 kv, width]: query, key, value; prompt_key [prompts, kv, tiles, width, 16], prompt_value [prompts, kv,
// longest, width], a prompt has `length` tokens; key [slots, kv, own_tiles, width, 16], value [slots, kv, own_tiles * 16, width], a
// row's at its slot; out [rows, queries, width]. `own` counts the new token.
template <class T>
void attend_token(const T* heads, const T* prompt_key, const T* prompt_value, const int64_t* length, const int64_t* prompt,
                  const int64_t* slot, T* key, T* value, T* out, const Sizes& n, float scale) {
  int64_t groups = n.queries / n.kv, tiles = (n.longest + LANES - 1) / LANES, last = n.own - 1;
#pragma omp parallel
  {
    std::vector<float> work;
#pragma omp for collapse(2)
    for (int64_t row = 0; row < n.rows; row++)
      for (int64_t head = 0; head < n.kv; head++) {
        int64_t at = slot[row] * n.kv + head, from = prompt[row] * n.kv + head;
        T *keys = key + at * n.own_tiles * n.width * LANES, *values = value + at * n.own_tiles * LANES * n.width;
        const T *query = heads + row * (n.queries + 2 * n.kv) * n.width, *said = query + (n.queries + head) * n.width;
        for (int64_t d = 0; d < n.width; d++) keys[in_tile(last, d, n.width)] = said[d];
        memcpy(values + last * n.width, said + n.kv * n.width, n.width * sizeof(T));
        const T *read = prompt_key + from * tiles * n.width * LANES, *told = prompt_value + from * n.longest * n.width;
        auto attend_some = [&](auto some, int64_t one) {
          int64_t place = (head * groups + one) * n.width;
          attend<decltype(some)::value>(query + place, read, told, length[prompt[row]], keys, values, n.own, n.width, scale,
                                        out + row * n.queries * n.width + place, work);
        };
        int64_t one = 0;
        for (; one + 4 <= groups; one += 4) attend_some(std::integral_constant<int, 4>(), one);
        if (groups - one == 3) attend_some(std::integral_constant<int, 3>(), one);
        if (groups - one == 2) attend_some(std::integral_constant<int, 2>(), one);
        if (groups - one == 1) attend_some(std::integral_constant<int, 1>(), one);
      }
  }
}

constexpr int64_t BLOCK = 256;

// One token a row by the inverse of the cumulated distribution, and its log-probability; see `samplers.ancestral.draw_tokens`.
template <class T>
void choose(const T* logits, const double* uniform, int64_t* token, double* log_prob, int64_t rows, int64_t vocabulary) {
#pragma omp parallel
  {
    std::vector<double> blocks((vocabulary + BLOCK - 1) / BLOCK);
#pragma omp for
    for (int64_t row = 0; row < rows; row++) {
      const T* mine = logits + row * vocabulary;
      Floats most = all(NONE);
      for (int64_t i = 0; i < vocabulary; i += LANES) most = larger(load(mine + i, vocabulary - i, NONE), most);
      float top = largest(most);
      double total = 0;
      for (size_t b = 0; b < blocks.size(); b++) {
        int64_t start = b * BLOCK, stop = start + BLOCK < vocabulary ? start + BLOCK : vocabulary;
        Floats mass{};
        for (int64_t i = start; i < stop; i += LANES) mass += exp(load(mine + i, stop - i, NONE) - top);
        blocks[b] = total += sum(mass);
      }
      double goal = uniform[row] * total;
      size_t b = 0;
      while (b + 1 < blocks.size() && !(blocks[b] > goal)) b++;
      double reached = b ? blocks[b - 1] : 0;
      int64_t found = -1, seen = -1;  // rounding may pass the last token that has any mass: then it is that one
      for (int64_t i = b * BLOCK; i < (int64_t)(b + 1) * BLOCK && i < vocabulary && found < 0; i += LANES) {
        Floats mass = exp(load(mine + i, vocabulary - i, NONE) - top);
        for (int64_t j = 0; j < LANES && found < 0; j++) {
          if (!(mass[j] > 0)) continue;
          seen = i + j;
          if ((reached += mass[j]) > goal) found = seen;
        }
      }
      if (found < 0) found = seen;
      for (int64_t i = 0; found < 0; i++)  // a block without mass, or NaN
        if (load(mine + i, 1)[0] == top || i + 1 == vocabulary) found = i;
      token[row] = found;
      log_prob[row] = (double)(load(mine + found, 1)[0] - top) - std::log(total);
    }
  }
}

// One block of the vocabulary further in log softmax(logits)[token] of every row: what `logprob._onward` says.
//
// logits [rows, columns] become mass, exp(logits - largest), if `kept`; largest, total, chosen [rows] go on; factor [rows].
template <class T>
void absorb(T* logits, const int64_t* tokens, float* largest_so_far, float* total, float* chosen, float* factor, int64_t rows,
            int64_t columns, int64_t seen, int64_t kept) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++) {
    T* mine = logits + row * columns;
    Floats most = all(largest_so_far[row]);
    for (int64_t i = 0; i < columns; i += LANES) most = larger(load(mine + i, columns - i, NONE), most);
    float top = largest(most), shrunk = largest_so_far[row] - top;
    int64_t own = tokens[row] - seen;
    chosen[row] = own >= 0 && own < columns ? load(mine + own, 1)[0] - top : chosen[row] + shrunk;
    Floats found{};
    for (int64_t i = 0; i < columns; i += LANES) {
      Floats mass = exp(load(mine + i, columns - i, NONE) - top);
      if (kept) store(mine + i, mass, columns - i);
      found += mass;
    }
    factor[row] = std::exp(shrunk);
    total[row] = total[row] * factor[row] + sum(found);
    largest_so_far[row] = top;
  }
}

// Where the rows of scores stand: prompts x per_prompt rows, each group of `groups` rows one of `steps` steps after the `start`-th.
struct Window {
  int64_t rows, columns, groups, steps, start, per_prompt, longest;
  const int64_t* lengths;

  int64_t own(int64_t row) const { return start + row / groups % steps + 1; }
  int64_t prompt(int64_t row) const { return lengths[row / per_prompt]; }
};

inline void divide(float* x, int64_t n, float by) {
  for (int64_t i = 0; i < n; i += LANES) store(x + i, load(x + i, n - i) * (1.f / by), n - i);
}

// Scores over a row's own tokens [rows, columns] and over its prompt's [rows, longest] (may be missing) become one softmax in place.
void soften(float* own, float* before, float* log_sum, const Window& w, float scale) {
#pragma omp parallel for
  for (int64_t row = 0; row < w.rows; row++) {
    float *mine = own + row * w.columns, *shared = before ? before + row * w.longest : nullptr;
    int64_t n = w.own(row), m = before ? w.prompt(row) : 0;
    float top = top_of(mine, n, scale, before ? top_of(shared, m, scale, NONE) : NONE);
    Floats of_own{}, of_prompt{};
    weigh(mine, n, w.columns, scale, top, of_own);
    if (before) weigh(shared, m, w.longest, scale, top, of_prompt);
    float total = sum(of_own) + sum(of_prompt);
    divide(mine, n, total);
    if (before) divide(shared, m, total);
    log_sum[row] = std::log(total) + top;
  }
}

// The same weights once more, from the log of their sum: of own tokens, or of the prompt's.
void reweigh(float* scores, const float* log_sum, const Window& w, int64_t of_prompt, float scale) {
#pragma omp parallel for
  for (int64_t row = 0; row < w.rows; row++) {
    int64_t columns = of_prompt ? w.longest : w.columns;
    Floats total{};
    weigh(scores + row * columns, of_prompt ? w.prompt(row) : w.own(row), columns, scale, log_sum[row], total);
  }
}

// The gradient of scores: g = weights (g - common) scale.
void soften_backward(float* g, const float* weights, const float* common, int64_t rows, int64_t columns, float scale) {
#pragma omp parallel for
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < columns; i += LANES) {
      int64_t at = row * columns + i, n = columns - i;
      store(g + at, (load(g + at, n) - common[row]) * load(weights + at, n) * scale, n);
    }
}

}  // namespace

extern "C" void soften_float32(float* own, float* before, float* log_sum, int64_t rows, int64_t columns, int64_t groups, int64_t steps,
                               int64_t start, int64_t per_prompt, int64_t longest, const int64_t* lengths, float scale) {
  soften(own, before, log_sum, {rows, columns, groups, steps, start, per_prompt, longest, lengths}, scale);
}

extern "C" void reweigh_float32(float* scores, const float* log_sum, int64_t rows, int64_t columns, int64_t groups, int64_t steps,
                                int64_t start, int64_t per_prompt, int64_t longest, const int64_t* lengths, int64_t of_prompt,
                                float scale) {
  reweigh(scores, log_sum, {rows, columns, groups, steps, start, per_prompt, longest, lengths}, of_prompt, scale);
}

extern "C" void soften_backward_float32(float* g, const float* weights, const float* common, int64_t rows, int64_t columns, float scale) {
  soften_backward(g, weights, common, rows, columns, scale);
}

#define EXPORT(T, NAME)                                                                                                         \
  extern "C" void norm_##NAME(const T* x, const T* y, const T* weight, T* total, T* out, float* size, int64_t rows,             \
                              int64_t width, float eps) {                                                                       \
    norm(x, y, weight, total, out, size, rows, width, eps);                                                                     \
  }                                                                                                                             \
  extern "C" void norm_backward_##NAME(const T* g, const T* x, const T* weight, const float* size, const T* above, T* out,      \
                                       int64_t rows, int64_t width) {                                                           \
    norm_backward(g, x, weight, size, above, out, rows, width);                                                                 \
  }                                                                                                                             \
  extern "C" void gated_##NAME(const T* gate_up, T* out, int64_t rows, int64_t width) {                                         \
    gated(gate_up, out, rows, width);                                                                                           \
  }                                                                                                                             \
  extern "C" void gated_backward_##NAME(const T* g, const T* gate_up, T* out, int64_t rows, int64_t width) {                    \
    gated_backward(g, gate_up, out, rows, width);                                                                               \
  }                                                                                                                             \
  extern "C" void adapt_##NAME(const T* x, const T* a, const T* b, T* y, int64_t rows, int64_t width, int64_t rank,             \
                               int64_t all_columns, int64_t parts, const int64_t* ranks, const int64_t* columns) {              \
    adapt(x, a, b, y, rows, width, rank, all_columns, parts, ranks, columns);                                                   \
  }                                                                                                                             \
  extern "C" void turn_##NAME(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t width, int64_t stride,     \
                              float sign) {                                                                                     \
    turn(x, cos, sin, rows, heads, width, stride, sign);                                                                        \
  }                                                                                                                             \
  extern "C" void attend_token_##NAME(const T* heads, const T* prompt_key, const T* prompt_value, const int64_t* length,        \
                                      const int64_t* prompt, const int64_t* slot, T* key, T* value, T* out, int64_t rows,       \
                                      int64_t queries, int64_t kv, int64_t width, int64_t longest, int64_t own, int64_t own_tiles, \
                                      float scale) {                                                                            \
    Sizes sizes{rows, queries, kv, width, longest, own, own_tiles};                                                             \
    attend_token(heads, prompt_key, prompt_value, length, prompt, slot, key, value, out, sizes, scale);                         \
  }                                                                                                                             \
  extern "C" void choose_##NAME(const T* logits, const double* uniform, int64_t* token, double* log_prob, int64_t rows,         \
                                int64_t vocabulary) {                                                                           \
    choose(logits, uniform, token, log_prob, rows, vocabulary);                                                                 \
  }                                                                                                                             \
  extern "C" void absorb_##NAME(T* logits, const int64_t* tokens, float* largest, float* total, float* chosen, float* factor,   \
                                int64_t rows, int64_t columns, int64_t seen, int64_t kept) {                                    \
    absorb(logits, tokens, largest, total, chosen, factor, rows, columns, seen, kept);                                          \
  }

EXPORT(float, float32)
EXPORT(bfloat16, bfloat16)
