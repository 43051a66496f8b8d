// Attention's backward on tensor cores.
//
// A warp owns 16 rows of q for dq, of k for dk and dv; a block goes over tiles of the other side in two stages, the
// next copied while one is multiplied. Weights beyond the edges are 0. Each gradient is written by the block that owns
// it.
#pragma once

#include "cuda/attention_tensor.h"

namespace pymm::cuda {

template <int kWidth, int kStream>
constexpr int64_t backward_bytes() {
  return 2 * Layout<kWidth>::template kBytes<kOwnRows> + 4 * Layout<kWidth>::template kBytes<kStream> +
         4 * kStream * int64_t{sizeof(float)};
}

// The log-sum-exp of a row in base 2, infinite where the row does not exist or attends nowhere: its weights are 0.
template <class T>
PYMM_DEVICE float shift_of(const Span& span, const Gradients<T>& g, int64_t h, int t) {
  const float lse = t < span.rows ? g.lse[span.statistics(h) + t] : -INFINITY;
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
}

// And its delta.
template <class T>
PYMM_DEVICE float delta_of(const Span& span, const Gradients<T>& g, int64_t h, int t) {
  return t < span.rows ? g.delta[span.statistics(h) + t] : 0.0f;
}

// dk and dv of 64 columns (kKeys), streaming q and dout of all heads that share them; or dq of 64 rows, streaming k and
// v. Own rows times the stream's are the scores or their transpose, and dp likewise.
template <class T, int kWidth, int kStream, bool kKeys>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kAttentionThreads) void tensor_backward_kernel(Call c, Gradients<T> g, int64_t tiles) {
  PYMM_DYNAMIC_SHARED(shared);
  constexpr int64_t kOwnBytes = Layout<kWidth>::template kBytes<kOwnRows>,
                    kTileBytes = Layout<kWidth>::template kBytes<kStream>;
  unsigned char *const own = shared, *const streams = shared + 2 * kOwnBytes;
  float* const statistics = reinterpret_cast<float*>(streams + 4 * kTileBytes);  // of kKeys' streamed rows
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int width = static_cast<int>(c.width), value_width = static_cast<int>(c.value_width);
  const Place at(kKeys ? c.of_columns : c.of_rows, tiles, kKeys ? c.groups : c.heads);
  const Span span(c, at.of);
  const int own_end = kKeys ? span.columns : span.rows;
  if (at.row >= own_end) return;
  const int64_t sharing = c.heads / c.groups;
  const int begin = kKeys ? span.first_row(at.row) / kStream * kStream : 0;
  const int end = kKeys ? span.rows : span.columns_of(at.row + kOwnRows - 1);
  const int per_head = end > begin ? (end - begin + kStream - 1) / kStream : 0;
  const int64_t count = kKeys ? per_head * sharing : per_head;
  const HeadRows<const T>&own_1 = kKeys ? g.k : g.q, &own_2 = kKeys ? g.v : g.dout;
  const HeadRows<const T>&stream_1 = kKeys ? g.q : g.k, &stream_2 = kKeys ? g.dout : g.v;
  const auto own_at = [&](const auto& x, int row) {
    return kKeys ? span.column_at(x, at.h, row) : span.row_at(x, at.h, row);
  };
  const auto stream_at = [&](const auto& x, int64_t h, int row) {
    return kKeys ? span.row_at(x, h, row) : span.column_at(x, h, row);
  };
  const auto head_of = [&](int64_t step) { return kKeys ? at.h * sharing + step / per_head : at.h; };
  const auto first_of = [&](int64_t step) { return begin + static_cast<int>(step % per_head) * kStream; };
  const auto fetch = [&](int64_t step, int stage) {
    const int first = first_of(step);
    const int64_t h = kKeys ? head_of(step) : c.key_head(at.h);
    unsigned char* const to = streams + 2 * stage * kTileBytes;
    copy_rows<T, kWidth, kStream>(to, stream_at(stream_1, h, first), stream_1.row, stream_1.aligned, end - first,
                                  width);
    copy_rows<T, kWidth, kStream>(to + kTileBytes, stream_at(stream_2, h, first), stream_2.row, stream_2.aligned,
                                  end - first, value_width);
    if (kKeys && threadIdx.x < kStream) {
      const int t = first + static_cast<int>(threadIdx.x);
      statistics[2 * stage * kStream + threadIdx.x] = shift_of(span, g, h, t);
      statistics[(2 * stage + 1) * kStream + threadIdx.x] = delta_of(span, g, h, t);
    }
  };
  copy_rows<T, kWidth, kOwnRows>(own, own_at(own_1, at.row), own_1.row, own_1.aligned, own_end - at.row, width);
  copy_rows<T, kWidth, kOwnRows>(own + kOwnBytes, own_at(own_2, at.row), own_2.row, own_2.aligned, own_end - at.row,
                                 value_width);
  if (count > 0) fetch(0, 0);
  commit_copies();
  const int rows[2] = {at.row + warp * 16 + lane / 4, at.row + warp * 16 + lane / 4 + 8};
  const float scale = static_cast<float>(c.scale) * kLog2e;
  float shift[2] = {}, delta[2] = {};
  PYMM_UNROLL
  for (int half = 0; half < 2 && !kKeys; ++half) {
    shift[half] = shift_of(span, g, at.h, rows[half]);
    delta[half] = delta_of(span, g, at.h, rows[half]);
  }
  float sums_1[kWidth / 8][4] = {};
  float sums_2[kKeys ? kWidth / 8 : 1][4] = {};
  int stage = 0;
  for (int64_t step = 0; step < count; ++step) {
    wait_for_copies<0>();
    PYMM_SYNC();
    if (step + 1 < count) fetch(step + 1, 1 - stage);
    commit_copies();
    const unsigned char* const tile = streams + 2 * stage * kTileBytes;
    const int first = first_of(step), some = end - first;
    float x[kStream / 8][4] = {}, dp[kStream / 8][4] = {};
    add_scores<T, kWidth, kStream>(x, own, warp * 16, tile, some, width);
    add_scores<T, kWidth, kStream>(dp, own + kOwnBytes, warp * 16, tile + kTileBytes, some, value_width);
    const Head<T> head(span, head_of(step));
    const bool plain = kKeys ? span.plain(first, first + kStream, at.row, at.row + kOwnRows)
                             : span.plain(at.row, at.row + kOwnRows, first, first + kStream);
    PYMM_UNROLL
    for (int n = 0; n < kStream / 8; ++n) {
      PYMM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        const int t = kKeys ? first + column : rows[i / 2], s = kKeys ? rows[i / 2] : first + column;
        const float of_row = kKeys ? statistics[2 * stage * kStream + column] : shift[i / 2];
        const float offset = kKeys ? statistics[(2 * stage + 1) * kStream + column] : delta[i / 2];
        const float p = exp2f((plain ? x[n][i] * scale : head.logit(t, s, x[n][i]) * kLog2e) - of_row);
        const float factor = c.seed == nullptr ? 1.0f : head.factor(t, s);
        x[n][i] = p * factor;
        dp[n][i] = p * (dp[n][i] * factor - offset);
      }
    }
    add_weighted<T, kWidth, kStream>(sums_1, dp, tile, some, width);
    if constexpr (kKeys) add_weighted<T, kWidth, kStream>(sums_2, x, tile + kTileBytes, some, value_width);
    stage = 1 - stage;
  }
  wait_for_copies<0>();
  const float by_scale[2] = {static_cast<float>(c.scale), static_cast<float>(c.scale)}, by_one[2] = {1, 1};
  const int row = at.row + warp * 16, left = own_end - row;
  const HeadRows<T>& result = kKeys ? g.dk : g.dq;
  store_rows<T, kWidth>(own_at(result, row), result.row, result.aligned, left, width, by_scale, sums_1);
  if constexpr (kKeys) {
    store_rows<T, kWidth>(own_at(g.dv, row), g.dv.row, g.dv.aligned, left, value_width, by_one, sums_2);
  }
}

template <int kWidth>
constexpr int64_t mask_bytes() {
  const int64_t tiles = 4 * Layout<kWidth>::template kBytes<kOwnRows>,
                sums = kOwnRows * (kOwnRows + 1) * int64_t{sizeof(float)};
  return tiles > sums ? tiles : sums;
}

// One block per tile of 64 x 64 of the mask's gradient; it goes over whatever the mask is broadcast to.
template <class T, int kWidth>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kAttentionThreads) void tensor_mask_kernel(Call c, Gradients<T> g, MaskShape m,
                                                                           void* dmask, int64_t tiles_t,
                                                                           int64_t tiles_s) {
  PYMM_DYNAMIC_SHARED(shared);
  constexpr int64_t kBytes = Layout<kWidth>::template kBytes<kOwnRows>;
  const int lane = lane_id(), warp = static_cast<int>(threadIdx.x) / kWarp;
  const int width = static_cast<int>(c.width), value_width = static_cast<int>(c.value_width);
  const int t_first = static_cast<int>(blockIdx.x % tiles_t * kOwnRows);
  const int s_first = static_cast<int>(blockIdx.x / tiles_t % tiles_s * kOwnRows);
  const int64_t own_h = blockIdx.x / tiles_t / tiles_s % m.heads, own_b = blockIdx.x / tiles_t / tiles_s / m.heads;
  const int64_t b_end = m.batch == 1 ? c.batch : own_b + 1, h_end = m.heads == 1 ? c.heads : own_h + 1;
  float sums[kOwnRows / 8][4] = {};
  for (int64_t b = own_b; b < b_end; ++b) {
    const Span span(c, b);
    const int t_end = m.rows == 1 ? span.rows : t_first + 1, s_end = m.columns == 1 ? span.columns : s_first + 1;
    for (int64_t h = own_h; h < h_end; ++h) {
      const Head<T> head(span, h);
      const int64_t key_head = c.key_head(h);
      for (int t = t_first; t < t_end; t += kOwnRows) {
        for (int s = s_first; s < s_end; s += kOwnRows) {
          const auto copy = [&](const HeadRows<const T>& x, const T* from, int left, int of_width, int place) {
            copy_rows<T, kWidth, kOwnRows>(shared + place * kBytes, from, x.row, x.aligned, left, of_width);
          };
          PYMM_SYNC();
          copy(g.q, span.row_at(g.q, h, t), span.rows - t, width, 0);
          copy(g.dout, span.row_at(g.dout, h, t), span.rows - t, value_width, 1);
          copy(g.k, span.column_at(g.k, key_head, s), span.columns - s, width, 2);
          copy(g.v, span.column_at(g.v, key_head, s), span.columns - s, value_width, 3);
          commit_copies();
          wait_for_copies<0>();
          PYMM_SYNC();
          float x[kOwnRows / 8][4] = {}, dp[kOwnRows / 8][4] = {};
          const int some = span.columns - s;
          add_scores<T, kWidth, kOwnRows>(x, shared, warp * 16, shared + 2 * kBytes, some, width);
          add_scores<T, kWidth, kOwnRows>(dp, shared + kBytes, warp * 16, shared + 3 * kBytes, some, value_width);
          PYMM_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int row = t + warp * 16 + lane / 4 + half * 8;
            const float shift = shift_of(span, g, h, row), delta = delta_of(span, g, h, row);
            PYMM_UNROLL
            for (int n = 0; n < kOwnRows / 8; ++n) {
              PYMM_UNROLL
              for (int i = half * 2; i < half * 2 + 2; ++i) {
                const int column = s + n * 8 + lane % 4 * 2 + i % 2;
                const float p = exp2f(head.logit(row, column, x[n][i]) * kLog2e - shift);
                const float factor = c.seed == nullptr ? 1.0f : head.factor(row, column);
                sums[n][i] += p * (dp[n][i] * factor - delta);
              }
            }
          }
        }
      }
    }
  }
  PYMM_SYNC();
  auto& on_chip = *reinterpret_cast<float (*)[kOwnRows][kOwnRows + 1]>(shared);
  PYMM_UNROLL
  for (int n = 0; n < kOwnRows / 8; ++n) {
    PYMM_UNROLL
    for (int i = 0; i < 4; ++i) on_chip[warp * 16 + lane / 4 + i / 2 * 8][n * 8 + lane % 4 * 2 + i % 2] = sums[n][i];
  }
  PYMM_SYNC();
  store_mask<T>(m, own_b, own_h, t_first, s_first, on_chip, static_cast<int>(threadIdx.x), kAttentionThreads,
                c.mask_kind == kWideBias, dmask);
}

}  // namespace pymm::cuda
