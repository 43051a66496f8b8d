// C = A . B^T in blocks, with an epilogue that reads each block of accumulators while it is in cache.
//
// Parallel: over blocks of C. On chip: a block of A (kRows x kDepth) in L2 with the panels of B that pass it, C in
// L1/L2. Bytes: A and B are read and packed once; nothing of C is written but what the epilogue writes. Ragged edges
// are padded inside the panels (simd/gemm.h), so the epilogue sees valid rows and columns only. Every element of C is
// summed over K in one fixed order, whatever the number of threads.
#pragma once

#include <type_traits>

#include "cpu/host.h"
#include "cpu/simd/gemm.h"

namespace pymm {

constexpr int64_t kRows = 96;      // rows of A in one task; a multiple of every register tile's rows
constexpr int64_t kColumns = 128;  // columns of C between two epilogues
constexpr int64_t kDepth = 512;    // K between two visits of the accumulators

// A matrix with element strides, packed as it is (`accumulators` false) or from float/double (`accumulators` true).
struct Matrix {
  const void* data;
  int64_t row_stride, k_stride;
  int64_t element_bytes;
  bool accumulators = false;

  const void* at(int64_t row, int64_t k) const {
    return static_cast<const char*>(data) + (row * row_stride + k * k_stride) * element_bytes;
  }
  void pack_a(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) const {
    (accumulators ? g.pack_a_accumulators : g.pack_a)(at(row, k), row_stride, k_stride, rows, count, panels);
  }
  void pack_b(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) const {
    (accumulators ? g.pack_b_accumulators : g.pack_b)(at(row, k), row_stride, k_stride, rows, count, panels);
  }
};

template <class Pack>
concept PackFunction = !std::is_same_v<std::remove_cvref_t<Pack>, Matrix>;

template <class T>
Matrix matrix(const T* data, int64_t row_stride, int64_t k_stride) {
  return Matrix{data, row_stride, k_stride, sizeof(T)};
}
template <class Acc>
Matrix accumulator_matrix(const Acc* data, int64_t row_stride, int64_t k_stride) {
  return Matrix{data, row_stride, k_stride, sizeof(Acc), true};
}

// B packed whole: blocks of kColumns rows, each cut along K into chunks of kDepth.
class PackedB {
 public:
  // pack(row, rows, k, count, panels) fills the panels of one chunk.
  template <PackFunction Pack>
  PackedB(const Gemm& g, int64_t n, int64_t k, Pack&& pack)
      : gemm_(g), n_(n), k_(k), block_bytes_(bytes_per_block()), memory_(block_bytes_ * ceil_div(n, kColumns)) {
    const int64_t blocks = ceil_div(n, kColumns);
    parallel_tasks(blocks, [&](int64_t block) {
      const int64_t row = block * kColumns, rows = min_of(kColumns, n_ - row);
      for (int64_t first = 0; first < k_; first += kDepth) {
        pack(row, rows, first, min_of(kDepth, k_ - first), chunk(block, first));
      }
    });
  }
  PackedB(const Gemm& g, int64_t n, int64_t k, const Matrix& b)
      : PackedB(g, n, k, [&](int64_t row, int64_t rows, int64_t first, int64_t count, void* panels) {
          b.pack_b(g, row, rows, first, count, panels);
        }) {}

  int64_t blocks() const { return ceil_div(n_, kColumns); }
  int64_t columns(int64_t block) const { return min_of(kColumns, n_ - block * kColumns); }
  int64_t depth() const { return k_; }
  const Gemm& gemm() const { return gemm_; }
  void* chunk(int64_t block, int64_t first_k) const {
    return memory_.as<char>(block * block_bytes_ + first_k / kDepth * chunk_bytes());
  }

 private:
  int64_t chunk_bytes() const { return round_up(gemm_.b_bytes(kColumns, kDepth), 64); }
  int64_t bytes_per_block() const { return ceil_div(k_, kDepth) * chunk_bytes(); }

  const Gemm& gemm_;
  int64_t n_, k_, block_bytes_;
  Scratch memory_;
};

// One thread's packed block of A: up to kRows rows, all of K.
class PackedA {
 public:
  PackedA(const Gemm& g, int64_t k, int64_t rows = kRows)
      : gemm_(g),
        k_(k),
        chunk_bytes_(round_up(g.a_bytes(rows, min_of(k, kDepth)), 64)),
        memory_(chunk_bytes_ * max_of(1, ceil_div(k, kDepth))) {}

  template <PackFunction Pack>
  void fill(int64_t row, int64_t rows, Pack&& pack) {
    rows_ = rows;
    for (int64_t first = 0; first < k_; first += kDepth)
      pack(row, rows, first, min_of(kDepth, k_ - first), chunk(first));
  }
  void fill(int64_t row, int64_t rows, const Matrix& a) {
    fill(row, rows, [&](int64_t r, int64_t count, int64_t k, int64_t depth, void* panels) {
      a.pack_a(gemm_, r, count, k, depth, panels);
    });
  }
  // C (rows x columns of the block, `ldc` apart) = A . B[block]^T
  void multiply(const PackedB& b, int64_t block, void* c, int64_t ldc) const {
    for (int64_t first = 0; first < k_; first += kDepth) {
      gemm_.multiply(rows_, b.columns(block), min_of(kDepth, k_ - first), chunk(first), b.chunk(block, first), c, ldc,
                     first > 0);
    }
  }

 private:
  void* chunk(int64_t first_k) const { return memory_.as<char>(first_k / kDepth * chunk_bytes_); }

  const Gemm& gemm_;
  int64_t k_, chunk_bytes_, rows_ = 0;
  Scratch memory_;
};

// For every block of C = A . B^T: epilogue(row, rows, column, columns, accumulators, ldc). K must be positive.
// `pack_a(row, rows, k, count, panels)` packs rows of A. Must not throw.
template <class Acc, PackFunction PackRows, class Epilogue>
void blocked_product(int64_t m, const PackedB& b, PackRows&& pack_a, Epilogue&& epilogue) {
  const int64_t row_blocks = ceil_div(m, kRows);
  // Few row blocks (a batch of one): split the columns too, at the price of packing A once per group.
  const int64_t groups = row_blocks >= thread_count() ? 1 : min_of(b.blocks(), ceil_div(thread_count(), row_blocks));
  parallel_ranges(row_blocks * groups, 1, [&](int64_t begin, int64_t end) {
    PackedA a(b.gemm(), b.depth());
    Scratch tile(kRows * kColumns * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task / groups * kRows, rows = min_of(kRows, m - row);
      a.fill(row, rows, pack_a);
      const int64_t group = task % groups;
      for (int64_t block = b.blocks() * group / groups; block < b.blocks() * (group + 1) / groups; ++block) {
        a.multiply(b, block, tile.as<Acc>(), kColumns);
        epilogue(row, rows, block * kColumns, b.columns(block), tile.as<Acc>(), kColumns);
      }
    }
  });
}
template <class Acc, class Epilogue>
void blocked_product(int64_t m, const Matrix& a, const PackedB& b, Epilogue&& epilogue) {
  blocked_product<Acc>(
      m, b,
      [&](int64_t row, int64_t rows, int64_t k, int64_t count, void* panels) {
        a.pack_a(b.gemm(), row, rows, k, count, panels);
      },
      epilogue);
}

}  // namespace pymm
