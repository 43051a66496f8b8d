// What attention does to one row of scores: masks, softmax, dropout's factors.
//
// Exponentials are powers of two: a score x stands for 2^(unit * x), unit = scale * log2(e), or log2(e) where the masks
// have already applied the scale. Weights replace the scores that they come from, in the tile's element type, which is
// never wider: a row of them begins where the row of scores began.
#pragma once

#include "cpu/simd/attention.h"
#include "cpu/simd/tile.h"
#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {

// As many bytes as a vector of accumulators has lanes.
typedef uint8_t FloatBytes __attribute__((vector_size(kVectorBytes / 4)));
typedef uint8_t DoubleBytes __attribute__((vector_size(kVectorBytes / 8)));
template <class Acc>
struct BytesOf {
  using type = FloatBytes;
};
template <>
struct BytesOf<double> {
  using type = DoubleBytes;
};

constexpr double kLog2e = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// Dropout's factors of one row, columns [first, first + n): Philox-4x32-10 as pymm/ops/_attention_reference.py draws
// it. `first` is a multiple of 64; `factors` has room for n rounded up to 64.
template <class Acc>
inline void dropout_factors(const AttentionCall& call, int64_t head, int64_t row, int64_t first, int64_t n,
                            Acc* factors) {
  constexpr int kDraws = 16;  // counters of one block of 64 columns
  const double drawn = __builtin_nearbyint(call.dropout_p * 0x1p32);
  const Acc kept = call.dropout_p < 1 ? static_cast<Acc>(1 / (1 - call.dropout_p)) : Acc{0};
  const uint32_t threshold = drawn < 0x1p32 ? static_cast<uint32_t>(drawn) : 0xffffffffu;
  for (int64_t block = 0; block < n; block += 64) {
    uint32_t c[4][kDraws], k0 = static_cast<uint32_t>(call.seed), k1 = static_cast<uint32_t>(call.seed >> 32);
    for (int i = 0; i < kDraws; ++i) {
      c[0][i] = static_cast<uint32_t>((first + block) / 4 + i);
      c[1][i] = static_cast<uint32_t>(row);
      c[2][i] = static_cast<uint32_t>(head);
      c[3][i] = static_cast<uint32_t>(static_cast<uint64_t>(head) >> 32);
    }
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      for (int i = 0; i < kDraws; ++i) {
        const uint64_t a = static_cast<uint64_t>(c[0][i]) * 0xD2511F53u,
                       b = static_cast<uint64_t>(c[2][i]) * 0xCD9E8D57u;
        c[0][i] = static_cast<uint32_t>(b >> 32) ^ c[1][i] ^ k0;
        c[2][i] = static_cast<uint32_t>(a >> 32) ^ c[3][i] ^ k1;
        c[1][i] = static_cast<uint32_t>(b);
        c[3][i] = static_cast<uint32_t>(a);
      }
    }
    for (int word = 0; word < 4; ++word) {
      for (int i = 0; i < kDraws; ++i) factors[block + word * kDraws + i] = c[word][i] >= threshold ? kept : Acc{0};
    }
  }
}

template <class T>
struct AttentionRows {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  using E = typename TileOf<T>::Element;
  using Lanes = decltype(V{} < V{});  // all ones or zero per lane
  static constexpr int lanes = lanes_of<Acc>();
  static constexpr bool paired = TileOf<T>::kPair == 2;
  static constexpr Acc kMinusInfinity = -static_cast<Acc>(__builtin_inf());

  static Lanes first_lanes(int64_t count) {
    Lanes index;
    for (int i = 0; i < lanes; ++i) index[i] = i;
    return index < static_cast<decltype(index[0] + 0)>(max_of(0, min_of(count, lanes)));
  }

  static Lanes load_bools(const uint8_t* p, int64_t stride, int64_t count) {
    typename BytesOf<Acc>::type bytes{};
    if (stride == 1 && count >= lanes) {
      memcpy(&bytes, p, sizeof(bytes));
    } else {
      for (int64_t i = 0; i < min_of(count, lanes); ++i) bytes[i] = p[i * stride];
    }
    return __builtin_convertvector(bytes, Lanes) != 0;
  }

  template <class B>
  static V load_bias(const void* p, int64_t stride, int64_t count) {
    const B* from = static_cast<const B*>(p);
    if (stride == 1) return load_some(from, count);
    V v{};
    for (int64_t i = 0; i < min_of(count, lanes); ++i) v[i] = to_acc(from[i * stride]);
    return v;
  }

  static Acc row_max(const Acc* s, int64_t n) {
    V best[2] = {broadcast<Acc>(kMinusInfinity), broadcast<Acc>(kMinusInfinity)};
    int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
      best[0] = vmax(load(s + i), best[0]);
      best[1] = vmax(load(s + i + lanes), best[1]);
    }
    for (; i < n; i += lanes) best[0] = vmax(load_some(s + i, n - i, kMinusInfinity), best[0]);
    return reduce_max(vmax(best[0], best[1]));
  }

  // A maximum passes over NaN; a row without one is searched, so that it is not taken for one that sees nothing.
  static bool has_nan(const Acc* s, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
      if (s[i] != s[i]) return true;
    }
    return false;
  }

  // Scores times scale, plus bias, -inf where a mask forbids; in place. Returns the largest.
  static Acc mask_row(const AttentionHead& head, double scale, int64_t query_head, int64_t t, int64_t column, Acc* s,
                      int64_t n) {
    const V factor = broadcast<Acc>(static_cast<Acc>(scale)), hidden = broadcast<Acc>(kMinusInfinity);
    const MaskView &bias = head.bias, &allowed = head.allowed, &valid = head.valid;
    V best = hidden;
    for (int64_t i = 0; i < n; i += lanes) {
      const int64_t left = n - i, at = column + i;
      V x = load(s + i) * factor;
      if (head.bias_type == Bias::input_type) {
        x += load_bias<T>(bias.at<T>(query_head, t, at), bias.column_stride, left);
      } else if (head.bias_type == Bias::accumulators) {
        x += load_bias<Acc>(bias.at<Acc>(query_head, t, at), bias.column_stride, left);
      }
      if (allowed.data) {
        x = load_bools(allowed.at<uint8_t>(query_head, t, at), allowed.column_stride, left) ? x : hidden;
      }
      if (valid.data) x = load_bools(valid.at<uint8_t>(0, 0, at), valid.column_stride, left) ? x : hidden;
      store(s + i, x);
      best = vmax(left < lanes ? (first_lanes(left) ? x : hidden) : x, best);
    }
    return reduce_max(best);
  }

  static void store_weights(E* p, V v) { store(p, v); }

  static void clear_weights(E* p, int64_t from, int64_t to) {
    if (from < to) memset(static_cast<void*>(p + from), 0, static_cast<size_t>(to - from) * sizeof(E));
  }

  // Weights 2^(unit * s - shift), zero in [n, padded), times dropout's factors if there are any. Returns their sum
  // without dropout.
  static Acc softmax_row(Acc* s, int64_t n, int64_t padded, Acc unit, Acc shift, const Acc* factors) {
    E* p = reinterpret_cast<E*>(s);
    const V u = broadcast<Acc>(unit), minus = broadcast<Acc>(-shift);
    V sum{};
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) {
      const V w = vexp2(load(s + i) * u + minus);
      sum += w;
      store_weights(p + i, factors ? w * load(factors + i) : w);
    }
    if (i < n) {
      const V w = first_lanes(n - i) ? vexp2(load(s + i) * u + minus) : V{};
      sum += w;
      store_weights(p + i, factors ? w * load(factors + i) : w);
      i += lanes;
    }
    clear_weights(p, i, padded);
    return reduce_add(sum);
  }
};

}  // namespace pymm::PYMM_ISA
