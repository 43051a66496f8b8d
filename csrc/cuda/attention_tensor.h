// Attention on tensor cores, bfloat16 and float16 with heads of up to 128 numbers: what forward and backward share.
//
// Parallel: blocks of four warps; a warp owns 16 rows of the block's 64. On chip: the block's own rows, and tiles of
// the other side; in registers the scores, which are the second product's operand as they stand, and the results.
// Bytes: a block's own rows once, the other side once per block, which L2 serves. Ragged edges: beyond the width, the
// rows and the columns tiles hold zeros, and whole steps of 16 of them are left out.
#pragma once

#include "cuda/attention.h"
#include "cuda/tensor_tile.h"

namespace pymm::cuda {

constexpr int kWarps = 4, kAttentionThreads = kWarps * kWarp, kOwnRows = kWarps * 16;
static_assert(kOwnRows == kTile);
constexpr float kLog2e = 1.4426950408889634f;

// Starts to copy kRows rows, of which `left` exist, of `width` numbers.
template <class T, int kWidth, int kRows>
PYMM_DEVICE void copy_rows(unsigned char* shared, const T* from, int64_t stride, bool aligned, int left, int width) {
  using L = Layout<kWidth>;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * L::kChunks; i += kAttentionThreads) {
    const int row = i / L::kChunks, chunk = i % L::kChunks, more = width - chunk * 8;
    const int numbers = row >= left || more <= 0 ? 0 : more < 8 ? more : 8;
    const T* source = from + row * stride + chunk * 8;
    unsigned char* target = shared + L::at(row, chunk);
    if (aligned) {
      copy_async(target, numbers > 0 ? source : from, numbers * 2);
    } else {
      for (int j = 0; j < 8; ++j) reinterpret_cast<T*>(target)[j] = j < numbers ? source[j] : from_float(0.0f, T{});
    }
  }
}

// sums (16, kColumns) += own rows . the tile's rows, of which the first `some` matter.
template <class T, int kWidth, int kColumns>
PYMM_DEVICE void add_scores(float (&sums)[kColumns / 8][4], const unsigned char* own, int row,
                            const unsigned char* tile, int some, int width) {
  PYMM_UNROLL
  for (int step = 0; step < kWidth / 16; ++step) {
    if (step * 16 >= width) continue;
    uint32_t a[4], b[4];
    load_a<kWidth>(a, own, row, step);
    PYMM_UNROLL
    for (int n = 0; n < kColumns / 16; ++n) {
      if (n * 16 >= some) continue;
      load_b<kWidth>(b, tile, n * 16, step);
      mma_pair<T>(sums[2 * n], sums[2 * n + 1], a, b);
    }
  }
}

// sums (16, kWidth) += weights (16, kColumns) . the tile's rows, of which the first `some` matter.
template <class T, int kWidth, int kColumns>
PYMM_DEVICE void add_weighted(float (&sums)[kWidth / 8][4], const float (&weights)[kColumns / 8][4],
                              const unsigned char* tile, int some, int width) {
  PYMM_UNROLL
  for (int k = 0; k < kColumns / 16; ++k) {
    if (k * 16 >= some) continue;
    const float (&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                           pack<T>(right[2], right[3])};
    PYMM_UNROLL
    for (int n = 0; n < kWidth / 16; ++n) {
      if (n * 16 >= width) continue;
      uint32_t b[4];
      load_b_rows<kWidth>(b, tile, k * 16, n);
      mma_pair<T>(sums[2 * n], sums[2 * n + 1], a, b);
    }
  }
}

// Stores a warp's 16 rows, of which `left` exist, times the scale of each half; `target` is the first.
template <class T, int kWidth>
PYMM_DEVICE void store_rows(T* target, int64_t stride, bool aligned, int left, int width, const float (&scale)[2],
                            const float (&sums)[kWidth / 8][4]) {
  const int lane = lane_id();
  PYMM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int r = half * 8 + lane / 4;
    if (r >= left) continue;
    T* const row = target + r * stride;
    PYMM_UNROLL
    for (int n = 0; n < kWidth / 8; ++n) {
      const int d = n * 8 + lane % 4 * 2;
      const float low = sums[n][half * 2] * scale[half], high = sums[n][half * 2 + 1] * scale[half];
      if (aligned && d + 1 < width) {
        *reinterpret_cast<uint32_t*>(row + d) = pack<T>(low, high);
      } else {
        if (d < width) row[d] = from_float(low, T{});
        if (d + 1 < width) row[d + 1] = from_float(high, T{});
      }
    }
  }
}

}  // namespace pymm::cuda
