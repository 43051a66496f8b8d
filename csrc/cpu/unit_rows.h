// Rows divided by their norms without a normalized copy: the factors of products, and the way back of a gradient.
#pragma once

#include "cpu/host.h"
#include "cpu/simd/rows.h"

namespace pymm {

constexpr double kUnitEps = 1e-12;  // the smallest norm divided by, as in F.normalize

// 1 / max(||row||, eps) of n rows, or 1.
template <class T>
std::vector<Accumulator<T>> unit_factors(const T* x, int64_t n, int64_t d, bool normalize) {
  std::vector<Accumulator<T>> factors(n, 1);
  if (!normalize) return factors;
  const Rows& rows = rows_for(dtype_of<T>());
  parallel_ranges(n, 64, [&](int64_t begin, int64_t end) {
    rows.inverse_norms(x + begin * d, d, end - begin, d, kUnitEps, factors.data() + begin);
  });
  return factors;
}

// out = scale * (u - <u, x^> x^) per row, where u = G . y holds the gradient before the norm of x is a variable, G
// being the gradient of the dot products. Null factors: rows that were not normalized, out = scale * u. u is used up.
template <class T>
void through_unit(Accumulator<T>* u, const T* x, const Accumulator<T>* factors, double scale, int64_t n, int64_t d,
                  T* out) {
  const Rows& rows = rows_for(dtype_of<T>());
  for (int64_t r = 0; r < n; ++r, u += d, x += d, out += d) {
    const double factor = factors ? factors[r] : 0;
    const bool clamped = factor >= (1.0 - 1e-6) / kUnitEps;  // max(||x||, eps) = eps: the norm is a constant
    if (factors && !clamped) rows.add_scaled(u, -rows.dot(u, x, d) * factor * factor, x, d);
    rows.narrow(u, scale, d, out);
  }
}

}  // namespace pymm
