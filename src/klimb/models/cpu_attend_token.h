// Attention of one query a row, over its prompt's tokens where they lie and over its own, whose newest is written down first.
#pragma once

#include "cpu_vectors.h"

namespace {

// Where a key or value of the t-th token lies: keys in tiles of sixteen tokens, [tiles, width, 16], values as they come.
inline int64_t in_tile(int64_t t, int64_t d, int64_t width) { return (t / LANES * width + d) * LANES + t % LANES; }

// Ask for memory that is read soon: a processor does not guess where the next row's tokens lie.
template <class T>
inline void fetch(const T* soon, int64_t count) {
  for (int64_t i = 0; i < count; i += 64 / (int64_t)sizeof(T)) __builtin_prefetch(soon + i, 0, 2);
}

// scores[g][t] = queries[g] . key[t], of the tokens of some tiles; as much of what is read soon (may be missing) is asked for.
template <int G, class T>
void score(const float* queries, const T* keys, float* scores, int64_t tiles, int64_t width, int64_t room, const T* soon) {
  for (int64_t tile = 0; tile < tiles; tile++, keys += width * LANES) {
    if (soon) fetch(soon + tile * width * LANES, width * LANES);
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

// out[g] += sum_t weights[g][t] value[t], W times sixteen numbers wide; likewise.
template <int G, int W, class T>
void gather(const float* weights, const T* values, float* out, int64_t tokens, int64_t width, int64_t room, int64_t wide, const T* soon) {
  Floats found[G][W];
  for (int g = 0; g < G; g++)
    for (int i = 0; i < W; i++) found[g][i] = load(out + g * width + i * LANES, wide - i * LANES);
  for (int64_t t = 0; t < tokens; t++) {
    if (soon) fetch(soon + t * width, wide);
    for (int i = 0; i < W; i++) {
      Floats value = load(values + t * width + i * LANES, wide - i * LANES);
      for (int g = 0; g < G; g++) found[g][i] += weights[g * room + t] * value;
    }
  }
  for (int g = 0; g < G; g++)
    for (int i = 0; i < W; i++) store(out + g * width + i * LANES, found[g][i], wide - i * LANES);
}

template <int G, class T>
void gather(const float* weights, const T* values, float* out, int64_t tokens, int64_t width, int64_t room, const T* soon) {
  int64_t i = 0;
  auto some = [&](auto wide, int64_t n) {
    gather<G, decltype(wide)::value>(weights, values + i, out + i, tokens, width, room, n, soon ? soon + i : nullptr);
  };
  for (; i + 4 * LANES <= width; i += 4 * LANES) some(std::integral_constant<int, 4>(), 4 * LANES);
  for (; i < width; i += LANES) some(std::integral_constant<int, 1>(), std::min(width - i, LANES));
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

// One query a row: G heads that share keys, over a prompt's tokens and the row's own. `soon`: the keys of the next row's own.
template <int G, class T>
void attend(const T* query, const T* prompt_key, const T* prompt_value, int64_t length, const T* key,
            const T* value, int64_t own, int64_t width, float scale, T* out, std::vector<float>& work, const T* soon) {
  int64_t tiles = (length + LANES - 1) / LANES, own_tiles = (own + LANES - 1) / LANES, room = (tiles + own_tiles) * LANES;
  work.resize(G * (room + 2 * width));
  float *scores = work.data(), *queries = scores + G * room, *found = queries + G * width;
  for (int g = 0; g < G; g++)
    for (int64_t d = 0; d < width; d += LANES)
      store(queries + g * width + d, load(query + g * width + d, width - d) * scale, width - d);
  score<G, T>(queries, prompt_key, scores, tiles, width, room, nullptr);
  score<G>(queries, key, scores + tiles * LANES, own_tiles, width, room, value);
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
  gather<G, T>(scores, prompt_value, found, length, width, room, nullptr);
  gather<G>(scores + tiles * LANES, value, found, own, width, room, soon);
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
      int64_t after = head + 1 < n.kv ? at + 1 : row + 1 < n.rows ? slot[row + 1] * n.kv : at;
      const T* soon = key + after * n.own_tiles * n.width * LANES;
      auto attend_some = [&](auto some, int64_t one) {
        int64_t place = (head * groups + one) * n.width;
        attend<decltype(some)::value>(query + place, read, told, length[prompt[row]], keys, values, n.own, n.width, scale,
                                      out + row * n.queries * n.width + place, work, soon);
      };
      int64_t one = 0;
      for (; one + 4 <= groups; one += 4) attend_some(std::integral_constant<int, 4>(), one);
      if (groups - one == 3) attend_some(std::integral_constant<int, 3>(), one);
      if (groups - one == 2) attend_some(std::integral_constant<int, 2>(), one);
      if (groups - one == 1) attend_some(std::integral_constant<int, 1>(), one);
    }
}

}  // namespace
