// The forward kernels of InfoNCE: statistics of rows and columns from one pass of tiles, and the loss from them.
#pragma once

#include <limits>

#include "cuda/pair_gradient.h"

namespace pymm::cuda {

// A block of the logits: rows meet candidates, s_ij = scale inv_a[i] inv_c[j] <a_i, c_j>; the teacher's likewise.
template <class T>
struct LogitBlock {
  using Acc = Accumulator<T>;
  Operand<T> a, c, teacher_a, teacher_c;
  const Acc *inv_a, *inv_c, *teacher_inv_a, *teacher_inv_c, *scale;
  int64_t depth;
  bool pairs;          // whether the pairs are in it: row i and column j are positives where i = j or, with ids,
  const int64_t* ids;  // where ids[i] = ids[j]; null without ids

  PYMM_DEVICE bool same(int64_t row, int64_t column) const {
    return ids != nullptr ? ids[row] == ids[column] : row == column;
  }
  // Whether positives may be in a tile.
  PYMM_DEVICE bool touches(int64_t row, int rows, int64_t column, int columns) const {
    return pairs && (ids != nullptr || (row < column + columns && column < row + rows));
  }
};

template <class Acc>
constexpr Acc kNothing = -std::numeric_limits<Acc>::infinity();

// A maximum and what to subtract from it: nothing has been seen where it is -inf.
template <class Acc>
PYMM_DEVICE Acc shift_of(Acc top) {
  return top == kNothing<Acc> ? Acc(0) : top;
}

// Of one row over its candidates, or a part of them: the largest logit and the sum of exp(logit - largest); the sums of
// the logits of its positives and of all; the teacher's largest and sum, and the sum of our logits with its weights.
template <class Acc, bool teacher>
struct Statistics {
  static constexpr int kCount = teacher ? 7 : 4;
  Acc top = kNothing<Acc>, total = 0, positive = 0, all = 0;
  Acc teacher_top = kNothing<Acc>, teacher_total = 0, soft = 0;

  PYMM_DEVICE void add(const Statistics& other) {
    const Acc higher = top > other.top ? top : other.top, shift = shift_of(higher);
    total = total * exp(top - shift) + other.total * exp(other.top - shift);
    top = higher;
    positive += other.positive;
    all += other.all;
    if constexpr (teacher) {
      const Acc highest = teacher_top > other.teacher_top ? teacher_top : other.teacher_top, from = shift_of(highest);
      const Acc mine = exp(teacher_top - from), its = exp(other.teacher_top - from);
      teacher_total = teacher_total * mine + other.teacher_total * its;
      soft = soft * mine + other.soft * its;
      teacher_top = highest;
    }
  }
  template <class V>
  PYMM_DEVICE void load(const V* from, int64_t pitch) {
    top = from[0], total = from[pitch], positive = from[2 * pitch], all = from[3 * pitch];
    if constexpr (teacher) teacher_top = from[4 * pitch], teacher_total = from[5 * pitch], soft = from[6 * pitch];
  }
  PYMM_DEVICE void save(Acc* to, int64_t pitch) const {
    to[0] = top, to[pitch] = total, to[2 * pitch] = positive, to[3 * pitch] = all;
    if constexpr (teacher) to[4 * pitch] = teacher_top, to[5 * pitch] = teacher_total, to[6 * pitch] = soft;
  }
};

template <class T, bool teacher>
using LogitTile = std::conditional_t<teacher, SlimTile<T>, PlainTile<T>>;

// The dynamic shared memory of the kernel below: the product's, and statistics that warps exchange.
template <class T, bool teacher>
constexpr int kStatisticsBytes =
    LogitTile<T, teacher>::kBytes +
    4 * Statistics<float, teacher>::kCount * LogitTile<T, teacher>::kColumns * static_cast<int>(sizeof(Accumulator<T>));

// `of_rows` (groups of columns, statistics, rows) and, unless null, `of_columns` (groups of rows, statistics, columns).
template <class T, bool teacher>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads, 1) void statistics_kernel(LogitBlock<T> b, Accumulator<T>* of_rows,
                                                                       Accumulator<T>* of_columns) {
  using Acc = Accumulator<T>;
  using Sums = LogitTile<T, teacher>;
  using Stats = Statistics<Acc, teacher>;
  constexpr int MI = Sums::MI, NI = Sums::NI, kRows = Sums::kRows, kColumns = Sums::kColumns;
  static_assert(kRows <= kColumns && kColumns <= kTileThreads);
  PYMM_DYNAMIC_SHARED(shared);
  Acc* const exchanged = reinterpret_cast<Acc*>(shared + Sums::kBytes);
  const int thread = static_cast<int>(threadIdx.x), lane = lane_id();
  const int64_t tiles_a = ceil_div(b.a.rows, kRows), tiles_c = ceil_div(b.c.rows, kColumns);
  const int64_t begin_a = tiles_a * blockIdx.y / gridDim.y, end_a = tiles_a * (blockIdx.y + 1) / gridDim.y;
  const int64_t begin_c = tiles_c * blockIdx.x / gridDim.x, end_c = tiles_c * (blockIdx.x + 1) / gridDim.x;
  of_rows += static_cast<int64_t>(blockIdx.x) * Stats::kCount * b.a.rows;
  if (of_columns != nullptr) of_columns += static_cast<int64_t>(blockIdx.y) * Stats::kCount * b.c.rows;
  const Acc scale = *b.scale;
  Sums student;
  std::conditional_t<teacher, Sums, int> soft;

  for (int64_t tile_a = begin_a; tile_a < end_a; ++tile_a) {
    const int64_t row = tile_a * kRows;
    Stats rows[MI][2];
    for (int64_t tile_c = begin_c; tile_c < end_c; ++tile_c) {
      const int64_t column = tile_c * kColumns;
      // To logits; what is outside counts as -inf.
      const auto scaled = [&](Sums& s, const Acc* inv_a, const Acc* inv_c) {
        s.each([&](int m, int n, int half, int j, Acc& sum) {
          const int64_t r = row + Sums::row(m, half), c = column + Sums::column(n, j);
          const bool inside = r < b.a.rows && c < b.c.rows;
          sum = inside ? sum * (inv_a[r] * scale) * inv_c[c] : kNothing<Acc>;
        });
      };
      student.multiply(b.a, row, b.c, column, b.depth, shared);
      scaled(student, b.inv_a, b.inv_c);
      if constexpr (teacher) {
        soft.multiply(b.teacher_a, row, b.teacher_c, column, b.depth, shared);
        scaled(soft, b.teacher_inv_a, b.teacher_inv_c);
      }
      const bool touches = b.touches(row, kRows, column, kColumns);
      const auto positive = [&](int m, int n, int half, int j, Acc s) {
        const int64_t r = row + Sums::row(m, half), c = column + Sums::column(n, j);
        return s != kNothing<Acc> && b.same(r, c) ? s : Acc(0);
      };
      PYMM_UNROLL
      for (int i = 0; i < MI * 2; ++i) {
        const int m = i / 2, half = i % 2;
        Stats here;
        PYMM_UNROLL
        for (int k = 0; k < NI * 2; ++k) {
          const Acc s = student.sums[m][k / 2][half * 2 + k % 2];
          if (s > here.top) here.top = s;
          if (s != kNothing<Acc>) here.all += s;
          if (touches) here.positive += positive(m, k / 2, half, k % 2, s);
          if constexpr (teacher) {
            const Acc t = soft.sums[m][k / 2][half * 2 + k % 2];
            if (t > here.teacher_top) here.teacher_top = t;
          }
        }
        PYMM_UNROLL
        for (int k = 0; k < NI * 2; ++k) {
          const Acc s = student.sums[m][k / 2][half * 2 + k % 2];
          here.total += exp(s - shift_of(here.top));
          if constexpr (teacher) {
            const Acc weight = exp(soft.sums[m][k / 2][half * 2 + k % 2] - shift_of(here.teacher_top));
            here.teacher_total += weight;
            if (weight > Acc(0)) here.soft += weight * s;
          }
        }
        rows[m][half].add(here);
      }
      if (of_columns == nullptr) continue;
      PYMM_UNROLL
      for (int k = 0; k < NI * 2; ++k) {
        const int n = k / 2, j = k % 2;
        Stats here;
        PYMM_UNROLL
        for (int i = 0; i < MI * 2; ++i) {
          const Acc s = student.sums[i / 2][n][i % 2 * 2 + j];
          if (s > here.top) here.top = s;
          if (s != kNothing<Acc>) here.all += s;
          if (touches) here.positive += positive(i / 2, n, i % 2, j, s);
          if constexpr (teacher) {
            const Acc t = soft.sums[i / 2][n][i % 2 * 2 + j];
            if (t > here.teacher_top) here.teacher_top = t;
          }
        }
        here.top = warp_max<kWarp, 4>(here.top);
        if constexpr (teacher) here.teacher_top = warp_max<kWarp, 4>(here.teacher_top);
        PYMM_UNROLL
        for (int i = 0; i < MI * 2; ++i) {
          const Acc s = student.sums[i / 2][n][i % 2 * 2 + j];
          here.total += exp(s - shift_of(here.top));
          if constexpr (teacher) {
            const Acc weight = exp(soft.sums[i / 2][n][i % 2 * 2 + j] - shift_of(here.teacher_top));
            here.teacher_total += weight;
            if (weight > Acc(0)) here.soft += weight * s;
          }
        }
        here.total = warp_sum<kWarp, 4>(here.total);
        here.all = warp_sum<kWarp, 4>(here.all);
        if (touches) here.positive = warp_sum<kWarp, 4>(here.positive);
        if constexpr (teacher) {
          here.teacher_total = warp_sum<kWarp, 4>(here.teacher_total);
          here.soft = warp_sum<kWarp, 4>(here.soft);
        }
        if (lane < 4) {
          here.save(exchanged + Sums::warp_row() * Stats::kCount * kColumns + Sums::column(n, j), kColumns);
        }
      }
      PYMM_SYNC();
      if (thread < kColumns && column + thread < b.c.rows) {
        Stats both, upper;
        both.load(exchanged + thread, kColumns);
        upper.load(exchanged + Stats::kCount * kColumns + thread, kColumns);
        both.add(upper);
        Acc* const slot = of_columns + column + thread;
        if (tile_a > begin_a) {
          Stats before;
          before.load(slot, b.c.rows);
          both.add(before);
        }
        both.save(slot, b.c.rows);
      }
      PYMM_SYNC();
    }
    PYMM_UNROLL
    for (int i = 0; i < MI * 2; ++i) {
      Stats& mine = rows[i / 2][i % 2];
      PYMM_UNROLL
      for (int mask = 1; mask < 4; mask *= 2) {
        Stats other;
        other.top = shuffle_xor(mine.top, mask), other.total = shuffle_xor(mine.total, mask);
        other.positive = shuffle_xor(mine.positive, mask), other.all = shuffle_xor(mine.all, mask);
        if constexpr (teacher) {
          other.teacher_top = shuffle_xor(mine.teacher_top, mask);
          other.teacher_total = shuffle_xor(mine.teacher_total, mask), other.soft = shuffle_xor(mine.soft, mask);
        }
        mine.add(other);
      }
      if (lane % 4 == 0) {
        mine.save(exchanged + Sums::warp_column() * Stats::kCount * kRows + Sums::row(i / 2, i % 2), kRows);
      }
    }
    PYMM_SYNC();
    if (thread < kRows && row + thread < b.a.rows) {
      Stats whole;
      for (int part = 0; part < 4; ++part) {
        Stats other;
        other.load(exchanged + part * Stats::kCount * kRows + thread, kRows);
        whole.add(other);
      }
      whole.save(of_rows + row + thread, b.a.rows);
    }
    PYMM_SYNC();
  }
}

// What a side's targets are made of.
struct Mixture {
  double hard, soft;  // the weight of the positives and of the teacher; without what smoothing takes away
  double even[2];     // what smoothing gives to each candidate of a side
};

// losses (n) and lse (sides, then the teacher's sides, n) from the slots of up to two sides, in their order.
template <class Acc, bool teacher>
PYMM_GLOBAL void losses_kernel(const Acc* slots_x, int64_t count_x, const Acc* slots_y, int64_t count_y, int64_t n,
                               const Acc* share, Mixture mixture, Acc* losses, double* lse) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= n) return;
  using Stats = Statistics<double, teacher>;
  const int sides = slots_y != nullptr ? 2 : 1;
  double loss = 0;
  for (int side = 0; side < sides; ++side) {
    const Acc* const slots = side == 0 ? slots_x : slots_y;
    Stats whole;
    for (int64_t slot = 0; slot < (side == 0 ? count_x : count_y); ++slot) {
      Stats part;
      part.load(slots + slot * Stats::kCount * n + i, n);
      whole.add(part);
    }
    const double own = whole.top + log(whole.total);
    lse[side * n + i] = own;
    double target = mixture.hard * whole.positive * (share != nullptr ? double(share[i]) : 1.0);
    target += mixture.even[side] * whole.all;
    if constexpr (teacher) {
      lse[(sides + side) * n + i] = whole.teacher_top + log(whole.teacher_total);
      target += mixture.soft * whole.soft / whole.teacher_total;
    }
    loss += own - target;
  }
  losses[i] = static_cast<Acc>(loss / sides);
}

// 1 / the number of rows with the same id.
template <class Acc>
PYMM_GLOBAL void shares_kernel(const int64_t* ids, int64_t n, Acc* share) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t own = ids[i];
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) count += ids[j] == own;
  share[i] = Acc(1) / static_cast<Acc>(count);
}

}  // namespace pymm::cuda
