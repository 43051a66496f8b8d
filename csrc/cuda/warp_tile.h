// One block's tile of a matrix product whose sums lie as the tensor cores leave them.
//
// Parallel: 256 threads, 8 warps as 2 x 4, each with MI x NI fragments of 16 x 8 sums. bf16 and f16 are multiplied by
// tensor cores, from a ring of three slabs in shared memory that asynchronous copies fill ahead; float32 and float64
// by the float units, in their own precision, from one slab. Both leave the sums where `mma` leaves them
// (tensor_core.h), so one epilogue serves all types. Ragged edges: rows and depth beyond the end are zeros.
#pragma once

#include "cuda/tensor_tile.h"

namespace pymm::cuda {

constexpr int kTileThreads = 256;

template <class T>
constexpr bool on_tensor_cores = std::is_same_v<T, bf16> || std::is_same_v<T, f16>;

// A matrix of `rows` rows, whose element (row, k) is at row * stride + k, or, transposed, at k * stride + row.
template <class T>
struct Operand {
  const T* data;
  int64_t rows, stride;

  // Whether 16 bytes at once can be read.
  PYMM_DEVICE bool aligned() const {
    return stride * sizeof(T) % kChunk == 0 && reinterpret_cast<uintptr_t>(data) % kChunk == 0;
  }
};

// The second operand may be of a narrower type where the float units multiply, which widen what they read.
template <class T_, int MI_, int NI_, class TB_ = T_>
struct Tile {
  using T = T_;
  using TB = TB_;
  using Acc = Accumulator<T>;
  static constexpr int MI = MI_, NI = NI_, kRows = 2 * MI * 16, kColumns = 4 * NI * 8;
  static constexpr int kDepth = on_tensor_cores<T> ? 32 : 16, kStages = 3;
  // Bytes of a slab in either of its two layouts, of which the padded one is the larger.
  static constexpr int kSlabA = static_cast<int>(Layout<32>::kBytes<kRows>);
  static constexpr int kSlabB = static_cast<int>(Layout<32>::kBytes<kColumns>);
  // Two spare columns: threads that walk down a slab hit different banks, and pairs stay aligned.
  static constexpr int kPitchA = kRows + 2, kPitchB = kColumns + 2;
  static constexpr int kBytes =
      on_tensor_cores<T> ? kStages * (kSlabA + kSlabB) : kDepth * (kPitchA + kPitchB) * static_cast<int>(sizeof(Acc));
  static_assert(NI % 2 == 0 && (std::is_same_v<T, TB> || !on_tensor_cores<T>));

  Acc sums[MI][NI][4];

  // Of this thread's sums[m][n][e]: the row in the tile, for half = e / 2; the column, for j = e % 2.
  PYMM_DEVICE static int row(int m, int half) { return warp_row() * MI * 16 + m * 16 + half * 8 + lane_id() / 4; }
  PYMM_DEVICE static int column(int n, int j) { return warp_column() * NI * 8 + n * 8 + lane_id() % 4 * 2 + j; }
  PYMM_DEVICE static int warp_row() { return static_cast<int>(threadIdx.x) / kWarp / 4; }
  PYMM_DEVICE static int warp_column() { return static_cast<int>(threadIdx.x) / kWarp % 4; }

  // f(m, n, half, j, sum) for each of the thread's sums.
  template <class F>
  PYMM_DEVICE void each(F&& f) {
    PYMM_UNROLL
    for (int m = 0; m < MI; ++m) {
      PYMM_UNROLL
      for (int n = 0; n < NI; ++n) {
        PYMM_UNROLL
        for (int e = 0; e < 4; ++e) f(m, n, e / 2, e % 2, sums[m][n][e]);
      }
    }
  }

  // sums = a[row..] . b[column..]^T; `shared` holds kBytes, which are free again afterwards.
  template <bool a_transposed = false, bool b_transposed = false>
  PYMM_DEVICE void multiply(const Operand<T>& a, int64_t row, const Operand<TB>& b, int64_t column, int64_t depth,
                            unsigned char* shared) {
    each([](int, int, int, int, Acc& sum) { sum = 0; });
    if constexpr (on_tensor_cores<T>) {
      multiply_on_tensor_cores<a_transposed, b_transposed>(a, row, b, column, depth, shared);
    } else {
      multiply_on_float_units<a_transposed, b_transposed>(a, row, b, column, depth, shared);
    }
  }

 private:
  // A slab of `size` rows has the depth along its rows or, transposed, across them.
  template <bool transposed, int size>
  PYMM_DEVICE static void fill(const Operand<T>& from, bool aligned, int64_t first, int64_t k, int64_t depth,
                               unsigned char* slab) {
    constexpr int kChunks = size * kDepth / 8, kWidth = transposed ? size : kDepth, kAcross = kWidth / 8;
    static_assert(kChunks % kTileThreads == 0);
    PYMM_UNROLL
    for (int i = 0; i < kChunks / kTileThreads; ++i) {
      const int at = i * kTileThreads + static_cast<int>(threadIdx.x), r = at / kAcross, chunk = at % kAcross;
      const int64_t outer = (transposed ? k : first) + r, inner = (transposed ? first : k) + chunk * 8;
      const int64_t left = outer < (transposed ? depth : from.rows) ? (transposed ? from.rows : depth) - inner : 0;
      const int count = left >= 8 ? 8 : left > 0 ? static_cast<int>(left) : 0;
      const T* const source = count > 0 ? from.data + outer * from.stride + inner : from.data;
      unsigned char* const target = slab + Layout<kWidth>::at(r, chunk);
      if (aligned) {
        copy_async(target, source, count * 2);
      } else {
        T* const values = reinterpret_cast<T*>(target);
        PYMM_UNROLL
        for (int j = 0; j < 8; ++j) values[j] = j < count ? source[j] : from_float(0.0f, T{});
      }
    }
  }

  template <bool a_transposed, bool b_transposed>
  PYMM_DEVICE void multiply_on_tensor_cores(const Operand<T>& a, int64_t row, const Operand<T>& b, int64_t column,
                                            int64_t depth, unsigned char* shared) {
    const int slabs = static_cast<int>(ceil_div(depth, kDepth));
    const bool a_aligned = a.aligned(), b_aligned = b.aligned();
    const auto load = [&](int slab) {
      if (slab < slabs) {
        unsigned char* const to = shared + slab % kStages * (kSlabA + kSlabB);
        const int64_t k = static_cast<int64_t>(slab) * kDepth;
        fill<a_transposed, kRows>(a, a_aligned, row, k, depth, to);
        fill<b_transposed, kColumns>(b, b_aligned, column, k, depth, to + kSlabA);
      }
      commit_copies();
    };
    for (int slab = 0; slab + 1 < kStages; ++slab) load(slab);
    for (int slab = 0; slab < slabs; ++slab) {
      wait_for_copies<kStages - 2>();
      PYMM_SYNC();  // this slab is there for all, and all have left the one that is filled next
      load(slab + kStages - 1);
      const unsigned char* const slab_a = shared + slab % kStages * (kSlabA + kSlabB);
      const unsigned char* const slab_b = slab_a + kSlabA;
      PYMM_UNROLL
      for (int step = 0; step < kDepth / 16; ++step) {
        uint32_t left[MI][4], right[NI][2];
        PYMM_UNROLL
        for (int m = 0; m < MI; ++m) {
          const int first = warp_row() * MI * 16 + m * 16;
          if constexpr (a_transposed) {
            load_a_columns<kRows>(left[m], slab_a, step * 16, first / 16);
          } else {
            load_a<kDepth>(left[m], slab_a, first, step);
          }
        }
        PYMM_UNROLL
        for (int n = 0; n < NI; n += 2) {
          const int first = warp_column() * NI * 8 + n * 8;
          uint32_t both[4];
          if constexpr (b_transposed) {
            load_b_rows<kColumns>(both, slab_b, step * 16, first / 16);
          } else {
            load_b<kDepth>(both, slab_b, first, step);
          }
          right[n][0] = both[0], right[n][1] = both[1], right[n + 1][0] = both[2], right[n + 1][1] = both[3];
        }
        PYMM_UNROLL
        for (int m = 0; m < MI; ++m) {
          PYMM_UNROLL
          for (int n = 0; n < NI; ++n) mma<T>(sums[m][n], left[m], right[n]);
        }
      }
    }
    wait_for_copies<0>();
    PYMM_SYNC();
  }

  // A slab in the accumulator's type, the depth across its rows.
  template <bool transposed, int size, int pitch, class From>
  PYMM_DEVICE static void fill_floats(const Operand<From>& from, int64_t first, int64_t k, int64_t depth, Acc* slab) {
    PYMM_UNROLL_BY(2)
    for (int i = static_cast<int>(threadIdx.x); i < size * kDepth; i += kTileThreads) {
      const int r = transposed ? i % size : i / kDepth, d = transposed ? i / size : i % kDepth;
      const bool inside = first + r < from.rows && k + d < depth;
      const int64_t at = transposed ? (k + d) * from.stride + first + r : (first + r) * from.stride + k + d;
      slab[d * pitch + r] = inside ? Acc(to_float(from.data[at])) : Acc(0);
    }
  }

  template <bool a_transposed, bool b_transposed>
  PYMM_DEVICE void multiply_on_float_units(const Operand<T>& a, int64_t row, const Operand<TB>& b, int64_t column,
                                           int64_t depth, unsigned char* shared) {
    Acc* const slab_a = reinterpret_cast<Acc*>(shared);
    Acc* const slab_b = slab_a + kDepth * kPitchA;
    for (int64_t k = 0; k < depth; k += kDepth) {
      fill_floats<a_transposed, kRows, kPitchA>(a, row, k, depth, slab_a);
      fill_floats<b_transposed, kColumns, kPitchB>(b, column, k, depth, slab_b);
      PYMM_SYNC();
      PYMM_UNROLL_BY(2)
      for (int d = 0; d < kDepth; ++d) {
        Acc left[MI][2], right[NI][2];
        PYMM_UNROLL
        for (int m = 0; m < MI; ++m) {
          for (int half = 0; half < 2; ++half) left[m][half] = slab_a[d * kPitchA + Tile::row(m, half)];
        }
        PYMM_UNROLL
        for (int n = 0; n < NI; ++n) {
          for (int j = 0; j < 2; ++j) right[n][j] = slab_b[d * kPitchB + Tile::column(n, j)];
        }
        each([&](int m, int n, int half, int j, Acc& sum) { sum += left[m][half] * right[n][j]; });
      }
      PYMM_SYNC();
    }
  }
};

}  // namespace pymm::cuda
