// Attention of packed bfloat16 tokens on a CPU, forward and backward: completions over the prompt they share and over themselves.
//
// A unit is one sequence of queries (a prompt, or a completion) of one head of keys. Scores are formed transposed, tokens down and
// queries across, so that a softmax runs along the lanes and what comes out of one product lies as the next one wants it. Products are
// of bfloat16, summed in float (`cpu_tiles.h`). Weights are rounded to bfloat16 before they are multiplied; their sum is not.

#include "cpu_tiles.h"

namespace {

constexpr int64_t PANEL = 128;   // tokens that are gone back through together
constexpr int64_t ASKING = 512;  // queries, likewise

// Numbers [n, width] of one head, in memory `apart` a token and `between` a query of the same token (`groups` of them).
struct Rows {
  const bfloat16* first;
  int64_t apart, between, groups, n, width;

  const bfloat16* row(int64_t i) const { return first + i / groups * apart + i % groups * between; }
};

// As rows [up_to(n, 32)][wide], zeros beyond.
void lay_rows(const Rows& x, bfloat16* to, int64_t wide) {
  int64_t whole = up_to(x.n, BLOCK);
  for (int64_t i = 0; i < whole; i++) {
    int64_t has = i < x.n ? x.width : 0;
    if (has) memcpy(to + i * wide, x.row(i), has * sizeof(bfloat16));
    memset(to + i * wide + has, 0, (wide - has) * sizeof(bfloat16));
  }
}

// Rows [n][wide] -> pairs of rows [n / 2][wide].
void lay_pairs(const bfloat16* rows, uint32_t* to, int64_t n, int64_t wide) {
  for (int64_t i = 0; i < n; i += 2)
    for (int64_t j = 0; j < wide; j += LANES) {
      Halves even, odd;
      memcpy(&even, rows + i * wide + j, sizeof even);
      memcpy(&odd, rows + (i + 1) * wide + j, sizeof odd);
      put(to + i / 2 * wide + j, widened(even) | widened(odd) << 16);
    }
}

// ---- what a call is about

struct Tokens {  // of packed tokens: prompts first, then their completions
  int64_t prompts, completions, heads, kv, width, query_apart, key_apart, value_apart;
  const int64_t *start, *length;  // [prompts + prompts x completions]
  float scale;

  int64_t groups() const { return heads / kv; }
  int64_t wide() const { return up_to(width, BLOCK); }
  int64_t sequence(int64_t prompt, int64_t row) const { return row < 0 ? prompt : prompts + prompt * completions + row; }

  Rows queries(const bfloat16* x, int64_t apart, int64_t s, int64_t k) const {
    return {x + start[s] * apart + k * groups() * width, apart, width, groups(), length[s] * groups(), width};
  }
  Rows keys(const bfloat16* x, int64_t apart, int64_t s, int64_t k) const {
    return {x + start[s] * apart + k * width, apart, 0, 1, length[s], width};
  }
};

// Keys or values of a sequence: its rows, and on demand its columns.
struct Side {
  Room rows_held, pairs_held, columns_held;
  bfloat16* rows;
  uint32_t* columns;  // [wide][n / 2]
  int64_t n;

  void lay(const Rows& x, int64_t wide, bool turned) {
    n = up_to(x.n, BLOCK);
    rows = rows_held.of<bfloat16>(n * wide);
    lay_rows(x, rows, wide);
    if (!turned) return;
    uint32_t* pairs = pairs_held.of<uint32_t>(n / 2 * wide);
    lay_pairs(rows, pairs, n, wide);
    columns = columns_held.of<uint32_t>(wide * n / 2);
    transpose(pairs, wide, columns, n / 2, n / 2, wide);
  }
};

// Queries, or what comes back to them: pairs across the width [wide / 2][n], and pairs of queries [n / 2][wide].
struct Asked {
  Room rows_held, across_held, pairs_held;
  uint32_t *across, *pairs;
  int64_t n;

  void lay(const Rows& x, int64_t wide, bool both) {
    n = up_to(x.n, BLOCK);
    bfloat16* rows = rows_held.of<bfloat16>(n * wide);
    lay_rows(x, rows, wide);
    across = across_held.of<uint32_t>(wide / 2 * n);
    transpose(dwords(rows), wide / 2, across, n, n, wide / 2);
    if (!both) return;
    pairs = pairs_held.of<uint32_t>(n / 2 * wide);
    lay_pairs(rows, pairs, n, wide);
  }
};

// Columns of float [wide][n] -> rows of bfloat16 in memory, each times a number of its own (or none).
void write_rows(float* columns, int64_t apart, int64_t from, int64_t n, bfloat16* first, int64_t row_apart, int64_t between,
                int64_t groups, int64_t width, int64_t wide, float* turned) {
  transpose(reinterpret_cast<const uint32_t*>(columns), apart, reinterpret_cast<uint32_t*>(turned), wide, wide, up_to(n, 16));
  for (int64_t i = 0; i < n; i++) {
    bfloat16* to = first + (from + i) / groups * row_apart + (from + i) % groups * between;
    for (int64_t j = 0; j < width; j += LANES) store(to + j, load(turned + i * wide + j), width - j);
  }
}

// The last step, plus one, that each of 16 queries sees.
inline Ints seen_by(int64_t query, int64_t groups) {
  Ints x;
  for (int i = 0; i < LANES; i++) x[i] = (int32_t)((query + i) / groups + 1);
  return x;
}

// ---- forward

struct Forward {
  Side prompt_key, prompt_value, key, value;
  Asked query;
  Room scores_held, weights_held, out_held, turned_held;
};

// Scores [n][32] of tokens become weights as pairs [n / 2][32]; tokens from `has` on weigh nothing.
inline void exponentiate(const float* scores, uint32_t* weights, int64_t n, int64_t has, float scale, const Floats* top, Floats* total) {
  for (int64_t t = 0; t < n; t += 2)
    for (int h = 0; h < 2; h++) {
      Floats even{}, odd{};
      if (t < has) even = exp(load(scores + t * BLOCK + h * LANES) * scale - top[h]);
      if (t + 1 < has) odd = exp(load(scores + (t + 1) * BLOCK + h * LANES) * scale - top[h]);
      total[h] += even + odd;
      put(weights + t / 2 * BLOCK + h * LANES, paired(even, odd));
    }
}

void forward(Forward& f, const Tokens& x, const bfloat16* query, const bfloat16* key, const bfloat16* value, bfloat16* out, float* log_sum,
             int64_t prompt, int64_t row, int64_t k) {
  int64_t s = x.sequence(prompt, row), wide = x.wide(), groups = x.groups(), before = row < 0 ? 0 : x.length[prompt];
  if (x.length[s] == 0) return;
  Rows asked = x.queries(query, x.query_apart, s, k);
  f.query.lay(asked, wide, false);
  f.key.lay(x.keys(key, x.key_apart, s, k), wide, false);
  f.value.lay(x.keys(value, x.value_apart, s, k), wide, true);
  if (before) {
    f.prompt_key.lay(x.keys(key, x.key_apart, prompt, k), wide, false);
    f.prompt_value.lay(x.keys(value, x.value_apart, prompt, k), wide, true);
  }
  int64_t of_prompt = up_to(before, BLOCK), most = of_prompt + f.key.n;
  float* scores = f.scores_held.of<float>(most * BLOCK);
  uint32_t* weights = f.weights_held.of<uint32_t>(most / 2 * BLOCK);
  float *found = f.out_held.of<float>(wide * BLOCK), *turned = f.turned_held.of<float>(wide * BLOCK);
  for (int64_t q = 0; q < asked.n; q += BLOCK) {
    int64_t here = std::min(BLOCK, asked.n - q), sees = (q + here - 1) / groups + 1, own = up_to(sees, BLOCK);
    const uint32_t* across = f.query.across + q;
    float* own_scores = scores + of_prompt * BLOCK;
    if (before) multiply(scores, BLOCK, dwords(f.prompt_key.rows), wide / 2, across, f.query.n, of_prompt, BLOCK, wide / 2, false);
    multiply(own_scores, BLOCK, dwords(f.key.rows), wide / 2, across, f.query.n, own, BLOCK, wide / 2, false);
    Ints until[2] = {seen_by(q, groups), seen_by(q + LANES, groups)};
    Floats top[2] = {all(NONE), all(NONE)}, total[2] = {};
    for (int64_t t = 0; t < before; t++)
      for (int h = 0; h < 2; h++) top[h] = larger(load(scores + t * BLOCK + h * LANES), top[h]);
    for (int64_t t = 0; t < sees; t++)
      for (int h = 0; h < 2; h++) {
        float* at = own_scores + t * BLOCK + h * LANES;
        if (t > q / groups) store(at, (int32_t)t < until[h] ? load(at) : all(NONE));
        top[h] = larger(load(at), top[h]);
      }
    for (int h = 0; h < 2; h++) top[h] *= x.scale;
    exponentiate(scores, weights, of_prompt, before, x.scale, top, total);
    exponentiate(own_scores, weights + of_prompt / 2 * BLOCK, own, sees, x.scale, top, total);
    if (before) multiply(found, BLOCK, f.prompt_value.columns, of_prompt / 2, weights, BLOCK, wide, BLOCK, of_prompt / 2, false);
    multiply(found, BLOCK, f.value.columns, f.value.n / 2, weights + of_prompt / 2 * BLOCK, BLOCK, wide, BLOCK, own / 2, before > 0);
    for (int64_t j = 0; j < wide; j++)
      for (int h = 0; h < 2; h++) store(found + j * BLOCK + h * LANES, load(found + j * BLOCK + h * LANES) / total[h]);
    bfloat16* first = out + x.start[s] * x.heads * x.width + k * groups * x.width;
    write_rows(found, BLOCK, q, here, first, x.heads * x.width, x.width, groups, x.width, wide, turned);
    for (int64_t i = 0; i < here; i++)
      log_sum[(x.start[s] + (q + i) / groups) * x.heads + k * groups + (q + i) % groups] =
          top[i / LANES][i % LANES] + std::log(total[i / LANES][i % LANES]);
  }
}

// ---- backward

struct Backward {
  Side prompt_key, prompt_value, key, value;
  Asked query, up;
  Room log_sum_held, common_held, scores_held, inner_held, weights_held, inner_rows_held, inner_pairs_held, to_query_held, to_key_held,
      to_value_held, turned_held;
};

// One source of keys of a unit's queries: their gradients, and the queries' own [wide][n] summed up.
// to_key, to_value: float [up_to(tokens, 32)][wide], added to.
void go_back(Backward& b, const Tokens& x, const Side& key, const Side& value, int64_t tokens, bool own, float* to_query, float* to_key,
             float* to_value) {
  int64_t wide = x.wide(), groups = x.groups(), queries = b.query.n;
  float *scores = b.scores_held.of<float>(BLOCK * BLOCK), *inner = b.inner_held.of<float>(BLOCK * BLOCK);
  bfloat16 *weights = b.weights_held.of<bfloat16>(PANEL * ASKING), *inner_rows = b.inner_rows_held.of<bfloat16>(PANEL * ASKING);
  uint32_t* inner_pairs = b.inner_pairs_held.of<uint32_t>(PANEL / 2 * ASKING);
  const float *log_sum = b.log_sum_held.of<float>(queries), *common = b.common_held.of<float>(queries);
  for (int64_t t0 = 0; t0 < tokens; t0 += PANEL) {
    int64_t deep = std::min(PANEL, key.n - t0);
    for (int64_t q0 = own ? t0 * groups / BLOCK * BLOCK : 0; q0 < queries; q0 += ASKING) {
      int64_t across = std::min(ASKING, queries - q0);
      for (int64_t t = 0; t < deep; t += BLOCK)
        for (int64_t q = 0; q < across; q += BLOCK) {
          bool unseen = own && t0 + t > (q0 + q + BLOCK - 1) / groups;
          if (!unseen) {
            multiply(scores, BLOCK, dwords(key.rows) + (t0 + t) * wide / 2, wide / 2, b.query.across + q0 + q, queries, BLOCK, BLOCK, wide / 2, false);
            multiply(inner, BLOCK, dwords(value.rows) + (t0 + t) * wide / 2, wide / 2, b.up.across + q0 + q, queries, BLOCK, BLOCK, wide / 2, false);
          }
          bool whole = !own || t0 + t + BLOCK - 1 <= (q0 + q) / groups;
          for (int h = 0; h < 2; h++) {
            int64_t at = q + h * LANES;
            Floats sum = load(log_sum + q0 + at), level = load(common + q0 + at);
            Ints until = seen_by(q0 + at, groups);
            Bits before{};
            for (int64_t i = 0; i < BLOCK; i++) {
              int64_t token = t0 + t + i;
              Floats w{}, g{};
              if (!unseen && token < tokens) {
                w = exp(load(scores + i * BLOCK + h * LANES) * x.scale - sum);
                if (!whole) w = (int32_t)token < until ? w : Floats{};
                g = w * (load(inner + i * BLOCK + h * LANES) - level) * x.scale;
              }
              Bits w_bits = halved(w), g_bits = halved(g);
              Halves w_half = narrowed(w_bits), g_half = narrowed(g_bits);
              memcpy(weights + (t + i) * ASKING + at, &w_half, sizeof w_half);
              memcpy(inner_rows + (t + i) * ASKING + at, &g_half, sizeof g_half);
              if (i % 2) put(inner_pairs + (t + i) / 2 * ASKING + at, before | g_bits << 16);
              before = g_bits;
            }
          }
        }
      multiply(to_value + t0 * wide, wide, dwords(weights), ASKING / 2, b.up.pairs + q0 / 2 * wide, wide, deep, wide, across / 2, true);
      multiply(to_key + t0 * wide, wide, dwords(inner_rows), ASKING / 2, b.query.pairs + q0 / 2 * wide, wide, deep, wide, across / 2, true);
      multiply(to_query + q0, queries, key.columns + t0 / 2, key.n / 2, inner_pairs, ASKING, wide, across, deep / 2, true);
    }
  }
}

struct Gradients {
  bfloat16 *query, *key, *value;
  float* shared;  // of the prompts, one for each part and their own: [parts + 1][2][prompt tokens][kv][width]
};

void backward(Backward& b, const Tokens& x, const bfloat16* up, const bfloat16* out, const bfloat16* query, const bfloat16* key,
              const bfloat16* value, const float* log_sum, const Gradients& to, int64_t prompt, int64_t part, int64_t parts, int64_t k) {
  int64_t wide = x.wide(), groups = x.groups(), length = x.length[prompt], room = up_to(length, BLOCK) * wide;
  int64_t prompt_tokens = x.start[x.prompts - 1] + x.length[x.prompts - 1], each = prompt_tokens * x.kv * x.width;
  Room to_prompt_held;
  float *prompt_key = to_prompt_held.of<float>(2 * room), *prompt_value = prompt_key + room;
  memset(prompt_key, 0, 2 * room * sizeof(float));
  bool itself = part == parts;
  b.prompt_key.lay(x.keys(key, x.key_apart, prompt, k), wide, true);
  b.prompt_value.lay(x.keys(value, x.value_apart, prompt, k), wide, false);
  for (int64_t row = itself ? -1 : part; row < (itself ? 0 : x.completions); row += parts) {
    int64_t s = x.sequence(prompt, row);
    if (x.length[s] == 0) continue;
    int64_t asked = x.length[s] * groups, outside = x.heads * x.width;
    b.query.lay(x.queries(query, x.query_apart, s, k), wide, true);
    Rows g = x.queries(up, outside, s, k), o = x.queries(out, outside, s, k);
    b.up.lay(g, wide, true);
    float *sums = b.log_sum_held.of<float>(b.query.n), *common = b.common_held.of<float>(b.query.n);
    for (int64_t i = 0; i < b.query.n; i++) {
      Floats products{};
      for (int64_t j = 0; i < asked && j < x.width; j += LANES) products += load(g.row(i) + j, x.width - j) * load(o.row(i) + j, x.width - j);
      common[i] = sum(products);
      sums[i] = i < asked ? log_sum[(x.start[s] + i / groups) * x.heads + k * groups + i % groups] : INFINITY;
    }
    float* to_query = b.to_query_held.of<float>(wide * b.query.n);
    memset(to_query, 0, wide * b.query.n * sizeof(float));
    go_back(b, x, b.prompt_key, b.prompt_value, length, itself, to_query, prompt_key, prompt_value);
    if (!itself) {
      b.key.lay(x.keys(key, x.key_apart, s, k), wide, true);
      b.value.lay(x.keys(value, x.value_apart, s, k), wide, false);
      float *to_key = b.to_key_held.of<float>(b.key.n * wide), *to_value = b.to_value_held.of<float>(b.key.n * wide);
      memset(to_key, 0, b.key.n * wide * sizeof(float));
      memset(to_value, 0, b.key.n * wide * sizeof(float));
      go_back(b, x, b.key, b.value, x.length[s], true, to_query, to_key, to_value);
      for (int64_t i = 0; i < x.length[s]; i++)
        for (int64_t j = 0; j < x.width; j += LANES) {
          int64_t at = ((x.start[s] + i) * x.kv + k) * x.width + j;
          store(to.key + at, load(to_key + i * wide + j), x.width - j);
          store(to.value + at, load(to_value + i * wide + j), x.width - j);
        }
    }
    float* turned = b.turned_held.of<float>(b.query.n * wide);
    bfloat16* first = to.query + x.start[s] * outside + k * groups * x.width;
    write_rows(to_query, b.query.n, 0, asked, first, outside, x.width, groups, x.width, wide, turned);
  }
  for (int64_t i = 0; i < length; i++)
    for (int64_t j = 0; j < x.width; j += LANES) {
      float* at = to.shared + part * 2 * each + ((x.start[prompt] + i) * x.kv + k) * x.width + j;
      store(at, load(prompt_key + i * wide + j), x.width - j);
      store(at + each, load(prompt_value + i * wide + j), x.width - j);
    }
}

}  // namespace

// 1 if these may run on this machine.
extern "C" int64_t attention_ready() { return lent(); }

extern "C" void attend_packed_bfloat16(const bfloat16* query, const bfloat16* key, const bfloat16* value, bfloat16* out, float* log_sum,
                              const int64_t* start, const int64_t* length, int64_t prompts, int64_t completions, int64_t heads, int64_t kv,
                              int64_t width, int64_t query_apart, int64_t key_apart, int64_t value_apart, float scale) {
  Tokens x{prompts, completions, heads, kv, width, query_apart, key_apart, value_apart, start, length, scale};
#pragma omp parallel
  {
    [[maybe_unused]] Tiles tiles;
    Forward room;
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t row = -1; row < completions; row++)
      for (int64_t p = 0; p < prompts; p++)
        for (int64_t k = 0; k < kv; k++) forward(room, x, query, key, value, out, log_sum, p, row, k);
  }
}

extern "C" void attend_packed_backward_bfloat16(const bfloat16* up, const bfloat16* out, const bfloat16* query, const bfloat16* key,
                                       const bfloat16* value, const float* log_sum, bfloat16* to_query, bfloat16* to_key,
                                       bfloat16* to_value, float* shared, const int64_t* start, const int64_t* length, int64_t prompts,
                                       int64_t completions, int64_t parts, int64_t heads, int64_t kv, int64_t width, int64_t query_apart,
                                       int64_t key_apart, int64_t value_apart, float scale) {
  Tokens x{prompts, completions, heads, kv, width, query_apart, key_apart, value_apart, start, length, scale};
  Gradients to{to_query, to_key, to_value, shared};
  int64_t each = (start[prompts - 1] + length[prompts - 1]) * kv * width;
#pragma omp parallel
  {
    [[maybe_unused]] Tiles tiles;
    Backward room;
#pragma omp for schedule(dynamic) collapse(3)
    for (int64_t part = 0; part <= parts; part++)
      for (int64_t p = 0; p < prompts; p++)
        for (int64_t k = 0; k < kv; k++) backward(room, x, up, out, query, key, value, log_sum, to, p, part, parts, k);
#pragma omp for
    for (int64_t at = 0; at < each; at += LANES) {
      Floats of_key{}, of_value{};
      for (int64_t part = 0; part <= parts; part++) {
        of_key += load(shared + part * 2 * each + at, each - at);
        of_value += load(shared + (part * 2 + 1) * each + at, each - at);
      }
      store(to_key + at, of_key, each - at);
      store(to_value + at, of_value, each - at);
    }
  }
}
