// Tiles of 16-bit numbers in shared memory, as operands of the tensor cores.
#pragma once

#include "cuda/tensor_core.h"

namespace pymm::cuda {

// Rows of `kWidth` numbers of 16 bits in shared memory, without bank conflicts.
template <int kWidth>
struct Layout {
  static constexpr int kChunks = kWidth / 8, kStride = kChunks % 8 == 0 ? kChunks : padded_chunks(kChunks);
  template <int kRows>
  static constexpr int64_t kBytes = int64_t{kRows} * kStride * kChunk;
  PYMM_DEVICE static int at(int row, int chunk) {
    if constexpr (kChunks % 8 == 0) {
      return swizzled<kChunks>(row, chunk) * kChunk;
    } else {
      return (row * kStride + chunk) * kChunk;
    }
  }
};

// The operands of products, see tensor_core.h: a from 16 rows, or from rows that are its columns; b of 16 columns from
// rows that are its columns, or from its own rows; `step` counts 16 numbers of a row.
template <int kWidth>
PYMM_DEVICE void load_a(uint32_t (&a)[4], const unsigned char* tile, int row, int step) {
  const int lane = lane_id();
  load_matrices(a, tile + Layout<kWidth>::at(row + lane % 16, step * 2 + lane / 16));
}
template <int kWidth>
PYMM_DEVICE void load_a_columns(uint32_t (&a)[4], const unsigned char* tile, int row, int step) {
  const int lane = lane_id();
  load_matrices_transposed(a, tile + Layout<kWidth>::at(row + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
}
template <int kWidth>
PYMM_DEVICE void load_b(uint32_t (&b)[4], const unsigned char* tile, int row, int step) {
  const int lane = lane_id();
  load_matrices(b, tile + Layout<kWidth>::at(row + lane % 8 + lane / 16 * 8, step * 2 + lane / 8 % 2));
}
template <int kWidth>
PYMM_DEVICE void load_b_rows(uint32_t (&b)[4], const unsigned char* tile, int row, int step) {
  const int lane = lane_id();
  load_matrices_transposed(b, tile + Layout<kWidth>::at(row + lane % 16, step * 2 + lane / 16));
}
template <class T>
PYMM_DEVICE void mma_pair(float (&low)[4], float (&high)[4], const uint32_t (&a)[4], const uint32_t (&b)[4]) {
  mma<T>(low, a, {b[0], b[1]});
  mma<T>(high, a, {b[2], b[3]});
}

}  // namespace pymm::cuda
