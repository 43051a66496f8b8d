// Attention on tensor cores: bfloat16 and float16, heads of up to 128 numbers.
//
// Parallel: blocks of four warps; a warp owns 16 rows of the block's 64, of q in forward and for dq, of k for dk and
// dv. On chip: the block's own rows, and tiles of the other side in two stages, the next copied while one is
// multiplied; in registers the scores, which are the second product's operand as they stand, and the results. Forward
// is the flash scheme; short rows of scores (kWhole) are one tile, so nothing is rescaled. Bytes: a block's own rows
// once, the other side once per block, which L2 serves. Ragged edges: beyond the width, the rows and the columns tiles
// hold zeros, whole steps of 16 of them are left out, and weights are 0. Each gradient is written by the block that
// owns it.
#pragma once

#include "cuda/attention.h"
#include "cuda/tensor_tile.h"

namespace pymm::cuda {

constexpr int kWarps = 4, kAttentionThreads = kWarps * kWarp, kOwnRows = kWarps * 16;
constexpr int kWholeColumns = 272;  // up to which a row's scores stay in registers
constexpr float kLog2e = 1.4426950408889634f;

// Starts to copy kRows rows, of which `left` exist, of `width` numbers.
template <class T, int kWidth, int kRows>
PYMM_DEVICE void copy_rows(unsigned char* shared, const T* from, int64_t stride, bool aligned, int64_t left,
                           int width) {
  using L = Layout<kWidth>;
  for (int i = static_cast<int>(threadIdx.x); i < kRows * L::kChunks; i += kAttentionThreads) {
    const int row = i / L::kChunks, chunk = i % L::kChunks, more = width - chunk * 8;
    const int numbers = row >= left || more <= 0 ? 0 : more < 8 ? more : 8;
    const T* source = from + row * stride + chunk * 8;
    unsigned char* target = shared + L::at(row, chunk);
    if (aligned) {
      copy_async(target, numbers > 0 ? source : from, numbers * 2);
    } else {
      for (int j = 0; j < 8; ++j) reinterpret_cast<T*>(target)[j] = j < numbers ? source[j] : from_float(0.0f, T{});
    }
  }
}

// sums (16, kColumns) += own rows . the tile's rows, of which the first `some` matter.
template <class T, int kWidth, int kColumns>
PYMM_DEVICE void add_scores(float (&sums)[kColumns / 8][4], const unsigned char* own, int row,
                            const unsigned char* tile, int64_t some, int width) {
  PYMM_UNROLL
  for (int step = 0; step < kWidth / 16; ++step) {
    if (step * 16 >= width) continue;
    uint32_t a[4], b[4];
    load_a<kWidth>(a, own, row, step);
    PYMM_UNROLL
    for (int n = 0; n < kColumns / 16; ++n) {
      if (n * 16 >= some) continue;
      load_b<kWidth>(b, tile, n * 16, step);
      mma_pair<T>(sums[2 * n], sums[2 * n + 1], a, b);
    }
  }
}

// sums (16, kWidth) += weights (16, kColumns) . the tile's rows, of which the first `some` matter.
template <class T, int kWidth, int kColumns>
PYMM_DEVICE void add_weighted(float (&sums)[kWidth / 8][4], const float (&weights)[kColumns / 8][4],
                              const unsigned char* tile, int64_t some, int width) {
  PYMM_UNROLL
  for (int k = 0; k < kColumns / 16; ++k) {
    if (k * 16 >= some) continue;
    const float (&left)[4] = weights[2 * k], (&right)[4] = weights[2 * k + 1];
    const uint32_t a[4] = {pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]),
                           pack<T>(right[2], right[3])};
    PYMM_UNROLL
    for (int n = 0; n < kWidth / 16; ++n) {
      if (n * 16 >= width) continue;
      uint32_t b[4];
      load_b_rows<kWidth>(b, tile, k * 16, n);
      mma_pair<T>(sums[2 * n], sums[2 * n + 1], a, b);
    }
  }
}

// Stores a warp's 16 rows from `row` on, times the scale of each half.
template <class T, int kWidth>
PYMM_DEVICE void store_rows(const HeadRows<T>& to, int64_t b, int64_t h, int64_t row, int64_t rows, int width,
                            const float (&scale)[2], const float (&sums)[kWidth / 8][4]) {
  const int lane = lane_id();
  PYMM_UNROLL
  for (int half = 0; half < 2; ++half) {
    const int64_t r = row + half * 8 + lane / 4;
    if (r >= rows) continue;
    T* target = to.at(b, h) + r * to.row;
    PYMM_UNROLL
    for (int n = 0; n < kWidth / 8; ++n) {
      const int d = n * 8 + lane % 4 * 2;
      const float low = sums[n][half * 2] * scale[half], high = sums[n][half * 2 + 1] * scale[half];
      if (to.aligned && d + 1 < width) {
        *reinterpret_cast<uint32_t*>(target + d) = pack<T>(low, high);
      } else {
        if (d < width) target[d] = from_float(low, T{});
        if (d + 1 < width) target[d + 1] = from_float(high, T{});
      }
    }
  }
}

// A block's place: tile of its own rows, head, batch.
struct OwnPlace {
  int64_t row, h, b;
  PYMM_DEVICE OwnPlace(int64_t tiles, int64_t heads)
      : row(blockIdx.x % tiles * kOwnRows), h(blockIdx.x / tiles % heads), b(blockIdx.x / tiles / heads) {}
};

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
  const OwnPlace at(tiles, c.heads);
  const Head<T> head(c, at.b, at.h);
  const int64_t end = c.columns_of(at.row + kOwnRows - 1), key_head = c.key_head(at.h);
  const T *keys = k.at(at.b, key_head), *values = v.at(at.b, key_head);
  const auto fetch = [&](int64_t first, int stage) {
    copy_rows<T, kWidth, kColumns>(streams + 2 * stage * kTileBytes, keys + first * k.row, k.row, k.aligned,
                                   c.columns - first, width);
    copy_rows<T, kWidth, kColumns>(streams + (2 * stage + 1) * kTileBytes, values + first * v.row, v.row, v.aligned,
                                   c.columns - first, value_width);
  };
  copy_rows<T, kWidth, kOwnRows>(shared, q.at(at.b, at.h) + at.row * q.row, q.row, q.aligned, c.rows - at.row, width);
  if (end > 0) fetch(0, 0);
  commit_copies();
  const float scale = static_cast<float>(c.scale) * kLog2e, lowest = -INFINITY;
  const int64_t rows[2] = {at.row + warp * 16 + lane / 4, at.row + warp * 16 + lane / 4 + 8};
  float sums[kWidth / 8][4] = {}, top[2] = {lowest, lowest}, total[2] = {};
  int stage = 0;
  for (int64_t first = 0; first < end; first += kColumns) {
    wait_for_copies<0>();
    PYMM_SYNC();
    if (!kWhole && first + kColumns < end) fetch(first + kColumns, 1 - stage);
    commit_copies();
    float x[kColumns / 8][4] = {};
    const int64_t some = end - first;
    const unsigned char* const tile = streams + 2 * stage * kTileBytes;
    add_scores<T, kWidth, kColumns>(x, shared, warp * 16, tile, some, width);
    const bool plain = c.plain(at.row, at.row + 1, first, first + kColumns);
    PYMM_UNROLL
    for (int n = 0; n < kColumns / 8; ++n) {
      PYMM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t s = first + n * 8 + lane % 4 * 2 + i % 2;
        if (plain) {
          x[n][i] *= scale;
        } else if constexpr (kWhole) {
          const bool allowed = s < c.columns && (c.causal == 0 || s <= rows[i / 2] + c.surplus);
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
    if (lane % 4 == 0 && rows[half] < c.rows) {
      lse[(at.b * c.heads + at.h) * c.rows + rows[half]] =
          total[half] > 0 ? top[half] / kLog2e + logf(total[half]) : lowest;
    }
  }
  store_rows<T, kWidth>(out, at.b, at.h, at.row + warp * 16, c.rows, value_width, inverse, sums);
}

template <int kWidth, int kStream>
constexpr int64_t backward_bytes() {
  return 2 * Layout<kWidth>::template kBytes<kOwnRows> + 4 * Layout<kWidth>::template kBytes<kStream> +
         4 * kStream * int64_t{sizeof(float)};
}

// The log-sum-exp of a row in base 2, infinite where the row does not exist or attends nowhere: its weights are 0.
template <class T>
PYMM_DEVICE float shift_of(const Call& c, const Gradients<T>& g, int64_t head, int64_t t) {
  const float lse = t < c.rows ? g.lse[head * c.rows + t] : -INFINITY;
  return lse == -INFINITY ? INFINITY : lse * kLog2e;
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
  const OwnPlace at(tiles, kKeys ? c.groups : c.heads);
  const int64_t sharing = c.heads / c.groups, own_end = kKeys ? c.columns : c.rows;
  const int64_t begin = kKeys ? c.first_row(at.row) / kStream * kStream : 0;
  const int64_t end = kKeys ? c.rows : c.columns_of(at.row + kOwnRows - 1);
  const int64_t per_head = end > begin ? (end - begin + kStream - 1) / kStream : 0;
  const int64_t count = kKeys ? per_head * sharing : per_head;
  const HeadRows<const T>&own_1 = kKeys ? g.k : g.q, &own_2 = kKeys ? g.v : g.dout;
  const HeadRows<const T>&stream_1 = kKeys ? g.q : g.k, &stream_2 = kKeys ? g.dout : g.v;
  const auto head_of = [&](int64_t step) { return kKeys ? at.h * sharing + step / per_head : at.h; };
  const auto first_of = [&](int64_t step) { return begin + step % per_head * kStream; };
  const auto fetch = [&](int64_t step, int stage) {
    const int64_t first = first_of(step), h = kKeys ? head_of(step) : c.key_head(at.h);
    unsigned char* const to = streams + 2 * stage * kTileBytes;
    copy_rows<T, kWidth, kStream>(to, stream_1.at(at.b, h) + first * stream_1.row, stream_1.row, stream_1.aligned,
                                  end - first, width);
    copy_rows<T, kWidth, kStream>(to + kTileBytes, stream_2.at(at.b, h) + first * stream_2.row, stream_2.row,
                                  stream_2.aligned, end - first, value_width);
    if (kKeys && threadIdx.x < kStream) {
      const int64_t t = first + threadIdx.x, number = at.b * c.heads + h;
      statistics[2 * stage * kStream + threadIdx.x] = shift_of(c, g, number, t);
      statistics[(2 * stage + 1) * kStream + threadIdx.x] = t < c.rows ? g.delta[number * c.rows + t] : 0.0f;
    }
  };
  copy_rows<T, kWidth, kOwnRows>(own, own_1.at(at.b, at.h) + at.row * own_1.row, own_1.row, own_1.aligned,
                                 own_end - at.row, width);
  copy_rows<T, kWidth, kOwnRows>(own + kOwnBytes, own_2.at(at.b, at.h) + at.row * own_2.row, own_2.row, own_2.aligned,
                                 own_end - at.row, value_width);
  if (count > 0) fetch(0, 0);
  commit_copies();
  const int64_t rows[2] = {at.row + warp * 16 + lane / 4, at.row + warp * 16 + lane / 4 + 8};
  const float scale = static_cast<float>(c.scale) * kLog2e;
  float shift[2] = {}, delta[2] = {};
  PYMM_UNROLL
  for (int half = 0; half < 2 && !kKeys; ++half) {
    const int64_t number = at.b * c.heads + at.h;
    shift[half] = shift_of(c, g, number, rows[half]);
    delta[half] = rows[half] < c.rows ? g.delta[number * c.rows + rows[half]] : 0.0f;
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
    const int64_t first = first_of(step), some = end - first;
    float x[kStream / 8][4] = {}, dp[kStream / 8][4] = {};
    add_scores<T, kWidth, kStream>(x, own, warp * 16, tile, some, width);
    add_scores<T, kWidth, kStream>(dp, own + kOwnBytes, warp * 16, tile + kTileBytes, some, value_width);
    const Head<T> head(c, at.b, head_of(step));
    const bool plain = kKeys ? c.plain(first, first + kStream, at.row, at.row + kOwnRows)
                             : c.plain(at.row, at.row + kOwnRows, first, first + kStream);
    PYMM_UNROLL
    for (int n = 0; n < kStream / 8; ++n) {
      PYMM_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int column = n * 8 + lane % 4 * 2 + i % 2;
        const int64_t t = kKeys ? first + column : rows[i / 2], s = kKeys ? rows[i / 2] : first + column;
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
  const int64_t row = at.row + warp * 16;
  store_rows<T, kWidth>(kKeys ? g.dk : g.dq, at.b, at.h, row, own_end, width, by_scale, sums_1);
  if constexpr (kKeys) store_rows<T, kWidth>(g.dv, at.b, at.h, row, own_end, value_width, by_one, sums_2);
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
  const int64_t t_first = blockIdx.x % tiles_t * kOwnRows, s_first = blockIdx.x / tiles_t % tiles_s * kOwnRows;
  const int64_t own_h = blockIdx.x / tiles_t / tiles_s % m.heads, own_b = blockIdx.x / tiles_t / tiles_s / m.heads;
  const int64_t b_end = m.batch == 1 ? c.batch : own_b + 1, h_end = m.heads == 1 ? c.heads : own_h + 1;
  const int64_t t_end = m.rows == 1 ? c.rows : t_first + 1, s_end = m.columns == 1 ? c.columns : s_first + 1;
  float sums[kOwnRows / 8][4] = {};
  for (int64_t b = own_b; b < b_end; ++b) {
    for (int64_t h = own_h; h < h_end; ++h) {
      const Head<T> head(c, b, h);
      const int64_t key_head = c.key_head(h), number = b * c.heads + h;
      for (int64_t t = t_first; t < t_end; t += kOwnRows) {
        for (int64_t s = s_first; s < s_end; s += kOwnRows) {
          const auto copy = [&](const HeadRows<const T>& x, int64_t of_head, int64_t first, int64_t rows, int of_width,
                                int place) {
            copy_rows<T, kWidth, kOwnRows>(shared + place * kBytes, x.at(b, of_head) + first * x.row, x.row, x.aligned,
                                           rows - first, of_width);
          };
          PYMM_SYNC();
          copy(g.q, h, t, c.rows, width, 0);
          copy(g.dout, h, t, c.rows, value_width, 1);
          copy(g.k, key_head, s, c.columns, width, 2);
          copy(g.v, key_head, s, c.columns, value_width, 3);
          commit_copies();
          wait_for_copies<0>();
          PYMM_SYNC();
          float x[kOwnRows / 8][4] = {}, dp[kOwnRows / 8][4] = {};
          const int64_t some = c.columns - s;
          add_scores<T, kWidth, kOwnRows>(x, shared, warp * 16, shared + 2 * kBytes, some, width);
          add_scores<T, kWidth, kOwnRows>(dp, shared + kBytes, warp * 16, shared + 3 * kBytes, some, value_width);
          PYMM_UNROLL
          for (int half = 0; half < 2; ++half) {
            const int64_t row = t + warp * 16 + lane / 4 + half * 8;
            const float shift = shift_of(c, g, number, row);
            const float delta = row < c.rows ? g.delta[number * c.rows + row] : 0.0f;
            PYMM_UNROLL
            for (int n = 0; n < kOwnRows / 8; ++n) {
              PYMM_UNROLL
              for (int i = half * 2; i < half * 2 + 2; ++i) {
                const int64_t column = s + n * 8 + lane % 4 * 2 + i % 2;
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
