// Vectors of one register, for inner loops that are compiled once per instruction set.
//
// Included only by csrc/cpu/simd/*.cpp. Everything lives in namespace pymm::PYMM_ISA, so that no variant can be
// merged with another by the linker; for the same reason no template of the standard library is used there.
// GCC's vector types carry the arithmetic (a * b + c contracts to one FMA); intrinsics appear only where the
// types have no word for the instruction.
#pragma once

#include <cstdint>
#include <cstring>

#if PYMM_ISA_LEVEL > 0
#include <immintrin.h>
#endif

#include "cpu/types.h"

namespace pymm::PYMM_ISA {

#if PYMM_ISA_LEVEL >= 2
constexpr int kVectorBytes = 64;
#elif PYMM_ISA_LEVEL == 1
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
constexpr int lanes_of() {
  return kVectorBytes / static_cast<int>(sizeof(T));
}
constexpr int kLanes = lanes_of<float>();

typedef float vfloat __attribute__((vector_size(kVectorBytes)));
typedef double vdouble __attribute__((vector_size(kVectorBytes)));
typedef int32_t vint __attribute__((vector_size(kVectorBytes)));
typedef uint32_t vuint __attribute__((vector_size(kVectorBytes)));
typedef int64_t vlong __attribute__((vector_size(kVectorBytes)));
typedef uint16_t vhalf_bits __attribute__((vector_size(kVectorBytes / 2)));

template <class Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = vfloat;
};
template <>
struct VectorOf<double> {
  using type = vdouble;
};
template <class Acc>
using Vector = typename VectorOf<Acc>::type;

// As many integers of the accumulator's width: what a comparison gives, and indices beside values.
template <class Acc>
struct IntegersOf {
  using type = vint;
};
template <>
struct IntegersOf<double> {
  using type = vlong;
};
template <class Acc>
using Integers = typename IntegersOf<Acc>::type;

template <class To, class From>
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class Acc>
inline Vector<Acc> broadcast(Acc value) {
  return value - Vector<Acc>{};
}

// One value, to and from float or double.

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_acc(f16 x) {
#if PYMM_ISA_LEVEL > 0
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  if (magnitude >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  // Multiplying by 2^112 rebiases the exponent and turns half subnormals into normal floats.
  return bit_cast<float>(bit_cast<uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f) | sign);
#endif
}

template <class T>
inline T from_acc(Accumulator<T> x);
template <>
inline float from_acc<float>(float x) {
  return x;
}
template <>
inline double from_acc<double>(double x) {
  return x;
}
// Round to nearest even; a NaN stays a NaN.
template <>
inline bf16 from_acc<bf16>(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffff) > 0x7f800000) return bf16{static_cast<uint16_t>((bits >> 16) | 0x40)};
  return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
inline f16 from_acc<f16>(float x) {
#if PYMM_ISA_LEVEL > 0
  return f16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return f16{static_cast<uint16_t>(sign | 0x7e00)};
  if (magnitude >= 0x477ff000) return f16{static_cast<uint16_t>(sign | 0x7c00)};  // rounds to 2^16 or above
  if (magnitude < 0x38800000) {  // subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits
    const float shifted = bit_cast<float>(magnitude) + 0.5f;
    return f16{static_cast<uint16_t>(sign | (bit_cast<uint32_t>(shifted) - 0x3f000000))};
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000;
  return f16{static_cast<uint16_t>(sign | (rounded >> 13))};
#endif
}

// Whole registers. load() widens to the accumulator's type, store() rounds.

inline vfloat load(const float* p) {
  vfloat v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline vdouble load(const double* p) {
  vdouble v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline vfloat load(const bf16* p) {
  vhalf_bits v;
  memcpy(&v, p, sizeof(v));
  return bit_cast<vfloat>(__builtin_convertvector(v, vuint) << 16);
}
inline vfloat load(const f16* p) {
#if PYMM_ISA_LEVEL >= 2
  return (vfloat)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif PYMM_ISA_LEVEL == 1
  return (vfloat)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vfloat v;
  for (int i = 0; i < kLanes; ++i) v[i] = to_acc(p[i]);
  return v;
#endif
}

inline void store(float* p, vfloat v) { memcpy(p, &v, sizeof(v)); }
inline void store(double* p, vdouble v) { memcpy(p, &v, sizeof(v)); }
inline void store(bf16* p, vfloat v) {
#if PYMM_ISA_LEVEL >= 3
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)v);
  memcpy(p, &rounded, sizeof(rounded));
#else
  const vuint bits = bit_cast<vuint>(v);
  const vuint rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vint is_nan = (vint)(v != v);
  const vuint result = (rounded & ~(vuint)is_nan) | (((bits >> 16) | 0x40) & (vuint)is_nan);
  const vhalf_bits narrow = __builtin_convertvector(result, vhalf_bits);
  memcpy(p, &narrow, sizeof(narrow));
#endif
}
inline void store(f16* p, vfloat v) {
#if PYMM_ISA_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif PYMM_ISA_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = from_acc<f16>(v[i]);
#endif
}

// The first `count` lanes (0 <= count <= lanes): loads leave `fill` in the others, stores leave memory alone.

template <class T>
inline Vector<Accumulator<T>> load_some(const T* p, int64_t count, Accumulator<T> fill = 0) {
  constexpr int lanes = lanes_of<Accumulator<T>>();
  if (count >= lanes) return load(p);
#if PYMM_ISA_LEVEL >= 2
  const uint32_t mask = (1u << count) - 1;
  if constexpr (__is_same(T, float)) {
    return (vfloat)_mm512_mask_loadu_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(mask), p);
  } else if constexpr (!__is_same(T, double)) {
    alignas(32) T line[lanes];
    _mm256_store_si256(reinterpret_cast<__m256i*>(line), _mm256_maskz_loadu_epi16(static_cast<__mmask16>(mask), p));
    const __m512 v = (__m512)load(line);
    return (vfloat)_mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(mask), v);
  }
#endif
  Vector<Accumulator<T>> v = broadcast<Accumulator<T>>(fill);
  for (int64_t i = 0; i < count; ++i) v[i] = to_acc(p[i]);
  return v;
}

template <class T>
inline void store_some(T* p, Vector<Accumulator<T>> v, int64_t count) {
  constexpr int lanes = lanes_of<Accumulator<T>>();
  if (count >= lanes) {
    store(p, v);
    return;
  }
#if PYMM_ISA_LEVEL >= 2
  const uint32_t mask = (1u << count) - 1;
  if constexpr (__is_same(T, float)) {
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>(mask), (__m512)v);
    return;
  } else if constexpr (!__is_same(T, double)) {
    alignas(32) T line[lanes];
    store(line, v);
    _mm256_mask_storeu_epi16(p, static_cast<__mmask16>(mask), _mm256_load_si256(reinterpret_cast<__m256i*>(line)));
    return;
  }
#endif
  for (int64_t i = 0; i < count; ++i) p[i] = from_acc<T>(v[i]);
}

// max(a, b) and min(a, b) per lane; when either is NaN the result is b, as x86's instructions have it.
template <class V>
inline V vmax(V a, V b) {
  return a > b ? a : b;
}
template <class V>
inline V vmin(V a, V b) {
  return a < b ? a : b;
}

template <class V>
inline auto reduce_add(V v) {
  constexpr int n = sizeof(v) / sizeof(v[0]);
  auto sum = v[0];
  for (int i = 1; i < n; ++i) sum += v[i];
  return sum;
}

template <class V>
inline auto reduce_max(V v) {
  constexpr int n = sizeof(v) / sizeof(v[0]);
  auto best = v[0];
  for (int i = 1; i < n; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
#if PYMM_ISA_LEVEL >= 2
inline float reduce_add(vfloat v) { return _mm512_reduce_add_ps((__m512)v); }
inline float reduce_max(vfloat v) { return _mm512_reduce_max_ps((__m512)v); }
#endif

// Whether a comparison holds in any lane.
template <class Mask>
inline bool any(Mask mask) {
  static_assert(sizeof(Mask) == kVectorBytes);
#if PYMM_ISA_LEVEL >= 2
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif PYMM_ISA_LEVEL == 1
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  const vlong words = (vlong)mask;
  return (words[0] | words[1]) != 0;
#endif
}

inline vfloat vsqrt(vfloat v) {
#if PYMM_ISA_LEVEL >= 2
  return (vfloat)_mm512_sqrt_ps((__m512)v);
#elif PYMM_ISA_LEVEL == 1
  return (vfloat)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes; ++i) v[i] = __builtin_sqrtf(v[i]);
  return v;
#endif
}

// exp(x) within 2 units in the last place; 0 below -87.33, +inf above 88.7228, NaN for NaN. x = n ln 2 + r with
// |r| <= ln 2 / 2, a polynomial of degree 7 in r, 2^n through the exponent bits.
inline vfloat vexp(vfloat x) {
  constexpr float kLog2e = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
  const vfloat clamped = vmax(vmin(x, broadcast(89.0f)), broadcast(-88.0f));
  const vfloat shifted = clamped * kLog2e + kRound;
  const vfloat n = shifted - kRound;
  vfloat r = clamped - n * kLn2High;
  r = r - n * kLn2Low;
  vfloat p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  // 2^n in two halves, since n may be 128 or -127.
  const vint whole = (vint)shifted - static_cast<int32_t>(0x4b400000);
  const vint half = whole >> 1;
  const vfloat scale_a = (vfloat)((half + 127) << 23);
  const vfloat scale_b = (vfloat)((whole - half + 127) << 23);
  vfloat result = p * scale_a * scale_b;
  result = x < -87.33f ? vfloat{} : result;
  result = x > 88.7228f ? broadcast(__builtin_inff()) : result;
  return x != x ? x : result;
}

inline vdouble vexp(vdouble x) {
  for (int i = 0; i < lanes_of<double>(); ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// 2^x within 2 units in the last place for x up to 126; 0 below -125, NaN for NaN. For a softmax, whose exponents are
// not positive: x = n + f with |f| <= 1/2, a polynomial of degree 5 in f with the least relative error (8e-8).
inline vfloat vexp2(vfloat x) {
#if PYMM_ISA_LEVEL >= 2
  const vfloat n = (vfloat)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded integer in the low mantissa bits
  const vfloat shifted = x + kRound;
  const vfloat n = shifted - kRound;
#endif
  const vfloat f = x - n;
  vfloat p = f * 1.327647199e-3f + 9.675541334e-3f;
  p = p * f + 5.550713273e-2f;
  p = p * f + 2.402211972e-1f;
  p = p * f + 6.931469671e-1f;
  p = p * f + 1.000000072f;
#if PYMM_ISA_LEVEL >= 2
  const __mmask16 representable = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-125.0f), _CMP_NLT_UQ);
  return (vfloat)_mm512_maskz_scalef_ps(representable, (__m512)p, (__m512)n);
#else
  const vfloat scale = (vfloat)(((vuint)shifted << 23) + 0x3f800000u);
  return x < -125.0f ? vfloat{} : p * scale;
#endif
}

inline vdouble vexp2(vdouble x) {
  for (int i = 0; i < lanes_of<double>(); ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// Which lanes of rows i and i + h, counted through both, the two rows have after their off-diagonal blocks of h changed
// places. In memory: built in registers the numbers would cost more than the shuffles.
template <int h>
struct SwappedLanes {
  alignas(kVectorBytes) uint32_t low[kLanes], high[kLanes];
  constexpr SwappedLanes() : low{}, high{} {
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = static_cast<uint32_t>((lane & h) ? kLanes + lane - h : lane);
      high[lane] = static_cast<uint32_t>((lane & h) ? kLanes + lane : lane + h);
    }
  }
};

// Transposes one square block of 32-bit units held in registers, rows[i][j] <-> rows[j][i], in log2(lanes) steps of
// swapping the off-diagonal halves of ever smaller blocks.
template <int h = kLanes / 2>
inline __attribute__((always_inline)) void transpose(vuint (&rows)[kLanes]) {
  static constexpr SwappedLanes<h> lanes;
  vuint low, high;
  memcpy(&low, lanes.low, sizeof(low));
  memcpy(&high, lanes.high, sizeof(high));
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (i & h) continue;
    const vuint a = rows[i], b = rows[i + h];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + h] = __builtin_shuffle(a, b, high);
  }
  if constexpr (h > 1) transpose<h / 2>(rows);
}

}  // namespace pymm::PYMM_ISA
