// One more token of every running completion through all layers of a Llama, in bfloat16, as one call: between a hundred small
// operations the interpreter takes longer than they do, since the weights that go by push it out of the processor's caches.

#include "cpu_attend_token.h"
#include "cpu_between.h"
#include "cpu_products.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace {

constexpr int64_t PAGE = 1 << 21;

// `klimb.models.cpu_kernels` has the same fields.
struct Layer {
  const bfloat16* attention_norm;
  Linear query_key_value, output;
  const bfloat16* mlp_norm;
  Linear gate_up, down;
  const bfloat16 *prompt_key, *prompt_value;
  bfloat16 *key, *value;
};

}  // namespace

// 1 if products of few rows gain by these: the processor has tiles and the system lends them, or, without tiles, dot products of bfloat16.
extern "C" int64_t products_ready() {
#if defined(__AMX_BF16__) || defined(__AVX512BF16__)
  return lent();
#else
  return 0;
#endif
}

// Let memory that was not touched yet come in pages of 2 MiB, where the system does so on demand.
extern "C" void in_large_pages(char* memory, int64_t bytes) {
#ifdef MADV_HUGEPAGE
  uintptr_t first = up_to((uintptr_t)memory, PAGE), last = ((uintptr_t)memory + bytes) / PAGE * PAGE;
  if (first < last) madvise((void*)first, last - first, MADV_HUGEPAGE);
#endif
}

// weight [columns, width] as it is to lie.
extern "C" void lay_out_bfloat16(const bfloat16* weight, uint32_t* to, int64_t columns, int64_t width) {
  int64_t depth = up_to(width, BLOCK) / 2;
#pragma omp parallel for
  for (int64_t n = 0; n < columns; n += BLOCK) {
    Blocks rows(weight + n * width, std::min(BLOCK, columns - n), width);
    transpose(rows[0], depth, to + n * depth, BLOCK, BLOCK, depth);
  }
}

extern "C" void multiply_few_bfloat16(const bfloat16* x, const Linear* w, bfloat16* y, int64_t rows) {
  Room narrow;
  narrow.of<bfloat16>(narrow_size(*w, rows));
#pragma omp parallel
  {
    [[maybe_unused]] Tiles tiles;
    multiply_few(*w, x, y, rows, narrow.of<bfloat16>(0));
  }
}

// x [rows, width] embedded tokens -> out [rows, width], the states after the last norm; x is used up. cos, sin [rows, head width]. What
// attention is told is as in `attend_token`.
extern "C" void next_token_bfloat16(const Layer* layers, int64_t count, bfloat16* x, const bfloat16* cos, const bfloat16* sin,
                                    const bfloat16* last_norm, bfloat16* out, const int64_t* length, const int64_t* prompt,
                                    const int64_t* slot, int64_t rows, int64_t queries, int64_t kv, int64_t head_width, int64_t longest,
                                    int64_t own, int64_t own_tiles, float eps, float scale) {
  int64_t width = layers->output.columns, inner = layers->down.width, heads = queries + 2 * kv, narrow_most = 0;
  for (int64_t i = 0; i < count; i++)
    for (auto* w : {&layers[i].query_key_value, &layers[i].output, &layers[i].gate_up, &layers[i].down})
      narrow_most = std::max(narrow_most, narrow_size(*w, rows));
  Sizes sizes{rows, queries, kv, head_width, longest, own, own_tiles};
  std::vector<bfloat16> read(rows * width), told(rows * heads * head_width), found(rows * queries * head_width), y(rows * width),
      gate_up(rows * inner * 2), active(rows * inner);
  std::vector<float> size(rows);
  Room narrow_held;
  bfloat16* narrow = narrow_held.of<bfloat16>(narrow_most);
#pragma omp parallel
  {
    [[maybe_unused]] Tiles tiles;
    for (int64_t i = 0; i < count; i++) {
      const Layer& layer = layers[i];
      norm(x, i ? y.data() : nullptr, layer.attention_norm, x, read.data(), size.data(), rows, width, eps);
      multiply_few(layer.query_key_value, read.data(), told.data(), rows, narrow);
      turn(told.data(), cos, sin, rows, queries + kv, head_width, heads * head_width, 1.f);
      attend_token(told.data(), layer.prompt_key, layer.prompt_value, length, prompt, slot, layer.key, layer.value, found.data(), sizes, scale);
      multiply_few(layer.output, found.data(), y.data(), rows, narrow);
      norm(x, y.data(), layer.mlp_norm, x, read.data(), size.data(), rows, width, eps);
      multiply_few(layer.gate_up, read.data(), gate_up.data(), rows, narrow);
      gated(gate_up.data(), active.data(), rows, inner);
      multiply_few(layer.down, active.data(), y.data(), rows, narrow);
    }
    norm(x, y.data(), last_norm, x, out, size.data(), rows, width, eps);
  }
}
