// What a Llama does between its matrix products: norms, gates, turning by angles; each one pass over its data, with its gradient.
//
// Called by all threads of a parallel region, over which rows are shared out; they wait for one another at the end.
#pragma once

#include "cpu_vectors.h"

namespace {

inline Floats sigmoid(Floats x) { return 1.f / (1.f + exp(-x)); }

// total = x + y (y may be missing: then it is x); out = total at unit mean square times the weight.
template <class T>
void norm(const T* x, const T* y, const T* weight, T* total, T* out, float* size, int64_t rows, int64_t width, float eps) {
#pragma omp for
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
#pragma omp for
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
#pragma omp for
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
#pragma omp for
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

// Turn the first `heads` heads of every row by the angles of its position, in place; back with `sign` -1.
template <class T>
void turn(T* x, const T* cos, const T* sin, int64_t rows, int64_t heads, int64_t width, int64_t stride, float sign) {
  int64_t half = width / 2;
#pragma omp for
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

}  // namespace
