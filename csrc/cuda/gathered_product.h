// A product of two operands that are read where they lie (patches.h), stored where the result belongs.
//
// C[i, j] = sum over k of A[i, k] B[j, k]. An operand's rows are i or j and its numbers k; or, turned, its rows are k.
// Parallel: one block per 64 x 64 tile. On tensor cores (bfloat16, float16) four warps of 32 x 32 each, two stages of
// 64 numbers of k in shared memory, the next filled while one is multiplied; on the float units as in tile.h.
#pragma once

#include "cuda/patches.h"
#include "cuda/tensor_tile.h"

namespace pymm::cuda {

constexpr int kGatherThreads = 128, kStep = 64;
constexpr int64_t kGatherTile = Layout<kStep>::kBytes<kTile>, kGatherBytes = 4 * kGatherTile;

template <class T, bool kTurnedA, bool kTurnedB, class A, class B, class Store>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kGatherThreads) void tensor_product_kernel(A a, B b, Store store, int64_t rows,
                                                                           int64_t columns, int64_t depth) {
  PYMM_DYNAMIC_SHARED(shared);
  const int64_t across = (columns + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / across * kTile, column = blockIdx.x % across * kTile;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int own_row = warp / 2 * 32, own_column = warp % 2 * 32;
  const auto fetch = [&](int64_t k, int stage) {
    unsigned char *const to_a = shared + 2 * stage * kGatherTile, *const to_b = to_a + kGatherTile;
    for (int i = static_cast<int>(threadIdx.x); i < kTile * 8; i += kGatherThreads) {
      const int r = i / 8, chunk = i % 8, at = Layout<kStep>::at(r, chunk);
      T* const of_a = reinterpret_cast<T*>(to_a + at);
      T* const of_b = reinterpret_cast<T*>(to_b + at);
      kTurnedA ? a.copy(of_a, k + r, row + chunk * 8) : a.copy(of_a, row + r, k + chunk * 8);
      kTurnedB ? b.copy(of_b, k + r, column + chunk * 8) : b.copy(of_b, column + r, k + chunk * 8);
    }
  };
  float sums[2][4][4] = {};
  if (depth > 0) fetch(0, 0);
  commit_copies();
  int stage = 0;
  for (int64_t k = 0; k < depth; k += kStep) {
    wait_for_copies<0>();
    PYMM_SYNC();
    if (k + kStep < depth) fetch(k + kStep, 1 - stage);
    commit_copies();
    const unsigned char *const tile_a = shared + 2 * stage * kGatherTile, *const tile_b = tile_a + kGatherTile;
    PYMM_UNROLL
    for (int step = 0; step < kStep / 16; ++step) {
      uint32_t of_a[2][4], of_b[4];
      PYMM_UNROLL
      for (int m = 0; m < 2; ++m) {
        if constexpr (kTurnedA) {
          load_a_columns<kStep>(of_a[m], tile_a, step * 16, own_row / 16 + m);
        } else {
          load_a<kStep>(of_a[m], tile_a, own_row + m * 16, step);
        }
      }
      PYMM_UNROLL
      for (int n = 0; n < 2; ++n) {
        if constexpr (kTurnedB) {
          load_b_rows<kStep>(of_b, tile_b, step * 16, own_column / 16 + n);
        } else {
          load_b<kStep>(of_b, tile_b, own_column + n * 16, step);
        }
        PYMM_UNROLL
        for (int m = 0; m < 2; ++m) mma_pair<T>(sums[m][2 * n], sums[m][2 * n + 1], of_a[m], of_b);
      }
    }
    stage = 1 - stage;
  }
  wait_for_copies<0>();
  PYMM_UNROLL
  for (int m = 0; m < 2; ++m) {
    PYMM_UNROLL
    for (int n = 0; n < 4; ++n) {
      PYMM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t r = row + own_row + m * 16 + i / 2 * 8 + lane / 4;
        const int64_t c = column + own_column + n * 8 + lane % 4 * 2 + i % 2;
        if (r < rows && c < columns) store(r, c, sums[m][n][i]);
      }
    }
  }
}

template <class T, bool kTurnedA, bool kTurnedB, class A, class B, class Store>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kSide* kSide) void exact_product_kernel(A a, B b, Store store, int64_t rows,
                                                                        int64_t columns, int64_t depth) {
  using Acc = Accumulator<T>;
  PYMM_SHARED Slabs<Acc> slabs;
  const int64_t across = (columns + kTile - 1) / kTile;
  const int64_t row = blockIdx.x / across * kTile, column = blockIdx.x % across * kTile;
  Acc sums[kEach][kEach] = {};
  add_product(
      slabs, depth, kTurnedA,
      [&](int64_t r, int64_t k) { return kTurnedA ? a.number(k, row + r) : a.number(row + r, k); }, kTurnedB,
      [&](int64_t r, int64_t k) { return kTurnedB ? b.number(k, column + r) : b.number(column + r, k); }, sums);
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    PYMM_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int64_t r = row + threadIdx.y + i * kSide, c = column + threadIdx.x + j * kSide;
      if (r < rows && c < columns) store(r, c, sums[i][j]);
    }
  }
}

template <class T, bool kTurnedA, bool kTurnedB, class A, class B, class Store>
void gathered_product(const Stream& stream, const A& a, const B& b, const Store& store, int64_t rows, int64_t columns,
                      int64_t depth) {
  if (rows == 0 || columns == 0) return;
  // Neighbouring blocks share their rows, of which there are more than L2 holds.
  const int64_t blocks = ceil_div(rows, kTile) * ceil_div(columns, kTile);
  STD_TORCH_CHECK(blocks <= INT32_MAX, "patch_embed: the call has too many tiles");
  const dim3 grid(static_cast<unsigned>(blocks));
  if constexpr (sizeof(T) == 2) {
    PYMM_LAUNCH_SHARED((tensor_product_kernel<T, kTurnedA, kTurnedB, A, B, Store>), grid, dim3(kGatherThreads),
                       kGatherBytes, stream, a, b, store, rows, columns, depth);
  } else {
    PYMM_LAUNCH((exact_product_kernel<T, kTurnedA, kTurnedB, A, B, Store>), grid, dim3(kSide, kSide), stream, a, b,
                store, rows, columns, depth);
  }
}

}  // namespace pymm::cuda
