// Activations and their derivatives on vectors: value(z) = f(z), slope(z) = f'(z). A NaN stays a NaN.
#pragma once

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {

template <class V>
inline V reciprocal(V v) {
  return 1 / v;
}
#if PYMM_ISA_LEVEL >= 2
// 14 bits from the table, doubled by one Newton step. Where 1/v is 0 or infinite the step would make a NaN of it.
template <>
inline vfloat reciprocal<vfloat>(vfloat v) {
  const vfloat guess = (vfloat)_mm512_rcp14_ps((__m512)v);
  const vfloat better = guess * (2.0f - v * guess);
  return better == better ? better : guess;
}
#endif

template <class V>
using Lane = decltype(V{}[0] + 0);

template <class V, int n>
inline V polynomial(V x, const float (&coefficients)[n]) {
  V sum = x * coefficients[n - 1] + coefficients[n - 2];
#pragma GCC unroll 8
  for (int i = n - 3; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <class F>
inline vdouble each_lane(vdouble z, F&& f) {
  for (int i = 0; i < lanes_of<double>(); ++i) z[i] = f(z[i]);
  return z;
}

template <class V>
inline V sigmoid(V z) {
  return reciprocal(1 + vexp(-z));
}

// The sigmoid and its derivative. Both come from exp(-|z|), which cannot overflow, and nothing cancels far out.
template <class V>
struct SigmoidSlope {
  V value, slope;
  explicit SigmoidSlope(V z) {
    const V e = vexp(z < 0 ? z : -z), large = reciprocal(1 + e), small = e * large;
    value = z < 0 ? small : large;
    slope = small * large;
  }
};

// f(z) = z, with nothing to differentiate.
struct Identity {
  template <class V>
  static V value(V z) {
    return z;
  }
  template <class V>
  static V slope(V z) {
    return z * 0 + 1;
  }
};

struct Relu {
  template <class V>
  static V value(V z) {
    return z < 0 ? V{} : z;
  }
  template <class V>
  static V slope(V z) {
    return z > 0 ? V{} + 1 : V{};
  }
};

struct Silu {
  template <class V>
  static V value(V z) {
    return z * sigmoid(z);
  }
  template <class V>
  static V slope(V z) {
    const SigmoidSlope<V> s(z);
    return s.value + z * s.slope;
  }
};

// z sigmoid(1.702 z)
struct QuickGelu {
  template <class V>
  static V value(V z) {
    return z * sigmoid(z * kScale<V>);
  }
  template <class V>
  static V slope(V z) {
    const V u = z * kScale<V>;
    const SigmoidSlope<V> s(u);
    return s.value + u * s.slope;
  }

 private:
  template <class V>
  static constexpr Lane<V> kScale = 1.702;
};

// z Phi(z), Phi(z) = (1 + erf(z / sqrt 2)) / 2. Phi - 1/2 and f' - 1/2 are odd, so each is z P(z^2) / Q(z^2), fitted
// by least squares until the largest error was level: 2.2e-8 in z Phi for |z| < 5.5, 1.4e-7 in f' for |z| < 6.
// Beyond, both are 0 or 1 to within float's precision.
struct Gelu {
  static vfloat value(vfloat z) {
    constexpr float p[] = {3.989419853e-01f, 3.514257818e-02f, 4.761631465e-03f,
                           1.828607046e-04f, 6.530756490e-06f, 2.221572651e-08f};
    constexpr float q[] = {
        1.0f, 2.547529661e-01f, 2.939883679e-02f, 1.962448571e-03f, 7.861108585e-05f, 1.195393299e-06f};
    const vfloat s = z * z;
    const vfloat inside = z * (0.5f + z * polynomial(s, p) * reciprocal(polynomial(s, q)));
    return s > 5.5f * 5.5f ? (z < 0 ? vfloat{} : z) : inside;
  }
  static vfloat slope(vfloat z) {
    constexpr float p[] = {7.978845303e-01f, -3.074304612e-02f, 1.420914195e-02f,
                           2.419198932e-05f, 3.585044296e-05f,  1.908821956e-07f};
    constexpr float q[] = {
        1.0f, 2.948061795e-01f, 4.106483602e-02f, 3.528771847e-03f, 1.935223524e-04f, 8.887386905e-06f};
    const vfloat s = z * z;
    const vfloat inside = 0.5f + z * polynomial(s, p) * reciprocal(polynomial(s, q));
    return s > 6.0f * 6.0f ? (z < 0 ? vfloat{} : vfloat{} + 1.0f) : inside;
  }
  static vdouble value(vdouble z) {
    return each_lane(z, [](double x) { return x * cumulative(x); });
  }
  static vdouble slope(vdouble z) {
    constexpr double kInverseRootTwoPi = 0.39894228040143268;
    return each_lane(z, [](double x) { return cumulative(x) + x * kInverseRootTwoPi * __builtin_exp(-0.5 * x * x); });
  }

 private:
  static double cumulative(double x) { return 0.5 + 0.5 * __builtin_erf(x * 0.70710678118654752); }
};

// z (1 + tanh u) / 2 = z sigmoid(2u), u = sqrt(2 / pi) (z + 0.044715 z^3)
struct GeluTanh {
  template <class V>
  static V value(V z) {
    return z * sigmoid(twice_u(z));
  }
  template <class V>
  static V slope(V z) {
    const SigmoidSlope<V> s(twice_u(z));
    const V growth = kTwice<V> + 3 * kTwice<V> * kCubic<V> * (z * z);
    // Where s is 0 or 1 the second term is 0, though growth may be infinite.
    return s.value + (s.slope == 0 ? V{} : z * s.slope * growth);
  }

 private:
  template <class V>
  static constexpr Lane<V> kTwice = 1.5957691216057308;  // 2 sqrt(2 / pi)
  template <class V>
  static constexpr Lane<V> kCubic = 0.044715;
  template <class V>
  static V twice_u(V z) {
    return z * (kTwice<V> + kTwice<V> * kCubic<V> * (z * z));
  }
};

}  // namespace pymm::PYMM_ISA
