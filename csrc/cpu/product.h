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

// What one thread does as fast as several can be woken: products, and elements packed.
constexpr int64_t kSmallProduct = 1 << 19, kSmallPacking = 1 << 15;

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
    const int64_t chunks = ceil_div(k, kDepth), tasks = ceil_div(n, kColumns) * chunks;
    parallel_ranges(
        tasks, max_of(1, kSmallPacking / (kColumns * min_of(max_of(1, k), kDepth))), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            const int64_t row = task / chunks * kColumns, first = task % chunks * kDepth;
            pack(row, min_of(kColumns, n_ - row), first, min_of(kDepth, k_ - first), chunk(task / chunks, first));
          }
        });
  }
  PackedB(const Gemm& g, int64_t n, int64_t k, const Matrix& b)
      : PackedB(g, n, k, [&](int64_t row, int64_t rows, int64_t first, int64_t count, void* panels) {
          b.pack_b(g, row, rows, first, count, panels);
        }) {}

  int64_t blocks() const { return ceil_div(n_, kColumns); }
  int64_t columns(int64_t block) const { return min_of(kColumns, n_ - block * kColumns); }
  int64_t rows() const { return n_; }
  int64_t depth() const { return k_; }
  const Gemm& gemm() const { return gemm_; }
  void* chunk(int64_t block, int64_t first_k) const {
    return memory_.as<char>(block * block_bytes_ + first_k / kDepth * chunk_bytes());
  }

 private:
  int64_t chunk_bytes() const { return round_up(gemm_.b_bytes(kColumns, min_of(k_, kDepth)), 64); }
  int64_t bytes_per_block() const {
    return k_ / kDepth * chunk_bytes() + round_up(gemm_.b_bytes(kColumns, k_ % kDepth), 64);
  }

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
        memory_(k / kDepth * chunk_bytes_ + round_up(g.a_bytes(rows, k % kDepth), 64)) {}

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

// How C is cut into tasks: `rows` groups of register tiles times `columns` groups of blocks of B, of even sizes.
struct Split {
  int64_t rows, columns;

  // The fewest and shortest rounds over the threads. A task costs its products, the panels of B that pass it (as much
  // as some rows more) and the packing of its rows (as much as some columns more).
  Split(int64_t row_tiles, int64_t tile_rows, int64_t blocks, int64_t threads) {
    const int64_t fewest = ceil_div(row_tiles, kRows / tile_rows);
    rows = fewest;
    columns = 1;
    for (int64_t c = 1, best = INT64_MAX; c <= min_of(blocks, threads); ++c) {
      const int64_t rounds = ceil_div(fewest * c, threads);
      const int64_t r = min_of(row_tiles, threads * rounds / c);
      const int64_t cost = rounds * (ceil_div(row_tiles, r) * tile_rows + 8) * (ceil_div(blocks, c) * kColumns + 32);
      if (cost >= best) continue;
      best = cost;
      rows = r;
      columns = c;
    }
  }
};

// For every block of C = A . B^T: epilogue(row, rows, column, columns, accumulators, ldc). K must be positive.
// `pack_a(row, rows, k, count, panels)` packs rows of A. Must not throw.
template <class Acc, PackFunction PackRows, class Epilogue>
void blocked_product(int64_t m, const PackedB& b, PackRows&& pack_a, Epilogue&& epilogue) {
  if (m == 0) return;
  const int64_t tile_rows = b.gemm().mr, tiles = ceil_div(m, tile_rows), blocks = b.blocks();
  const bool small = m * b.rows() * b.depth() < kSmallProduct;
  const Split split(tiles, tile_rows, blocks, small ? 1 : thread_count());
  const int64_t tasks = split.rows * split.columns;
  parallel_ranges(tasks, small ? tasks : 1, [&](int64_t begin, int64_t end) {
    PackedA a(b.gemm(), b.depth(), ceil_div(tiles, split.rows) * tile_rows);
    Scratch tile(kRows * kColumns * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / split.columns, group = task % split.columns;
      const int64_t row = tiles * part / split.rows * tile_rows;
      const int64_t rows = min_of(m, tiles * (part + 1) / split.rows * tile_rows) - row;
      a.fill(row, rows, pack_a);
      for (int64_t block = blocks * group / split.columns; block < blocks * (group + 1) / split.columns; ++block) {
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
