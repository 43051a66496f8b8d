// The gradient of softmax, a register tile at a time: from scores and dout . v to weights and ds.
//
// Keys run downwards and query rows across, so that what is written is both operands of the products to come: rows of
// weights and of ds are A of those that sum over query rows (dv, dk), units of ds are B of that which sums over keys
// (dq). Nothing is turned in between.
#pragma once

#include "cpu/simd/attention_blocks.h"

namespace pymm::PYMM_ISA {

template <class T>
struct AttentionGradient {
  using Blocks = AttentionBlocks<T>;
  using Rows = typename Blocks::Rows;
  using Acc = typename Blocks::Acc;
  using V = typename Blocks::V;
  using E = typename Blocks::E;
  using Lanes = typename Rows::Lanes;
  using Index = Integers<Acc>;
  using Number = decltype(Index{}[0] + 0);
  static constexpr int lanes = Blocks::lanes;
  static constexpr bool paired = Blocks::kPair == 2;
  static constexpr int64_t kKeys = 64;  // of a block
  static constexpr int64_t kTileElements = Blocks::kTileRows * Blocks::kTileColumns;

  // Whether ds becomes float16, whose range it needs to be brought into.
  static constexpr bool ds_is_scaled = __is_same(E, f16);

  // The rows of a block: log-sum-exp in powers of two (infinity: sees nothing), sum(dout * out) - dlse, and how many of
  // the columns each sees; of each vector of rows the most and the fewest of these.
  struct Across {
    const Acc *shift, *offset;
    const Number *seen, *most, *fewest;
  };

  // One block of `n` keys. `added`, `factors` and `ds_sums` may be null: what is added to the exponents, dropout's
  // factors, and where ds is kept for the mask's gradient, or added to a turned one.
  struct Block {
    int64_t n;
    Acc unit, power;  // power: of two, that ds is multiplied by if it is scaled
    int64_t ld, ds_ld;
    Acc *added, *factors, *ds_sums;
    bool ds_is_added;
    E *weights, *ds, *units;
    Number limit[kKeys];  // a row sees the key if it sees more columns than this
  };

  struct Pair {
    V weights, ds;
  };

  template <bool plain>
  static inline __attribute__((always_inline)) Pair gradient(const Block& to, int64_t key, int64_t t, V s, V dp,
                                                             V shift, V offset, [[maybe_unused]] Index seen) {
    V x = s * broadcast<Acc>(to.unit) - shift;
    if constexpr (plain) {
      const V p = vexp2(x);
      return {p, p * (dp - offset)};
    } else {
      const int64_t at = key * to.ld + t;
      Lanes visible = seen > to.limit[key];
      if (to.added) {
        const V added = load(to.added + at);
        x += added;
        visible &= added != broadcast<Acc>(Rows::kMinusInfinity);
      }
      const V p = vexp2(x);
      V weights = p;
      if (to.factors) {
        const V factor = load(to.factors + at);
        dp *= factor;
        weights *= factor;
      }
      const V ds = visible ? p * (dp - offset) : V{};
      if (to.ds_sums && key < to.n) {
        Acc* sums = to.ds_sums + key * to.ds_ld + t;
        store(sums, to.ds_is_added ? load(sums) + ds : ds);
      }
      return {visible ? weights : V{}, ds};
    }
  }

  // Two keys of a vector of rows.
  static inline __attribute__((always_inline)) void put(const Block& to, int64_t key, int64_t t, Pair a, Pair b) {
    E *weights = to.weights + key * to.ld + t, *ds = to.ds + key * to.ld + t;
    if constexpr (ds_is_scaled) {
      a.ds *= broadcast<Acc>(to.power);
      b.ds *= broadcast<Acc>(to.power);
    }
#if PYMM_ISA_LEVEL >= 3
    if constexpr (paired) {
      const auto put_rows = [&](E* row, __m512i both) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + to.ld), _mm512_extracti64x4_epi64(both, 1));
      };
      const __m512i both = narrow(E{}, a.ds, b.ds);
      put_rows(weights, narrow(E{}, a.weights, b.weights));
      put_rows(ds, both);
      _mm512_storeu_si512(to.units + key * to.ld + 2 * t, interleave(both));
      return;
    }
#endif
    if constexpr (!paired) {
      store(weights, a.weights);
      store(weights + to.ld, b.weights);
      store(ds, a.ds);
      store(ds + to.ld, b.ds);
    }
  }

  // Rows [t, t + lanes) of keys [key, key + keys), from tiles whose rows are kTileColumns apart.
  template <bool plain>
  static void vector_of_rows(const Across& rows, const Block& to, int64_t key, int64_t keys, int64_t t,
                             const Acc* scores, const Acc* dp) {
    constexpr int64_t ld = Blocks::kTileColumns;
    const V shift = load(rows.shift + t), offset = load(rows.offset + t);
    Index seen;
    memcpy(&seen, rows.seen + t, sizeof(seen));
    for (int64_t i = 0; i < keys; i += 2, scores += 2 * ld, dp += 2 * ld) {
      const Pair a = gradient<plain>(to, key + i, t, load(scores), load(dp), shift, offset, seen);
      const Pair b = gradient<plain>(to, key + i + 1, t, load(scores + ld), load(dp + ld), shift, offset, seen);
      put(to, key + i, t, a, b);
    }
  }

  static void nothing_seen(const Block& to, int64_t key, int64_t keys, int64_t t) {
    for (int64_t i = 0; i < keys; i += 2) {
      put(to, key + i, t, Pair{}, Pair{});
      if (to.ds_sums && !to.ds_is_added) {
        store(to.ds_sums + (key + i) * to.ds_ld + t, V{});
        store(to.ds_sums + (key + i + 1) * to.ds_ld + t, V{});
      }
    }
  }

  // Of `n` rows in all, the vectors that see any of the keys [key, key + keys).
  static Span seen_rows(const Across& rows, const Block& block, int64_t key, int64_t keys, int64_t n) {
    int64_t lowest = block.limit[key];
    for (int64_t i = 1; i < keys; ++i) lowest = min_of(lowest, block.limit[key + i]);
    int64_t from = 0, to = n / lanes;
    while (from < to && rows.most[from] <= lowest) ++from;
    while (from < to && rows.most[to - 1] <= lowest) --to;
    return {from * lanes, to * lanes};
  }

  // Calls f(q, line) for the columns of `count` <= lanes rows of accumulators, zero in the lines' lanes beyond.
  template <class F>
  static void turned(const Acc* from, int64_t ld, int64_t count, F&& f) {
    if constexpr (__is_same(Acc, float)) {
      turn([&](int r) { return r < count ? bit_cast<vuint>(load(from + r * ld)) : vuint{}; }, lanes,
           [&](int q, vuint line) { f(q, bit_cast<V>(line)); });
    } else {
      for (int q = 0; q < lanes; ++q) {
        V line{};
        for (int64_t r = 0; r < min_of(count, lanes); ++r) line[r] = from[r * ld + q];
        f(q, line);
      }
    }
  }

  // Calls fill(query head, row, numbers of all keys) for each row of the block, and keeps the numbers turned.
  template <class F>
  static void lay(const AttentionHead& head, int64_t first, int64_t count, int64_t n, int64_t ld, Acc* target,
                  F&& fill) {
    Acc numbers[lanes * kKeys];
    for_runs(first, count, head.rows, [&](int64_t done, int64_t h, int64_t t, int64_t run) {
      for (int64_t i = 0; i < run; i += lanes) {
        const int64_t rows = min_of(lanes, run - i);
        for (int64_t r = 0; r < rows; ++r) fill(h, t + i + r, numbers + r * kKeys);
        for (int64_t c = 0; c < n; c += lanes) {
          turned(numbers + c, kKeys, rows,
                 [&](int q, V line) { store_some(target + (c + q) * ld + done + i, line, rows); });
        }
      }
    });
  }

  // `added` and `factors` of `n` keys from `column` on, for the rows [first, first + count).
  static void lay_terms(const AttentionCall& call, const AttentionHead& head, int64_t first, int64_t count,
                        int64_t column, int64_t n, const Block& to) {
    if (to.added) {
      lay(head, first, count, n, to.ld, to.added, [&](int64_t h, int64_t t, Acc* row) {
        for (int64_t c = 0; c < n; c += lanes) store(row + c, added_terms(head, h, t, column + c, n - c));
      });
    }
    if (to.factors) {
      lay(head, first, count, n, to.ld, to.factors,
          [&](int64_t h, int64_t t, Acc* row) { dropout_factors(call, head.first_head + h, t, column, n, row); });
    }
  }
  static V added_terms(const AttentionHead& head, int64_t query_head, int64_t t, int64_t column, int64_t count) {
    const MaskView &bias = head.bias, &allowed = head.allowed;
    V x{};
    if (head.bias_type == Bias::input_type) {
      x = Rows::template load_bias<T>(bias.at<T>(query_head, t, column), bias.column_stride, count);
    } else if (head.bias_type == Bias::accumulators) {
      x = Rows::template load_bias<Acc>(bias.at<Acc>(query_head, t, column), bias.column_stride, count);
    }
    x *= broadcast<Acc>(static_cast<Acc>(kLog2e));
    if (!allowed.data) return x;
    const Lanes seen = Rows::load_bools(allowed.at<uint8_t>(query_head, t, column), allowed.column_stride, count);
    return seen ? x : broadcast<Acc>(Rows::kMinusInfinity);
  }

  // Adds the ds of `n` keys from `column` on to the mask's gradient, for the rows [first, first + count).
  static void add_to_mask(const AttentionHead& head, const AttentionBackward& with, int64_t first, int64_t count,
                          int64_t column, int64_t n, const Block& from) {
    for_runs(first, count, head.rows, [&](int64_t done, int64_t h, int64_t t, int64_t run) {
      Acc* target = static_cast<Acc*>(with.mask_gradient) + h * with.mask_head_stride + t * with.mask_row_stride +
                    column * with.mask_column_stride;
      for (int64_t i = 0; i < run; i += lanes) {
        for (int64_t c = 0; c < n; c += lanes) {
          turned(from.ds_sums + c * from.ds_ld + done + i, from.ds_ld, n - c, [&](int q, V line) {
            if (i + q >= run) return;
            Acc* to = target + (i + q) * with.mask_row_stride + c * with.mask_column_stride;
            if (with.mask_column_stride == 0) {
              *to += reduce_add(line);
            } else {
              store_some(to, load_some(to, n - c) + line, n - c);
            }
          });
        }
      }
    });
  }
};

}  // namespace pymm::PYMM_ISA
