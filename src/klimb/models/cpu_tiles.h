// Products of matrices of bfloat16, 32 x 32 numbers at a time, summed in float: by the matrix tiles of a processor that has them (AMX), by
// its dot products of bfloat16 (AVX512-BF16), or by plain ones; and how their factors lie.
//
// "Pairs" are two bfloat16 in 32 bits, as the second factor of such a product has them: [n / 2][columns] pairs of rows 2i and 2i + 1.
#pragma once

#include <cstdlib>
#include <memory>

#include "cpu_vectors.h"

#ifdef __AMX_BF16__
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int64_t BLOCK = 32;

inline int64_t up_to(int64_t n, int64_t whole) { return (n + whole - 1) / whole * whole; }

inline Bits bits(const uint32_t* p) {
  Bits x;
  memcpy(&x, p, sizeof x);
  return x;
}

inline void put(uint32_t* p, Bits x) { memcpy(p, &x, sizeof x); }

inline Bits paired(Floats even, Floats odd) { return halved(even) | halved(odd) << 16; }

// Memory of a thread, on the boundary of a line of the cache; grows and is kept.
struct Room {
  std::unique_ptr<void, decltype(&free)> held{nullptr, free};
  int64_t size = 0;

  template <class T>
  T* of(int64_t count) {
    int64_t bytes = up_to(count * sizeof(T), 64);
    if (bytes > size) {
      held.reset(aligned_alloc(64, bytes));
      size = bytes;
    }
    return static_cast<T*>(held.get());
  }
};

// ---- products

// A [m, 2 depth] in rows, and B [2 depth, n] in pairs, depth a multiple of 16; so many numbers of 32 bits lie from one row to the next.
struct Factors {
  const uint32_t* a;
  int64_t a_apart;
  const uint32_t* b;
  int64_t b_apart, depth;
};

// C [32, 32] (+)= A B, plus another such product if there is one; LARGE: B, which lies without gaps, comes through memory, and what lies
// behind it is wanted next.
#ifdef __AMX_BF16__

constexpr int64_t AHEAD = 4096;  // bytes of B that are asked for beforehand

// As much as 16 rows of 32 pairs.
inline void fetch(const uint32_t* b) {
  const char* at = reinterpret_cast<const char*>(b) + AHEAD;
#pragma GCC unroll 32
  for (int i = 0; i < 32; i++) __builtin_prefetch(at + i * 64);
}

inline bool lent() {  // the system lends the tiles only to who asks
  constexpr long ASK = 0x1023, TILES = 18;
  return syscall(SYS_arch_prctl, ASK, TILES) == 0;
}

// GCC does not know that tile instructions read memory: what was stored before them is to be there.
inline void written() { asm volatile("" ::: "memory"); }

struct Tiles {  // what the tile registers are, from here to the end of the scope
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, unused[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int i = 0; i < 8; i++) shape.bytes[i] = 64, shape.rows[i] = 16;
    written();
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
};

template <bool LARGE = false>
inline void block(float* c, int64_t c_apart, const Factors& f, bool add, const Factors& more = {}) {
  written();
  if (add) {
    _tile_loadd(0, c, c_apart * 4);
    _tile_loadd(1, c + 16, c_apart * 4);
    _tile_loadd(2, c + 16 * c_apart, c_apart * 4);
    _tile_loadd(3, c + 16 * c_apart + 16, c_apart * 4);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  auto onward = [](const uint32_t* a, int64_t a_apart, const uint32_t* b, int64_t b_apart) {
    _tile_loadd(4, a, a_apart * 4);
    _tile_loadd(6, b, b_apart * 4);
    _tile_loadd(7, b + 16, b_apart * 4);
    _tile_loadd(5, a + 16 * a_apart, a_apart * 4);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  };
  for (int64_t d = 0; d < f.depth; d += 16) {
    if (LARGE) fetch(f.b + d * f.b_apart);
    onward(f.a + d, f.a_apart, f.b + d * f.b_apart, f.b_apart);
  }
  for (int64_t d = 0; d < more.depth; d += 16) onward(more.a + d, more.a_apart, more.b + d * more.b_apart, more.b_apart);
  _tile_stored(0, c, c_apart * 4);
  _tile_stored(1, c + 16, c_apart * 4);
  _tile_stored(2, c + 16 * c_apart, c_apart * 4);
  _tile_stored(3, c + 16 * c_apart + 16, c_apart * 4);
}

#else

inline bool lent() { return true; }

struct Tiles {};

inline Floats dot(Floats sum, uint32_t a, Bits b) {
#ifdef __AVX512BF16__
  return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Bits{} + a), (__m512bh)b);
#else
  float even, odd;
  uint32_t low = a << 16, high = a & 0xffff0000u;
  memcpy(&even, &low, 4);
  memcpy(&odd, &high, 4);
  return sum + even * (Floats)(b << 16) + odd * (Floats)(b & 0xffff0000u);
#endif
}

template <bool LARGE = false>
inline void block(float* c, int64_t c_apart, const Factors& f, bool add, const Factors& more = {}) {
  constexpr int ROWS = 8;
  const char* behind = reinterpret_cast<const char*>(f.b + f.depth * f.b_apart);
  for (int64_t m = 0; m < BLOCK; m += ROWS) {
    Floats left[ROWS] = {}, right[ROWS] = {};
    for (int i = 0; add && i < ROWS; i++) left[i] = load(c + (m + i) * c_apart), right[i] = load(c + (m + i) * c_apart + 16);
    for (const Factors* g : {&f, &more})
      for (int64_t d = 0; d < g->depth; d++) {
        // a quarter of the next block of B for each of four passes over this one, into the second level of the cache
        if (LARGE && g == &f) __builtin_prefetch(behind + (m / ROWS * f.depth + d) * 32, 0, 2);
        Bits b_left = bits(g->b + d * g->b_apart), b_right = bits(g->b + d * g->b_apart + 16);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
          uint32_t from = g->a[(m + i) * g->a_apart + d];
          left[i] = dot(left[i], from, b_left);
          right[i] = dot(right[i], from, b_right);
        }
      }
    for (int i = 0; i < ROWS; i++) store(c + (m + i) * c_apart, left[i]), store(c + (m + i) * c_apart + 16, right[i]);
  }
}

#endif

// The same of [m, n], multiples of 32.
inline void multiply(float* c, int64_t c_apart, const uint32_t* a, int64_t a_apart, const uint32_t* b, int64_t b_apart, int64_t m,
                     int64_t n, int64_t depth, bool add) {
  for (int64_t j = 0; j < n; j += BLOCK)
    for (int64_t i = 0; i < m; i += BLOCK)
      block(c + i * c_apart + j, c_apart, {a + i * a_apart, a_apart, b + j, b_apart, depth}, add);
}

// ---- how the factors lie

// [rows, columns] of 32 bits -> [columns, rows], 16 x 16 at a time.
template <int STAGE>
inline void swap_lanes(Bits* x) {
  constexpr int D = 1 << STAGE;
  typedef uint32_t Mask __attribute__((vector_size(64)));
  Mask low, high;
  for (int i = 0; i < 16; i++) {
    low[i] = i & D ? 16 + (i - D) : i;
    high[i] = i & D ? 16 + i : i + D;
  }
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (!(i & D)) {
      Bits a = x[i], b = x[i + D];
      x[i] = __builtin_shuffle(a, b, low);
      x[i + D] = __builtin_shuffle(a, b, high);
    }
}

inline void transpose(const uint32_t* from, int64_t from_apart, uint32_t* to, int64_t to_apart, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 16)
    for (int64_t c = 0; c < columns; c += 16) {
      Bits x[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) x[i] = bits(from + (r + i) * from_apart + c);
      swap_lanes<0>(x);
      swap_lanes<1>(x);
      swap_lanes<2>(x);
      swap_lanes<3>(x);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) put(to + (c + i) * to_apart + r, x[i]);
    }
}

inline const uint32_t* dwords(const bfloat16* x) { return reinterpret_cast<const uint32_t*>(x); }

}  // namespace
