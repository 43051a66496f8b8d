// The blocks of attention's backward pass, their scratch memory, and what is known of each row beforehand.
#pragma once

#include "cpu/simd/attention_gradient.h"

namespace pymm::PYMM_ISA {

constexpr int64_t kBackwardRows = 320, kChunkColumns = 320;  // multiples of 64
constexpr int64_t kRowsAhead = 8;                            // that are fetched

// An odd number of cache lines, so that rows above each other do not fall into one set of L1.
template <class U>
inline int64_t odd_lines(int64_t count) {
  constexpr int64_t line = 64 / static_cast<int64_t>(sizeof(U));
  return (ceil_div(count, line) | 1) * line;
}

template <class T>
struct BackwardPlan {
  using Blocks = AttentionBlocks<T>;
  using Gradient = AttentionGradient<T>;
  using Acc = typename Blocks::Acc;
  using E = typename Blocks::E;
  using Number = typename Gradient::Number;
  static constexpr int lanes = Blocks::lanes;
  static constexpr int64_t kKeys = Gradient::kKeys, kRowAlign = Blocks::kWeightPad;

  int64_t rows, block;      // rows of the heads, and of a block
  int64_t columns, chunk;   // keys of the range, and of a chunk
  int64_t depth, depth_v;   // of rows of k and v
  int64_t width, width_v;   // of rows of units of q and dout, and of dk's and dv's accumulators
  int64_t turned;           // rows of k^T and of dq^T
  int64_t ld, ld_k, ld_dq;  // from row to row of weights and ds, of k^T, of dq^T
  bool single;              // one block of rows
  bool has_added;           // masks that are more than a bool per key
  T* staged;
  E *q, *dout, *q_units, *dout_units, *k, *v, *k_turned, *weights, *ds, *units;
  Acc *scores, *dp, *dq, *dk, *dv, *shift, *offset, *added, *factors, *ds_sums;
  Number *seen, *most, *fewest;
  Acc power = 1;  // that ds is held times

  BackwardPlan(const AttentionCall& call, const AttentionHead& head, int64_t range, bool mask_gradient, Parts& parts) {
    rows = call.heads * head.rows;
    columns = range;
    const int64_t blocks = max_of(1, ceil_div(rows, kBackwardRows)), chunks = ceil_div(columns, kChunkColumns);
    single = blocks == 1;
    block = round_up(ceil_div(rows, blocks), kRowAlign);
    chunk = chunks > 1 ? round_up(ceil_div(columns, chunks), kKeys) : columns;
    depth = round_up(call.d, Blocks::kUnit);
    depth_v = round_up(call.dv, Blocks::kUnit);
    width = round_up(call.d, Blocks::kColumnUnit);
    width_v = round_up(call.dv, Blocks::kColumnUnit);
    turned = round_up(call.d, Blocks::kRowUnit);
    ld = odd_lines<E>(block);
    ld_k = odd_lines<E>(round_up(chunk, Blocks::kUnit));
    ld_dq = odd_lines<Acc>(block);
    has_added = head.bias_type != Bias::none || head.allowed.data;
    // Memory grows with the range, which chunks need not: a shorter range may have a longer one.
    const int64_t room = round_up(min_of(columns, kChunkColumns), kKeys),
                  kept = single ? kKeys : round_up(columns, kKeys);
    const int64_t panels = ceil_div(block, Blocks::kTileColumns);
    staged = parts.take<T>(call.heads > 1 ? block * max_of(call.d, call.dv) : 0);
    q = parts.take<E>(panels * panel_elements<T>(depth));
    dout = parts.take<E>(panels * panel_elements<T>(depth_v));
    q_units = parts.take<E>(block * width);
    dout_units = parts.take<E>(block * width_v);
    k = parts.take<E>(room * depth);
    v = parts.take<E>(room * depth_v);
    k_turned = parts.take<E>(turned * odd_lines<E>(room));
    weights = parts.take<E>(kKeys * ld);
    ds = parts.take<E>(Gradient::paired ? kKeys * ld : 0);
    units = parts.take<E>(room * ld);
    scores = parts.take<Acc>(Gradient::kTileElements);
    dp = parts.take<Acc>(Gradient::kTileElements);
    dq = parts.take<Acc>(turned * ld_dq + lanes);
    dk = parts.take<Acc>(kept * width);
    dv = parts.take<Acc>(kept * width_v);
    shift = parts.take<Acc>(round_up(rows, kRowAlign));
    offset = parts.take<Acc>(round_up(rows, kRowAlign));
    added = parts.take<Acc>(has_added ? kKeys * ld : 0);
    factors = parts.take<Acc>(call.dropout_p > 0 ? kKeys * ld : 0);
    ds_sums = parts.take<Acc>(mask_gradient ? kKeys * ld + lanes : 0);
    seen = parts.take<Number>(block);
    most = parts.take<Number>(block / lanes);
    fewest = parts.take<Number>(block / lanes);
  }
};

// The power of two that brings numbers up to `bound` to 2^14 at most; 1 where there is none.
inline float power_for(float bound) {
  const int exponent = static_cast<int>(bit_cast<uint32_t>(bound) >> 23) - 126;  // bound < 2^exponent
  if (exponent < -100 || exponent > 100) return 1;
  return bit_cast<float>(static_cast<uint32_t>(14 - exponent + 127) << 23);
}

template <class T>
inline void fetch_row(const T* row, int64_t width) {
  for (int64_t d = 0; d < width; d += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(row + d);
}

// Each row's log-sum-exp in powers of two, infinity where it attends nowhere, and sum(dout * out) - dlse. Waiting for
// dout and out, it fetches what is packed next.
template <class T>
void row_statistics(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                    BackwardPlan<T>& plan, int64_t first, int64_t columns) {
  using Blocks = AttentionBlocks<T>;
  using Gradient = AttentionGradient<T>;
  using Acc = typename Blocks::Acc;
  using V = typename Blocks::V;
  constexpr int lanes = Blocks::lanes;
  [[maybe_unused]] const auto larger = [](Acc a, Acc b) { return b > a ? b : a; };
  Acc largest_dout = 0, largest_offset = 0;  // squared norm, magnitude
  for_runs(0, plan.rows, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
    const int64_t at = query_head * with.lse_stride + t;
    const Acc* lse = static_cast<const Acc*>(with.lse) + at;
    const Acc* dlse = with.dlse ? static_cast<const Acc*>(with.dlse) + at : nullptr;
    for (int64_t i = 0; i < run; ++i) {
      const T *g = with.dout.at<T>(query_head, t + i), *o = with.out.at<T>(query_head, t + i);
      if (i + kRowsAhead < run) {
        fetch_row(with.dout.at<T>(query_head, t + i + kRowsAhead), call.dv);
        fetch_row(with.out.at<T>(query_head, t + i + kRowsAhead), call.dv);
      }
      fetch_row(head.q.at<T>(query_head, t + i), call.d);
      if (done + i < min_of(columns, kChunkColumns)) {
        fetch_row(head.k.at<T>(0, first + done + i), call.d);
        fetch_row(head.v.at<T>(0, first + done + i), call.dv);
      }
      V sum{}, squares{};
      for (int64_t d = 0; d < call.dv; d += lanes) {
        const V value = load_some(g + d, call.dv - d);
        sum += value * load_some(o + d, call.dv - d);
        if constexpr (Gradient::ds_is_scaled) squares += value * value;
      }
      plan.shift[done + i] = lse[i] == -Blocks::kInfinity ? Blocks::kInfinity : lse[i] * static_cast<Acc>(kLog2e);
      plan.offset[done + i] = reduce_add(sum) - (dlse ? dlse[i] : Acc{0});
      if constexpr (Gradient::ds_is_scaled) {
        largest_dout = larger(largest_dout, reduce_add(squares));
        largest_offset = larger(largest_offset, __builtin_fabsf(plan.offset[done + i]));
      }
    }
  });
  if constexpr (Gradient::ds_is_scaled) {
    Acc largest_v = 0;
    for (int64_t column = first; column < first + columns; ++column) {
      const T* row = head.v.at<T>(0, column);
      V squares{};
      for (int64_t d = 0; d < call.dv; d += lanes) {
        const V value = load_some(row + d, call.dv - d);
        squares += value * value;
      }
      largest_v = larger(largest_v, reduce_add(squares));
    }
    const Acc kept = call.dropout_p < 1 ? static_cast<Acc>(1 / (1 - call.dropout_p)) : Acc{0};
    plan.power = power_for(kept * __builtin_sqrtf(largest_dout) * __builtin_sqrtf(largest_v) + largest_offset);
  }
}

}  // namespace pymm::PYMM_ISA
