// The tile instructions, or their emulation.
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

}  // namespace pymm::PYMM_ISA

#if defined(PYMM_EMULATE_AMX)
namespace pymm::PYMM_ISA {

struct Tiles {
  alignas(64) uint8_t rows[8][16][64];
  bool configured;
};
inline thread_local Tiles tiles;

inline void emulated_load_config(const TileConfig*) {
  memset(tiles.rows, 0, sizeof(tiles.rows));
  tiles.configured = true;
}
inline void emulated_release() { tiles.configured = false; }
// Without a configuration the instructions fault, and so does this.
inline uint8_t (&emulated_tile(int tile))[16][64] {
  if (!tiles.configured) __builtin_trap();
  return tiles.rows[tile];
}
inline void emulated_zero(int tile) { memset(emulated_tile(tile), 0, sizeof(tiles.rows[0])); }
inline void emulated_load(int tile, const void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(emulated_tile(tile)[r], static_cast<const char*>(base) + r * stride, 64);
}
inline void emulated_store(int tile, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(base) + r * stride, emulated_tile(tile)[r], 64);
}
// TDPBF16PS of the Intel SDM: the even and the odd products of a row are summed apart, then added to the target.
inline void emulated_dot(int target, int a, int b) {
  auto& rows_a = emulated_tile(a);
  auto& rows_b = emulated_tile(b);
  auto& rows_c = emulated_tile(target);
  for (int m = 0; m < 16; ++m) {
    float sums[32] = {}, c[16];
    for (int k = 0; k < 16; ++k) {
      bf16 pair[2], row[32];
      memcpy(pair, rows_a[m] + 4 * k, sizeof(pair));
      memcpy(row, rows_b[k], sizeof(row));
      for (int i = 0; i < 32; ++i) sums[i] += to_acc(pair[i % 2]) * to_acc(row[i]);
    }
    memcpy(c, rows_c[m], sizeof(c));
    for (int n = 0; n < 16; ++n) c[n] += sums[2 * n] + sums[2 * n + 1];
    memcpy(rows_c[m], c, sizeof(c));
  }
}

}  // namespace pymm::PYMM_ISA

#define PYMM_TILE_LOAD_CONFIG(config) emulated_load_config(config)
#define PYMM_TILE_RELEASE() emulated_release()
#define PYMM_TILE_ZERO(tile) emulated_zero(tile)
#define PYMM_TILE_LOAD(tile, base, stride) emulated_load(tile, base, stride)
#define PYMM_TILE_STORE(tile, base, stride) emulated_store(tile, base, stride)
#define PYMM_TILE_DOT_BF16(target, a, b) emulated_dot(target, a, b)
#else
// Macros, since the intrinsics take the tile's number as a literal.
#define PYMM_TILE_LOAD_CONFIG(config) _tile_loadconfig(config)
#define PYMM_TILE_RELEASE() _tile_release()
#define PYMM_TILE_ZERO(tile) _tile_zero(tile)
#define PYMM_TILE_LOAD(tile, base, stride) _tile_loadd(tile, base, stride)
#define PYMM_TILE_STORE(tile, base, stride) _tile_stored(tile, base, stride)
#define PYMM_TILE_DOT_BF16(target, a, b) _tile_dpbf16ps(target, a, b)
#endif
#endif
