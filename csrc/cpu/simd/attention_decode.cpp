// Attention's forward pass for a few rows, as decoding with a key-value cache has them.
// On chip: the rows of q, and the scores, weights and sums of all rows for a block of columns.
// Bytes: k and v are read once, where they lie: a row of k meets each row of q along its own width, so nothing is
// packed or turned, and 16 sums are reduced at a time; a row of v is scaled into the sums of out.
// Ragged edges: lines that end early are loaded with zeros, columns beyond the last repeat it and are never read.
#include "cpu/simd/attention.h"
#include "cpu/simd/attention_blocks.h"

namespace pymm::PYMM_ISA {
namespace {

constexpr int64_t kColumns = 128;  // of a block

template <class T>
struct Decode {
  using Blocks = AttentionBlocks<T>;
  using Acc = typename Blocks::Acc;
  using V = typename Blocks::V;
  using E = typename Blocks::E;
  using RowBlock = typename Blocks::RowBlock;
  static constexpr int lanes = Blocks::lanes;
  static constexpr int kPair = Blocks::kPair;
  static constexpr int kStep = lanes * kPair;             // elements of a vector of units
  static constexpr int kMostTogether = min_of(4, lanes);  // rows of q
  static constexpr int kLines = 2;                        // vectors of units of v's rows that are summed at a time

  struct Plan {
    int64_t rows, padded, depth, width, stride;
    E* q;
    Acc *scores, *factors;

    Plan(const AttentionCall& call, const AttentionHead& head, Parts& parts) {
      rows = call.heads * head.rows;
      padded = round_up(rows, Blocks::kRowPad);
      depth = round_up(call.d, kStep);
      width = round_up(call.dv, kLines * kStep);
      stride = Blocks::score_stride(kColumns);
      q = parts.take<E>(padded * depth);
      scores = parts.take<Acc>(padded * stride);
      factors = parts.take<Acc>(call.dropout_p > 0 ? kColumns : 0);
    }
  };

  // A part: the sums of weighted rows of v, of weights, and the largest scores.
  struct Part {
    Acc *out, *sums, *maxima;
    Part(const Plan& plan, Parts& parts) {
      out = parts.take<Acc>(plan.padded * plan.width);
      sums = parts.take<Acc>(plan.padded);
      maxima = parts.take<Acc>(plan.padded);
    }
  };

  static int64_t bytes(const AttentionCall& call, const AttentionHead& head) {
    Parts parts(nullptr);
    const Plan plan(call, head, parts);
    return parts.used();
  }

  static int64_t part_bytes(const AttentionCall& call, const AttentionHead& head) {
    Parts unused(nullptr), parts(nullptr);
    const Plan plan(call, head, unused);
    const Part part(plan, parts);
    return parts.used();
  }

  // A vector of units along a row, zero where `count` is used up.
  static V units(const T* p, int64_t count) {
    if constexpr (kPair == 2) {
      return bit_cast<V>(units_along<T, E>(p, count));
    } else {
      return load_some(p, max_of(count, 0));
    }
  }

  static void add_product(V& sum, V a, V b) {
#if PYMM_ISA_LEVEL >= 3
    if constexpr (kPair == 2) {
      sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
      return;
    }
#endif
    sum += a * b;
  }

  // The sums of `lanes` vectors' lanes, side by side: the last steps of a transpose, adding what it would put in place.
  template <int h = lanes / 2>
  static V sums_of(V (&v)[lanes]) {
    if constexpr (__is_same(Acc, double)) {
      V sums;
      for (int i = 0; i < lanes; ++i) sums[i] = reduce_add(v[i]);
      return sums;
    } else {
      static constexpr SwappedLanes<h> order;
      vuint low, high;
      memcpy(&low, order.low, sizeof(low));
      memcpy(&high, order.high, sizeof(high));
#pragma GCC unroll 8
      for (int i = 0; i < h; ++i)
        v[i] = __builtin_shuffle(v[i], v[i + h], low) + __builtin_shuffle(v[i], v[i + h], high);
      if constexpr (h > 1) {
        return sums_of<h / 2>(v);
      } else {
        return v[0];
      }
    }
  }

  // Rows that the next pass reads. This one asks for them little by little, so that they are on their way to the second
  // cache all the time.
  struct Next {
    const T* rows;
    int64_t stride, count, width;

    void ask(int64_t first, int64_t many) const {
      for (int64_t s = first; s < min_of(first + many, count); ++s) {
        const T* row = rows + s * stride;
        for (int64_t i = 0; i < width; i += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
      }
    }
  };

  // Scores of `rows` rows of q with lanes / rows columns, of which `count` exist.
  template <int rows>
  static void score_some(const E* q, int64_t depth, const T* k, int64_t stride, int64_t count, int64_t d, Acc* scores,
                         int64_t score_stride) {
    constexpr int columns = lanes / rows;
    const T* column[columns];
    for (int j = 0; j < columns; ++j) column[j] = k + min_of(j, count - 1) * stride;
    V sums[lanes] = {};
    const auto add = [&](int64_t i, int64_t inside) __attribute__((always_inline)) {
      V right[columns];
#pragma GCC unroll 16
      for (int j = 0; j < columns; ++j) right[j] = units(column[j] + i, inside);
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        V left;
        memcpy(&left, q + r * depth + i, sizeof(left));
#pragma GCC unroll 16
        for (int j = 0; j < columns; ++j) add_product(sums[r * columns + j], left, right[j]);
      }
    };
    int64_t i = 0;
    for (; i + kStep <= d; i += kStep) add(i, kStep);
    if (i < d) add(i, d - i);
    const V all = sums_of(sums);
    for (int r = 0; r < rows; ++r) {
      memcpy(scores + r * score_stride, reinterpret_cast<const char*>(&all) + r * columns * sizeof(Acc),
             columns * sizeof(Acc));
    }
  }

  template <int rows>
  static void score_rows(const Plan& plan, int64_t row, const HeadView& k, int64_t d, int64_t column, int64_t count,
                         const Next& next) {
    constexpr int columns = lanes / rows;
    for (int64_t s = 0; s < count; s += columns) {
      next.ask(s, columns);
      score_some<rows>(plan.q + row * plan.depth, plan.depth, k.at<T>(0, column + s), k.row_stride, count - s, d,
                       plan.scores + row * plan.stride + s, plan.stride);
    }
  }

  static void score(const Plan& plan, const HeadView& k, int64_t d, int64_t column, int64_t count, Next next) {
    for (int64_t row = 0; row < plan.rows; next.count = 0) {  // only the first rows ask
      const int64_t left = plan.rows - row;
      if (left >= 4 && lanes >= 4) {
        score_rows<kMostTogether>(plan, row, k, d, column, count, next);
        row += kMostTogether;
      } else if (left >= 2) {
        score_rows<2>(plan, row, k, d, column, count, next);
        row += 2;
      } else {
        score_rows<1>(plan, row++, k, d, column, count, next);
      }
    }
  }

  // Rows of v that are multiplied together: one, or two that are interleaved to pairs, in the order that costs least.
  struct Lines {
    V of[kPair];
  };
  static Lines lines_of(const T* v, [[maybe_unused]] int64_t stride, [[maybe_unused]] bool both, int64_t count) {
    const V upper = units(v, count);
#if PYMM_ISA_LEVEL >= 3
    if constexpr (kPair == 2) {
      const V lower = both ? units(v + stride, count) : V{};
      return {{(V)_mm512_unpacklo_epi16((__m512i)upper, (__m512i)lower),
               (V)_mm512_unpackhi_epi16((__m512i)upper, (__m512i)lower)}};
    }
#endif
    return {{upper}};
  }

  // Sums from the order of lines_of to that of memory, or back.
  static Lines in_order(const Lines& lines) {
#if PYMM_ISA_LEVEL >= 3
    if constexpr (kPair == 2) {
      const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
      return {{(V)_mm512_permutex2var_ps((__m512)lines.of[0], first, (__m512)lines.of[1]),
               (V)_mm512_permutex2var_ps((__m512)lines.of[0], second, (__m512)lines.of[1])}};
    }
#endif
    return lines;
  }
  static Lines out_of_order(const Lines& lines) {
#if PYMM_ISA_LEVEL >= 3
    if constexpr (kPair == 2) {
      const __m512i first = _mm512_setr_epi32(0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27);
      const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
      return {{(V)_mm512_permutex2var_ps((__m512)lines.of[0], first, (__m512)lines.of[1]),
               (V)_mm512_permutex2var_ps((__m512)lines.of[0], second, (__m512)lines.of[1])}};
    }
#endif
    return lines;
  }

  // out[rows, some columns] += weights . v, `count` elements of a row of v.
  template <int rows, bool whole>
  static void add_weighted(const E* weights, int64_t weight_stride, const T* v, int64_t stride, int64_t columns,
                           int64_t count, Acc* out, int64_t width, const Next& next) {
    Lines sums[rows][kLines];
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < kLines; ++n) {
        for (int i = 0; i < kPair; ++i) sums[r][n].of[i] = load(out + r * width + n * kStep + i * lanes);
        sums[r][n] = out_of_order(sums[r][n]);
      }
    }
    for (int64_t s = 0; s < columns; s += kPair, v += kPair * stride) {
      next.ask(s, kPair);
      Lines line[kLines];
#pragma GCC unroll 2
      for (int n = 0; n < kLines; ++n) {
        line[n] = lines_of(v + n * kStep, stride, s + 1 < columns, whole ? kStep : count - n * kStep);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 2
        for (int n = 0; n < kLines; ++n) {
#pragma GCC unroll 2
          for (int i = 0; i < kPair; ++i)
            multiply_add(sums[r][n].of[i], weights + r * weight_stride + s, line[n].of[i]);
        }
      }
    }
    for (int r = 0; r < rows; ++r) {
      for (int n = 0; n < kLines; ++n) {
        sums[r][n] = in_order(sums[r][n]);
        for (int i = 0; i < kPair; ++i) store(out + r * width + n * kStep + i * lanes, sums[r][n].of[i]);
      }
    }
  }

  template <int rows>
  static void add_weighted_rows(const E* weights, int64_t weight_stride, const T* v, int64_t stride, int64_t columns,
                                int64_t dv, Acc* out, int64_t width, Next next) {
    for (int64_t d = 0; d < dv; d += kLines * kStep, next.count = 0) {
      if (d + kLines * kStep <= dv) {
        add_weighted<rows, true>(weights, weight_stride, v + d, stride, columns, 0, out + d, width, next);
      } else {
        add_weighted<rows, false>(weights, weight_stride, v + d, stride, columns, dv - d, out + d, width, next);
      }
    }
  }

  static void add_weighted_block(const Plan& plan, const HeadView& v, int64_t dv, int64_t column, int64_t columns,
                                 Acc* out, Next next) {
    const int64_t weight_stride = plan.stride * Blocks::kNarrowing;
    const E* weights = reinterpret_cast<const E*>(plan.scores);
    const T* from = v.at<T>(0, column);
    for (int64_t r = 0; r < plan.rows;) {
      const int64_t left = plan.rows - r;
      const auto add = [&](auto&& of_rows, int64_t count) {
        of_rows(weights + r * weight_stride, weight_stride, from, v.row_stride, columns, dv, out + r * plan.width,
                plan.width, next);
        r += count;
        next.count = 0;
      };
      if (left >= 4) {
        add(add_weighted_rows<4>, 4);
      } else if (left >= 2) {
        add(add_weighted_rows<2>, 2);
      } else {
        add(add_weighted_rows<1>, 1);
      }
    }
  }

  static void run(const AttentionCall& call, const AttentionHead& head, int64_t first, int64_t columns, void* result,
                  void* scratch) {
    Parts parts(scratch), of_part(result);
    const Plan plan(call, head, parts);
    const Part part(plan, of_part);
    RowBlock block;
    Blocks::lay(call, head, 0, plan.rows, first, columns, block);
    Blocks::pack_block(head.q, head, 0, block, call.d, plan.q, plan.depth);
    memset(part.out, 0, static_cast<size_t>(plan.padded * plan.width) * sizeof(Acc));
    for (int64_t r = 0; r < plan.padded; ++r) {
      part.sums[r] = 0;
      part.maxima[r] = -Blocks::kInfinity;
    }
    for (int64_t done = 0; done < columns; done += kColumns) {
      Blocks::lay(call, head, 0, plan.rows, first + done, min_of(kColumns, columns - done), block);
      if (block.most == 0) continue;
      for (int64_t r = 0; r < plan.padded; r += Blocks::kTileRows) block.tile_seen[r / Blocks::kTileRows] = block.most;
      score(plan, head.k, call.d, first + done, block.most,
            {head.v.at<T>(0, first + done), head.v.row_stride, block.most, call.dv});
      Blocks::softmax(call, head, block, first + done, true, {plan.scores, plan.stride, plan.factors},
                      {part.maxima, part.sums, part.out, plan.width});
      const int64_t after = done + kColumns;
      add_weighted_block(
          plan, head.v, call.dv, first + done, block.most, part.out,
          {head.k.at<T>(0, first + after), head.k.row_stride, min_of(kColumns, columns - after), call.d});
    }
  }

  static void join(const AttentionCall& call, const AttentionHead& head, const AttentionForward& to,
                   const void* results, int64_t apart, int64_t count) {
    Parts unused(nullptr);
    const Plan plan(call, head, unused);
    const auto part_at = [&](int64_t i) {
      Parts parts(const_cast<char*>(static_cast<const char*>(results)) + i * apart);
      return Part(plan, parts);
    };
    for (int64_t r = 0; r < plan.rows; ++r) {
      const int64_t query_head = r / head.rows, t = r % head.rows;
      Acc maximum = -Blocks::kInfinity;
      for (int64_t i = 0; i < count; ++i) maximum = max_of_two(part_at(i).maxima[r], maximum);
      const auto factor_of = [&](const Part& part) {
        return part.maxima[r] == maximum ? Acc{1} : vexp2(broadcast<Acc>(part.maxima[r] - maximum))[0];
      };
      Acc sum = 0;
      for (int64_t i = 0; i < count; ++i) {
        const Part part = part_at(i);
        if (part.sums[r] != 0) sum += factor_of(part) * part.sums[r];
      }
      const bool nowhere = sum == 0;
      static_cast<Acc*>(to.lse)[query_head * to.lse_stride + t] =
          nowhere ? -Blocks::kInfinity : Blocks::log_sum_exp(maximum, sum);
      const Acc inverse = nowhere ? Acc{0} : 1 / sum;
      T* row = to.out.at<T>(query_head, t);
      for (int64_t d = 0; d < call.dv; d += lanes) {
        V total{};
        for (int64_t i = 0; i < count; ++i) {
          const Part part = part_at(i);
          if (part.sums[r] != 0) total += broadcast<Acc>(factor_of(part)) * load(part.out + r * plan.width + d);
        }
        store_some(row + d, total * inverse, call.dv - d);
      }
    }
  }
  static Acc max_of_two(Acc a, Acc b) { return a > b ? a : b; }

  static constexpr AttentionDecodeKernels table{&bytes, &part_bytes, &run, &join};
};

}  // namespace

const AttentionDecodeTable& attention_decode_table() {
  static constexpr AttentionDecodeTable table{
      {Decode<float>::table, Decode<double>::table, Decode<bf16>::table, Decode<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA
