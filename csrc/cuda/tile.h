// Tiles of a matrix product on the float units, in float32 (float64 for float64).
//
// Parallel: one block of 16 x 16 threads per 64 x 64 tile, 4 x 4 sums per thread. On chip: a slab of each operand in
// shared memory, sums in registers. Ragged edges: slabs are filled up with zeros, which change no sum.
#pragma once

#include "cuda/device.h"

namespace pymm::cuda {

constexpr int kTile = 64, kSide = 16, kEach = kTile / kSide;

// One spare column: threads that walk down a slab then hit different banks.
template <class Acc>
struct Slabs {
  static constexpr int kDepth = sizeof(Acc) == 8 ? 8 : 16;
  Acc a[kDepth][kTile + 1], b[kDepth][kTile + 1];
};

// Fills one slab with f(row, k) for rows of the tile and `depth` numbers k; zeros beyond them. `rows_adjacent`:
// neighbours in memory differ in the row, so neighbouring threads take neighbouring rows.
template <class Acc, class F>
PYMM_DEVICE void fill_slab(Acc (*slab)[kTile + 1], int64_t first, int64_t depth, bool rows_adjacent, const F& f) {
  constexpr int kDepth = Slabs<Acc>::kDepth;
  for (int i = static_cast<int>(threadIdx.y * kSide + threadIdx.x); i < kTile * kDepth; i += kSide * kSide) {
    const int r = rows_adjacent ? i % kTile : i / kDepth, k = rows_adjacent ? i / kTile : i % kDepth;
    slab[k][r] = first + k < depth ? f(r, first + k) : Acc(0);
  }
}

// sums[i][j] += sum over k < depth of a(row, k) b(column, k), with row = ty + 16 i and column = tx + 16 j.
template <class Acc, class A, class B>
PYMM_DEVICE void add_product(Slabs<Acc>& slabs, int64_t depth, bool a_rows_adjacent, const A& a, bool b_rows_adjacent,
                             const B& b, Acc (&sums)[kEach][kEach]) {
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  for (int64_t first = 0; first < depth; first += Slabs<Acc>::kDepth) {
    fill_slab<Acc>(slabs.a, first, depth, a_rows_adjacent, a);
    fill_slab<Acc>(slabs.b, first, depth, b_rows_adjacent, b);
    PYMM_SYNC();
    PYMM_UNROLL_BY(4)
    for (int k = 0; k < Slabs<Acc>::kDepth; ++k) {
      PYMM_UNROLL
      for (int i = 0; i < kEach; ++i) {
        PYMM_UNROLL
        for (int j = 0; j < kEach; ++j) sums[i][j] += slabs.a[k][ty + i * kSide] * slabs.b[k][tx + j * kSide];
      }
    }
    PYMM_SYNC();
  }
}

// Rows of a matrix from some row on, as an operand: 0 beyond its last row.
template <class Acc, class T>
struct Rows {
  const T* p;
  int64_t rows, row_stride, k_stride;
  PYMM_DEVICE Acc operator()(int64_t row, int64_t k) const {
    return row < rows ? Acc(to_float(p[row * row_stride + k * k_stride])) : Acc(0);
  }
};

// C[b, i, j] = row_scale[i] * column_scale[j] * sum_k A[b, i, k] * depth_scale[k] * B[b, j, k], or that is added to
// what C holds; a null scale is 1.
struct Product {
  int64_t rows, columns, depth;
  int64_t a_batch, a_row, a_k, b_batch, b_row, b_k, c_batch;
  bool add = false;
};

template <class A, class B, class Out, class Acc>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kSide* kSide,
                               kBlocksAtOnce<Acc>) void product_kernel(const A* a, const B* b, Out* c,
                                                                       const Acc* row_scale, const Acc* column_scale,
                                                                       const Acc* depth_scale, Product p) {
  PYMM_SHARED Slabs<Acc> slabs;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int64_t batch = blockIdx.z, row = static_cast<int64_t>(blockIdx.y) * kTile;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kTile;
  const Rows<Acc, A> of_a{a + batch * p.a_batch + row * p.a_row, p.rows - row, p.a_row, p.a_k};
  const Rows<Acc, B> of_b{b + batch * p.b_batch + column * p.b_row, p.columns - column, p.b_row, p.b_k};
  const auto scaled = [&](int64_t r, int64_t k) {
    return depth_scale != nullptr ? of_b(r, k) * depth_scale[batch * p.depth + k] : of_b(r, k);
  };
  Acc sums[kEach][kEach] = {};
  add_product(slabs, p.depth, p.a_row == 1, of_a, p.b_row == 1, scaled, sums);
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int64_t r = row + ty + i * kSide;
    if (r >= p.rows) continue;
    const Acc scale = row_scale != nullptr ? row_scale[batch * p.rows + r] : Acc(1);
    PYMM_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int64_t s = column + tx + j * kSide;
      if (s >= p.columns) continue;
      Acc value = sums[i][j] * scale * (column_scale != nullptr ? column_scale[batch * p.columns + s] : Acc(1));
      Out* target = c + batch * p.c_batch + r * p.columns + s;
      if (p.add) value += to_float(*target);
      *target = from_float(value, Out{});
    }
  }
}

inline dim3 tiles(int64_t rows, int64_t columns, int64_t batch = 1) {
  return dim3(static_cast<unsigned>(ceil_div(columns, kTile)), static_cast<unsigned>(ceil_div(rows, kTile)),
              static_cast<unsigned>(batch));
}

}  // namespace pymm::cuda
