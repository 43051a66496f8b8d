// The tile instructions, or their emulation.
//
// They are written out rather than taken from the compiler's intrinsics: those of GCC 12 do not say that a tile is
// loaded from memory, nor that all 64 bytes of a configuration are read, so that stores before them may be dropped or
// moved; and TDPFP16PS is unknown to it and to older assemblers.
//
// With PYMM_EMULATE_AMX the eight tile registers are memory and the instructions are loops, so that the AMX variants
// can be tested on a machine without AMX. Never for use: it is slower than portable code.
#pragma once

#include "cpu/simd/vec.h"

#if PYMM_ISA_LEVEL >= 4
namespace pymm::PYMM_ISA {

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);
inline constexpr TileConfig kTileConfig;

#if defined(PYMM_EMULATE_AMX)
struct Tiles {
  alignas(64) uint8_t rows[8][16][64];
  bool configured;
};
inline thread_local Tiles tiles;

// Without a configuration the instructions fault, and so does this.
inline uint8_t (&emulated_tile(int tile))[16][64] {
  if (!tiles.configured) __builtin_trap();
  return tiles.rows[tile];
}
inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0.0f, x) : x; }
// A factor of a product: subnormal numbers of bfloat16 are taken for zero, those of float16 are not.
inline float factor(bf16 x) { return flushed(to_acc(x)); }
inline float factor(f16 x) { return to_acc(x); }

// TDPBF16PS and TDPFP16PS of the Intel SDM: the even and the odd products of a row are summed apart, then added to the
// target; each step rounds to nearest, and subnormal sums become zero.
template <class E>
inline void emulated_dot(int target, int a, int b) {
  auto& rows_a = emulated_tile(a);
  auto& rows_b = emulated_tile(b);
  auto& rows_c = emulated_tile(target);
  for (int m = 0; m < 16; ++m) {
    float sums[32] = {}, c[16];
    for (int k = 0; k < 16; ++k) {
      E pair[2], row[32];
      memcpy(pair, rows_a[m] + 4 * k, sizeof(pair));
      memcpy(row, rows_b[k], sizeof(row));
      for (int i = 0; i < 32; ++i) sums[i] = flushed(__builtin_fmaf(factor(pair[i % 2]), factor(row[i]), sums[i]));
    }
    memcpy(c, rows_c[m], sizeof(c));
    for (int n = 0; n < 16; ++n) c[n] = flushed(flushed(c[n]) + flushed(sums[2 * n] + sums[2 * n + 1]));
    memcpy(rows_c[m], c, sizeof(c));
  }
}

inline void configure_tiles() {
  memset(tiles.rows, 0, sizeof(tiles.rows));
  tiles.configured = true;
}
inline void release_tiles() { tiles.configured = false; }
template <int tile>
inline void zero_tile() {
  memset(emulated_tile(tile), 0, sizeof(tiles.rows[0]));
}
template <int tile>
inline void load_tile(const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tile(tile)[r], static_cast<const char*>(base) + r * stride, 64);
}
template <int tile>
inline void store_tile(void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(base) + r * stride, emulated_tile(tile)[r], 64);
}
template <class E, int target, int a, int b>
inline void dot_tiles() {
  emulated_dot<E>(target, a, b);
}
#else
// A thread's tile configuration is its own: it is set for each block of products and released, so that no other library
// finds ours and the kernel saves no tile data on a context switch outside.
inline void configure_tiles() { asm volatile("ldtilecfg %0" : : "m"(kTileConfig)); }
inline void release_tiles() { asm volatile("tilerelease"); }

template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
// 16 rows of 64 bytes, `stride` bytes apart.
template <int tile>
inline void load_tile(const void* base, int64_t stride) {
  asm volatile("tileloadd (%1,%2,1), %%tmm%c0" : : "i"(tile), "r"(base), "r"(stride) : "memory");
}
template <int tile>
inline void store_tile(void* base, int64_t stride) {
  asm volatile("tilestored %%tmm%c0, (%1,%2,1)" : : "i"(tile), "r"(base), "r"(stride) : "memory");
}

// target += a . b for tiles of E: rows of a by columns of b, which are pairs.
template <class E, int target, int a, int b>
inline void dot_tiles() {
  if constexpr (__is_same(E, bf16)) {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(target), "i"(a), "i"(b));
  } else {
    // tdpfp16ps, VEX.128.F2.0F38.W0 5C: b in VEX.vvvv, inverted, then target and a in ModRM.
    static_assert(__is_same(E, f16));
    asm volatile(".byte 0xc4, 0xe2, %c0, 0x5c, %c1" : : "i"((~b & 15) << 3 | 3), "i"(0xc0 | target << 3 | a));
  }
}
#endif

}  // namespace pymm::PYMM_ISA
#endif
