// Sixteen numbers at a time, float or bfloat16, for the loops of a CPU: how they are read, written, rounded, summed.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Bits __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

struct bfloat16 {
  uint16_t bits;
};

constexpr int64_t LANES = 16;
constexpr float NONE = -INFINITY;
constexpr Ints COUNT = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

inline Floats all(float x) { return Floats{} + x; }

inline Floats load(const float* p) {
  Floats x;
  memcpy(&x, p, sizeof x);
  return x;
}

// Sixteen numbers of 16 bits to 32 bits, and back; GCC makes six instructions of a conversion for which the processor has one.
inline Bits widened(Halves h) {
#ifdef __AVX512F__
  return (Bits)_mm512_cvtepu16_epi32((__m256i)h);
#else
  return __builtin_convertvector(h, Bits);
#endif
}

inline Halves narrowed(Bits x) {
#ifdef __AVX512F__
  return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
  return __builtin_convertvector(x, Halves);
#endif
}

inline Floats load(const bfloat16* p) {
  Halves h;
  memcpy(&h, p, sizeof h);
  return (Floats)(widened(h) << 16);
}

inline void store(float* p, Floats x) { memcpy(p, &x, sizeof x); }

// To bfloat16 in the low half of each lane: to the nearest, ties to even; NaN stays NaN.
inline Bits halved(Floats x) {
  Bits bits = (Bits)x;
  return (x != x) ? (Bits{} + 0x7fc0) : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

inline void store(bfloat16* p, Floats x) {
#ifdef __AVX512BF16__
  __m256bh h = _mm512_cvtneps_pbh((__m512)x);  // the same, but for numbers below 1.2e-38, which become 0
#else
  Halves h = narrowed(halved(x));
#endif
  memcpy(p, &h, sizeof h);
}

// x in the first n lanes, and `fill` in those that are left.
inline Floats first(Floats x, int64_t n, float fill) { return COUNT < (int32_t)n ? x : all(fill); }

// The n next numbers, and `fill` in the lanes that are left.
template <class T>
inline Floats load(const T* p, int64_t n, float fill = 0) {
  if (n >= LANES) return load(p);
  T rest[LANES];
  memcpy(rest, p, n * sizeof(T));
  memset(rest + n, 0, (LANES - n) * sizeof(T));
  return first(load(rest), n, fill);
}

template <class T>
inline void store(T* p, Floats x, int64_t n) {
  if (n >= LANES) return store(p, x);
  T rest[LANES];
  store(rest, x);
  memcpy(p, rest, n * sizeof(T));
}

inline float sum(Floats x) {
  float total = 0;
  for (int i = 0; i < LANES; i++) total += x[i];
  return total;
}

inline float largest(Floats x) {
  float most = x[0];
  for (int i = 1; i < LANES; i++) most = x[i] > most ? x[i] : most;
  return most;
}

inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// exp to about one unit in the last place: 2^n times a polynomial (S. Moshier, Cephes, 1992).
inline Floats exp(Floats x) {
  Floats y = x > 89.f ? all(89.f) : x;
  Floats shifted = y * 1.44269504088896341f + 12582912.f;  // the integer lands in the low bits
  Floats n = shifted - 12582912.f;
  Floats r = y - n * 0.693359375f + n * 2.12194440e-4f;
  Floats p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  Bits power = ((Bits)shifted - 0x4b400000u + 127u) << 23;
  return x < -87.3f ? all(0.f) : p * (Floats)power;
}

}  // namespace
