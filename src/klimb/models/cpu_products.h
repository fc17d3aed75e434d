// Products of few rows with large weights, which come through memory once for all of them; their low-rank adapters in the same pass.
//
// A weight [columns, width] lies as blocks of 32 columns, each as pairs [width / 2][32] (`cpu_tiles.h`), zeros beyond its edges.
#pragma once

#include "cpu_tiles.h"

namespace {

// Linear layers that read the same states, side by side: x weight' + bias + (x a') b', with a [rank, width] and b [columns, rank]; bias
// and adapter may be missing. `klimb.models.cpu_kernels` has the same fields.
struct Linear {
  const uint32_t* weight;
  const bfloat16* bias;
  const uint32_t *a, *b;
  int64_t width, columns, rank;
};

// Rows [n][width] as products read them, a block of 32 at a time: where they lie, or copied with zeros beyond their edges.
struct Blocks {
  const bfloat16* x;
  int64_t depth, whole;
  Room rest;

  Blocks(const bfloat16* x, int64_t rows, int64_t width)
      : x(x), depth(up_to(width, BLOCK) / 2), whole(width % BLOCK ? 0 : rows / BLOCK) {
    int64_t from = whole * BLOCK, more = up_to(rows, BLOCK) - from;
    bfloat16* to = rest.of<bfloat16>(more * depth * 2);
    for (int64_t i = 0; i < more; i++) {
      int64_t has = from + i < rows ? width : 0;
      if (has) memcpy(to + i * depth * 2, x + (from + i) * width, has * sizeof(bfloat16));
      memset(to + i * depth * 2 + has, 0, (depth * 2 - has) * sizeof(bfloat16));
    }
  }

  const uint32_t* operator[](int64_t m) {
    return m < whole ? dwords(x) + m * BLOCK * depth : rest.of<uint32_t>(0) + (m - whole) * BLOCK * depth;
  }
};

// Numbers of x a' [up_to(rows, 32)][up_to(rank, 32)], as they are kept between the two products.
inline int64_t narrow_size(const Linear& w, int64_t rows) { return up_to(rows, BLOCK) * up_to(w.rank, BLOCK); }

// y [rows, columns] of x [rows, width]; x a' is rounded to bfloat16, the sum of all of it once. Called by all threads of a parallel
// region, over which columns are shared out, with their tiles on; they wait for one another at the end.
inline void multiply_few(const Linear& w, const bfloat16* x, bfloat16* y, int64_t rows, bfloat16* narrow) {
  int64_t depth = up_to(w.width, BLOCK) / 2, inner = up_to(w.rank, BLOCK) / 2, blocks = up_to(rows, BLOCK) / BLOCK;
  Blocks from(x, rows, w.width);
  alignas(64) float found[BLOCK * BLOCK];
  if (w.rank) {
#pragma omp for collapse(2)
    for (int64_t m = 0; m < blocks; m++)
      for (int64_t j = 0; j < inner * 2; j += BLOCK) {
        block(found, BLOCK, {from[m], depth, w.a + j * depth, BLOCK, depth}, false);
        for (int64_t i = 0; i < BLOCK; i++)
          for (int64_t h = 0; h < BLOCK; h += LANES) store(narrow + (m * BLOCK + i) * inner * 2 + j + h, load(found + i * BLOCK + h));
      }
  }
#pragma omp for
  for (int64_t n = 0; n < w.columns; n += BLOCK)
    for (int64_t m = 0; m < blocks; m++) {
      Factors whole{from[m], depth, w.weight + n * depth, BLOCK, depth};
      Factors adapter{dwords(narrow) + m * BLOCK * inner, inner, w.b + n * inner, BLOCK, inner};
      if (m == 0)  // for the blocks of rows after the first one, what lies ahead is there
        block<true>(found, BLOCK, whole, false, adapter);
      else
        block(found, BLOCK, whole, false, adapter);
      for (int64_t i = m * BLOCK; i < std::min(rows, (m + 1) * BLOCK); i++)
        for (int64_t j = n; j < std::min(w.columns, n + BLOCK); j += LANES) {
          Floats sum = load(found + i % BLOCK * BLOCK + j % BLOCK);
          if (w.bias) sum += load(w.bias + j, w.columns - j);
          store(y + i * w.columns + j, sum, w.columns - j);
        }
    }
}

}  // namespace
