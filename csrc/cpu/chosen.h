// Gradients of a sum of weighted cosines of chosen pairs (i, j), sum w cos(x_i, y_j), where the pairs are few.
//
// Parallel over rows. The pairs are grouped by the row whose gradient is wanted, in the order in which they were
// given, so each row is summed by one thread in one order and no thread writes to another's rows.
#pragma once

#include "cpu/host.h"
#include "cpu/simd/rows.h"

namespace pymm {

struct Pair {
  int64_t row, other;
  double weight;
};

// Rows of a matrix of any type, contiguous.
struct RowsOf {
  const void* data;
  DType dtype;
  int64_t rows, d;

  int64_t row_bytes() const { return d * (dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2); }
  const void* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

constexpr double kSmallestNorm = 1e-12;  // divided by, torch.nn.functional.normalize's

// Whether max(||x||, eps) is the norm and not eps, so that it takes part in the gradient.
inline bool norm_is_free(double inverse) { return inverse < (1.0 - 1e-6) / kSmallestNorm; }

// Pairs grouped by their row: those of row r are [start[r], start[r + 1]).
struct Groups {
  Groups(const std::vector<Pair>& pairs, int64_t rows) : start(static_cast<size_t>(rows) + 1), pairs(pairs.size()) {
    for (const Pair& p : pairs) ++start[static_cast<size_t>(p.row) + 1];
    for (size_t r = 1; r < start.size(); ++r) start[r] += start[r - 1];
    std::vector<int64_t> next(start.begin(), start.end() - 1);
    for (const Pair& p : pairs) this->pairs[static_cast<size_t>(next[static_cast<size_t>(p.row)]++)] = p;
  }
  std::vector<int64_t> start;
  std::vector<Pair> pairs;
};

// dx_i = (t - <t, x^> x^) / ||x_i|| with t = sum over the pairs of row i of w y^_j; x^, y^ are the normalized rows.
// Rows without pairs become zero. Acc is the accumulator of both types; dx is of x's type.
template <class Acc>
void chosen_gradient(const Groups& groups, const RowsOf& x, const RowsOf& y, void* dx) {
  const Rows &x_rows = rows_for(x.dtype), &y_rows = rows_for(y.dtype);
  const Rows& acc_rows = rows_for(pymm::dtype_of<Acc>());
  parallel_ranges(x.rows, 64, [&](int64_t begin, int64_t end) {
    Scratch scratch(2 * max_of(1, x.d) * static_cast<int64_t>(sizeof(Acc)));
    Acc *unit = scratch.as<Acc>(), *t = unit + x.d;
    for (int64_t i = begin; i < end; ++i) {
      void* target = static_cast<char*>(dx) + i * x.row_bytes();
      for (int64_t c = 0; c < x.d; ++c) t[c] = 0;
      const int64_t first = groups.start[static_cast<size_t>(i)], last = groups.start[static_cast<size_t>(i) + 1];
      if (first == last) {
        x_rows.narrow(t, 1, x.d, target);
        continue;
      }
      Acc inverse, other_inverse;
      x_rows.inverse_norms(x.row(i), x.d, 1, x.d, kSmallestNorm, &inverse);
      x_rows.widen(x.row(i), inverse, x.d, unit);
      for (int64_t e = first; e < last; ++e) {
        const Pair& pair = groups.pairs[static_cast<size_t>(e)];
        y_rows.inverse_norms(y.row(pair.other), y.d, 1, y.d, kSmallestNorm, &other_inverse);
        y_rows.add_scaled(t, pair.weight * static_cast<double>(other_inverse), y.row(pair.other), y.d);
      }
      if (norm_is_free(inverse)) acc_rows.add_scaled(t, -acc_rows.dot(t, unit, x.d), unit, x.d);
      x_rows.narrow(t, inverse, x.d, target);
    }
  });
}

}  // namespace pymm
