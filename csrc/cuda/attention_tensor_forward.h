// Attention's forward on tensor cores.
//
// The flash scheme: a block owns 64 rows of q and goes over the columns, tiles of k and v in two stages, the next
// copied while one is multiplied. Short rows of scores (kWhole) are one tile, so nothing is rescaled. Weights beyond
// the edges are 0.
#pragma once

#include "cuda/attention_tensor.h"

namespace pymm::cuda {

constexpr int kWholeColumns = 272;  // up to which a row's scores stay in registers

template <int kWidth, int kColumns, bool kWhole>
constexpr int64_t forward_bytes() {
  return Layout<kWidth>::template kBytes<kOwnRows> + Layout<kWidth>::template kBytes<kColumns> * (kWhole ? 2 : 4);
}

// kWhole: all columns are one tile, and neither mask, key padding nor dropout is there.
template <class T, int kWidth, int kColumns, bool kWhole>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kAttentionThreads) void tensor_forward_kernel(Call c, HeadRows<const T> q,
                                                                              HeadRows<const T> k, HeadRows<const T> v,
                                                                              HeadRows<T> out, float* lse,
                                                                              int64_t tiles) {
  PYMM_DYNAMIC_SHARED(shared);
  constexpr int64_t kTileBytes = Layout<kWidth>::template kBytes<kColumns>;
  unsigned char* const streams = shared + Layout<kWidth>::template kBytes<kOwnRows>;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int width = static_cast<int>(c.width), value_width = static_cast<int>(c.value_width);
  const Place at(c.of_rows, tiles, c.heads);
  const Span span(c, at.of);
  if (at.row >= span.rows) return;
  const Head<T> head(span, at.h);
  const int64_t key_head = c.key_head(at.h);
  const int end = span.columns_of(at.row + kOwnRows - 1);
  const T *keys = span.column_at(k, key_head, 0), *values = span.column_at(v, key_head, 0);
  const auto fetch = [&](int first, int stage) {
    copy_rows<T, kWidth, kColumns>(streams + 2 * stage * kTileBytes, keys + first * k.row, k.row, k.aligned,
                                   span.columns - first, width);
    copy_rows<T, kWidth, kColumns>(streams + (2 * stage + 1) * kTileBytes, values + first * v.row, v.row, v.aligned,
                                   span.columns - first, value_width);
  };
  copy_rows<T, kWidth, kOwnRows>(shared, span.row_at(q, at.h, at.row), q.row, q.aligned, span.rows - at.row, width);
  if (end > 0) fetch(0, 0);
  commit_copies();
  const float scale = static_cast<float>(c.scale) * kLog2e, lowest = -INFINITY;
  const int rows[2] = {at.row + warp * 16 + lane / 4, at.row + warp * 16 + lane / 4 + 8};
  float sums[kWidth / 8][4] = {}, top[2] = {lowest, lowest}, total[2] = {};
  int stage = 0;
  for (int first = 0; first < end; first += kColumns) {
    wait_for_copies<0>();
    PYMM_SYNC();
    if (!kWhole && first + kColumns < end) fetch(first + kColumns, 1 - stage);
    commit_copies();
    float x[kColumns / 8][4] = {};
    const int some = end - first;
    const unsigned char* const tile = streams + 2 * stage * kTileBytes;
    add_scores<T, kWidth, kColumns>(x, shared, warp * 16, tile, some, width);
    const bool plain = span.plain(at.row, at.row + 1, first, first + kColumns);
    PYMM_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      PYMM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int s = first + n * 8 + lane % 4 * 2 + i % 2;
        if (plain) {
          x[n][i] *= scale;
        } else if constexpr (kWhole) {
          const bool allowed = s < span.columns && (c.causal == 0 || s <= rows[i / 2] + span.surplus);
          x[n][i] = allowed ? x[n][i] * scale : lowest;
        } else {
          x[n][i] = head.logit(rows[i / 2], s, x[n][i]) * kLog2e;
        }
      }
    }
    PYMM_UNROLL
    for (int half = 0; half < 2; ++half) {
      float higher = top[half];
      PYMM_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) higher = fmaxf(higher, fmaxf(x[n][half * 2], x[n][half * 2 + 1]));
      higher = warp_max<4>(higher);
      const float shift = higher == lowest ? 0.0f : higher, before = exp2f(top[half] - shift);
      float sum = 0;
      PYMM_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        PYMM_UNROLL
        for (int i = half * 2; i < half * 2 + 2; ++i) {
          x[n][i] = exp2f(x[n][i] - shift);
          sum += x[n][i];
        }
      }
      total[half] = total[half] * before + warp_sum<4>(sum);
      top[half] = higher;
      if constexpr (!kWhole) {
        PYMM_UNROLL
        for (int n = 0; n < kWidth / 8; ++n) {
          sums[n][half * 2] *= before;
          sums[n][half * 2 + 1] *= before;
        }
      }
    }
    if (!kWhole && c.seed != nullptr) {
      PYMM_UNROLL
      for (int n = 0; n < kColumns / 8; ++n) {
        PYMM_UNROLL
        for (int i = 0; i < 4; ++i) x[n][i] *= head.factor(rows[i / 2], first + n * 8 + lane % 4 * 2 + i % 2);
      }
    }
    add_weighted<T, kWidth, kColumns>(sums, x, tile + kTileBytes, some, value_width);
    stage = 1 - stage;
  }
  wait_for_copies<0>();
  float inverse[2];
  PYMM_UNROLL
  for (int half = 0; half < 2; ++half) {
    inverse[half] = total[half] > 0 ? 1 / total[half] : 0.0f;
    if (lane % 4 == 0 && rows[half] < span.rows) {
      lse[span.statistics(at.h) + rows[half]] = total[half] > 0 ? top[half] / kLog2e + logf(total[half]) : lowest;
    }
  }
  const int row = at.row + warp * 16;
  store_rows<T, kWidth>(span.row_at(out, at.h, row), out.row, out.aligned, span.rows - row, value_width, inverse, sums);
}

}  // namespace pymm::cuda
