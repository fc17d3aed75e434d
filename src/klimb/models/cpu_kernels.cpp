// The loops between the matrix products of a Llama on a CPU, each one pass over its data: norms, gates, turning by angles,
// attention of one query a row, the choice of a token. torch has them as four to twenty operations, each through memory.
//
// T is float or bfloat16; every sum is in float, a result is rounded once. Sixteen numbers at a time; rows are shared out over
// the threads of the OpenMP that torch has loaded, and a row's sum does not depend on how many there are.

#include "cpu_attend_token.h"
#include "cpu_between.h"

namespace {

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
    _Pragma("omp parallel") norm(x, y, weight, total, out, size, rows, width, eps);                                             \
  }                                                                                                                             \
  extern "C" void norm_backward_##NAME(const T* g, const T* x, const T* weight, const float* size, const T* above, T* out,      \
                                       int64_t rows, int64_t width) {                                                           \
    _Pragma("omp parallel") norm_backward(g, x, weight, size, above, out, rows, width);                                         \
  }                                                                                                                             \
  extern "C" void gated_##NAME(const T* gate_up, T* out, int64_t rows, int64_t width) {                                         \
    _Pragma("omp parallel") gated(gate_up, out, rows, width);                                                                   \
  }                                                                                                                             \
  extern "C" void gated_backward_##NAME(const T* g, const T* gate_up, T* out, int64_t rows, int64_t width) {                    \
    _Pragma("omp parallel") gated_backward(g, gate_up, out, rows, width);                                                       \
  }                                                                                                                             \
  extern "C" void adapt_##NAME(const T* x, const T* a, const T* b, T* y, int64_t rows, int64_t width, int64_t rank,             \
                               int64_t all_columns, int64_t parts, const int64_t* ranks, const int64_t* columns) {              \
    adapt(x, a, b, y, rows, width, rank, all_columns, parts, ranks, columns);                                                   \
  }                                                                                                                             \
  extern "C" void turn_##NAME(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t width, int64_t stride,     \
                              float sign) {                                                                                     \
    _Pragma("omp parallel") turn(x, cos, sin, rows, heads, width, stride, sign);                                                \
  }                                                                                                                             \
  extern "C" void attend_token_##NAME(const T* heads, const T* prompt_key, const T* prompt_value, const int64_t* length,        \
                                      const int64_t* prompt, const int64_t* slot, T* key, T* value, T* out, int64_t rows,       \
                                      int64_t queries, int64_t kv, int64_t width, int64_t longest, int64_t own, int64_t own_tiles, \
                                      float scale) {                                                                            \
    Sizes sizes{rows, queries, kv, width, longest, own, own_tiles};                                                             \
    _Pragma("omp parallel") attend_token(heads, prompt_key, prompt_value, length, prompt, slot, key, value, out, sizes, scale); \
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
