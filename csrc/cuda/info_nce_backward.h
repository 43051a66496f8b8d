// The gradient of InfoNCE's logits, tile by tile.
#pragma once

#include "cuda/info_nce_forward.h"

namespace pymm::cuda {

// The cosines of the pairs, one block per pair.
template <class T>
PYMM_GLOBAL void pairs_kernel(const T* x, const T* y, const Accumulator<T>* inv_x, const Accumulator<T>* inv_y,
                              int64_t d, Accumulator<T>* out) {
  const int64_t row = blockIdx.x;
  Accumulator<T> sum = 0;
  for (int64_t i = threadIdx.x; i < d; i += kRowThreads) sum += to_float(x[row * d + i]) * to_float(y[row * d + i]);
  sum = block_sum<kRowThreads>(sum);
  if (threadIdx.x == 0) out[row] = sum * inv_x[row] * inv_y[row];
}

// What the gradient of the logits needs beside them; of the rows (a) and, unless null, of the columns (c).
template <class Acc>
struct Targets {
  const double *lse_a, *lse_c, *teacher_lse_a, *teacher_lse_c;
  const Acc *dlosses, *share;    // of the pairs; a null share is 1
  const double* sum_of_cosines;  // of the pairs
  double weight, hard, soft, even_a, even_c;
};

// exp(s - lse): a log-sum-exp near 100 has lost in float32 what the probability needs.
template <class Acc>
PYMM_DEVICE Acc probability(Acc s, double lse) {
  const Acc near = static_cast<Acc>(lse);
  return exp((s - near) - static_cast<Acc>(lse - static_cast<double>(near)));
}

// G = dlogits / (||a|| ||c||), and a tile's sum of dlogits (cosine - center) for the gradient of the scale: all dlogits
// of a row sum to 0, and a center near the cosines of the pairs keeps the rounding of probabilities near 1 out of it.
template <class T, bool teacher>
PYMM_GLOBAL PYMM_LAUNCH_BOUNDS(kTileThreads, teacher ? 1 : kBlocksAtOnce<T>) void gradient_kernel(
    LogitBlock<T> b, Targets<Accumulator<T>> t, GradientBlock<T> g, Accumulator<T>* parts) {
  using Acc = Accumulator<T>;
  using Sums = LogitTile<T, teacher>;
  PYMM_DYNAMIC_SHARED(shared);
  const int64_t row = g.first_a + static_cast<int64_t>(blockIdx.y) * Sums::kRows;
  const int64_t column = g.first_c + static_cast<int64_t>(blockIdx.x) * Sums::kColumns;
  const Acc scale = *b.scale, center = static_cast<Acc>(*t.sum_of_cosines / static_cast<double>(b.a.rows));
  const bool touches = b.touches(row, Sums::kRows, column, Sums::kColumns);
  Sums student;
  std::conditional_t<teacher, Sums, int> soft;
  student.multiply(b.a, row, b.c, column, b.depth, shared);
  if constexpr (teacher) soft.multiply(b.teacher_a, row, b.teacher_c, column, b.depth, shared);
  Acc of_scale = 0;
  student.each([&](int m, int n, int half, int j, Acc& sum) {
    const int64_t r = row + Sums::row(m, half), c = column + Sums::column(n, j);
    if (r >= g.end_a || c >= g.end_c) return;
    const Acc factor = b.inv_a[r] * b.inv_c[c], s = sum * (b.inv_a[r] * scale) * b.inv_c[c];
    const bool same = touches && b.same(r, c);
    Acc taught = 0;
    if constexpr (teacher) {
      taught = soft.sums[m][n][half * 2 + j] * (b.teacher_inv_a[r] * scale) * b.teacher_inv_c[c];
    }
    const auto difference = [&](int64_t i, const double* lse, const double* teacher_lse, double even) {
      Acc d = probability(s, lse[i]) - static_cast<Acc>(even);
      if constexpr (teacher) d -= static_cast<Acc>(t.soft) * probability(taught, teacher_lse[i]);
      if (same) d -= static_cast<Acc>(t.hard) * (t.share != nullptr ? t.share[i] : Acc(1));
      return d * t.dlosses[i];
    };
    Acc d = difference(r, t.lse_a, t.teacher_lse_a, t.even_a);
    if (t.lse_c != nullptr) d += difference(c, t.lse_c, t.teacher_lse_c, t.even_c);
    d *= static_cast<Acc>(t.weight);
    of_scale += d * (sum * factor - center);
    g.set(r, c, d * factor);
  });
  of_scale = block_sum<kTileThreads>(of_scale);
  if (threadIdx.x == 0) parts[static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x] = of_scale;
}

}  // namespace pymm::cuda
