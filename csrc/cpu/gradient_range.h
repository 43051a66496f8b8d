// Where the gradients G of dot products lie, so that float16 can hold them while they are multiplied.
//
// float16 ends at 65504 and thins out below 2^-14; a gradient of a mean over many pairs lies far below. So G is
// computed times a power of two, which changes no other digit and is taken out of the sums at the end. Where rows
// differ by more than a float16 spans, G is multiplied as float.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "cpu/types.h"

namespace pymm {

// The least and the largest magnitude of one factor of G, zeros and NaN aside.
struct Magnitudes {
  double least = std::numeric_limits<double>::infinity(), largest = 0;

  template <class Numbers>
  Magnitudes& add(const Numbers& numbers) {
    for (const auto number : numbers) {
      const double magnitude = std::fabs(static_cast<double>(number));
      if (magnitude > largest) largest = magnitude;
      if (magnitude > 0 && magnitude < least) least = magnitude;
    }
    return *this;
  }
};

struct GradientRange {
  double power = 1;   // of two, that G is multiplied by
  bool wide = false;  // whether float16 cannot hold G all the same

  // For G_ij = w_ij f_i h_j with |w_ij| at most twice the largest weight, both factors included once.
  template <class T>
  static GradientRange of(const Magnitudes& weights, const Magnitudes& rows, const Magnitudes& columns) {
    constexpr int kTop = 14;            // G reaches 2^14 at most
    constexpr double kSpread = 0x1p12;  // between rows; what is left below resolves a softmax over 2^17 candidates
    GradientRange range;
    if (!std::is_same_v<T, f16>) return range;
    double largest = 2, spread = 1;
    for (const Magnitudes* m : {&weights, &rows, &columns}) {
      if (m->largest == 0) return range;  // G is zero
      largest *= m->largest;
      spread *= m->largest / m->least;
    }
    range.wide = !(spread <= kSpread && largest < std::numeric_limits<double>::infinity());
    if (range.wide) return range;
    int exponent = 0;
    std::frexp(largest, &exponent);
    range.power = std::ldexp(1.0, kTop - exponent);
    return range;
  }
};

}  // namespace pymm
