// What the inner loops over tiles of scores share: rows walked in vectors with a mask for the last, and exponentials
// of numbers whose range is known. Included only by csrc/cpu/simd/*.cpp.
#pragma once

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {

constexpr int64_t kMaxColumns = 256;  // of a tile

template <class Acc>
using Mask = Integers<Acc>;

// step(j, count, keep) for each vector of a row; `keep` is all ones in the full ones.
template <class Acc, class Step>
inline __attribute__((always_inline)) void each_vector(int64_t columns, Step&& step) {
  constexpr int lanes = lanes_of<Acc>();
  using M = Mask<Acc>;
  int64_t j = 0;
  for (; j + lanes <= columns; j += lanes) step(j, lanes, M{} == M{});
  if (j == columns) return;
  M keep;
  for (int i = 0; i < lanes; ++i) keep[i] = i < columns - j ? -1 : 0;
  step(j, columns - j, keep);
}

// exp(x) for x <= 88, within 2 units in the last place; below -87, of -infinity too, a number below 2e-38.
inline vfloat exp_bounded(vfloat x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
  x = vmax(broadcast(-87.0f), x);
  const vfloat shifted = x * kLog2e + kRound;
  const vfloat n = shifted - kRound;
  vfloat r = x - n * kLn2High;
  r = r - n * kLn2Low;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
#if PYMM_ISA_LEVEL >= 2
  return (vfloat)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return p * (vfloat)(((vint)shifted << 23) + 0x3f800000);  // the shift leaves n alone of the bits of `shifted`
#endif
}
inline vdouble exp_bounded(vdouble x) { return vexp(x); }

// log(1 + t) for 0 <= t <= 1, within 2 units in the last place: 2 atanh(t / (2 + t)) as a series.
inline vfloat log1p_bounded(vfloat t) {
  const vfloat z = t / (t + 2.0f), q = z * z;
  vfloat p = q * (1.0f / 15) + 1.0f / 13;
  p = p * q + 1.0f / 11;
  p = p * q + 1.0f / 9;
  p = p * q + 1.0f / 7;
  p = p * q + 1.0f / 5;
  p = p * q + 1.0f / 3;
  const vfloat twice = z + z;
  return twice * q * p + twice;
}
inline vdouble log1p_bounded(vdouble t) {
  for (int i = 0; i < lanes_of<double>(); ++i) t[i] = __builtin_log1p(t[i]);
  return t;
}

}  // namespace pymm::PYMM_ISA
