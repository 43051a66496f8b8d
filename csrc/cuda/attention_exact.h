// Attention on the float units: float32 and float64, and heads that the tensor cores' kernels do not take.
//
// Parallel: one block of 16 x 16 threads per tile of 64 rows and per 64 numbers of the result's width (tile.h); what is
// wider makes its scores again. Forward is the flash scheme, 64 columns at a time. Backward: "rows" owns a tile of dq
// and goes over the columns, "columns" owns a tile of dk and dv and goes over the rows of all heads that share the key
// head, "mask" owns a tile of the mask and goes over what the mask is broadcast to; so nothing is added atomically. On
// chip: a tile of weights and a slab of each operand. Ragged edges: -inf in forward, weights of 0 in backward.
#pragma once

#include "cuda/attention.h"
#include "cuda/tensor_core.h"
#include "cuda/tile.h"

namespace pymm::cuda {

template <class Acc>
struct AttentionTile {
  Slabs<Acc> slabs;
  Acc weights[kTile][kTile + 1];
};

template <class Acc, class T>
PYMM_DEVICE void add_scores(AttentionTile<Acc>& tile, const Rows<Acc, const T>& a, const Rows<Acc, const T>& b,
                            int64_t depth, Acc (&sums)[kEach][kEach]) {
  add_product(tile.slabs, depth, false, a, false, b, sums);
}

// sums += weights . x for the numbers of x's rows from `first` on; `x` ends after its `rows`, its rows after `width`.
template <class Acc, class T>
PYMM_DEVICE void add_weighted(AttentionTile<Acc>& tile, const Rows<Acc, const T>& x, int64_t first, int64_t width,
                              Acc (&sums)[kEach][kEach]) {
  constexpr int kDepth = Slabs<Acc>::kDepth;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const auto number = [&](int64_t column, int64_t row) {
    return first + column < width ? x(row, first + column) : Acc(0);
  };
  for (int k = 0; k < kTile; k += kDepth) {
    fill_slab<Acc>(tile.slabs.b, k, kTile, true, number);
    PYMM_SYNC();
    PYMM_UNROLL_BY(4)
    for (int step = 0; step < kDepth; ++step) {
      PYMM_UNROLL
      for (int i = 0; i < kEach; ++i) {
        PYMM_UNROLL
        for (int j = 0; j < kEach; ++j) {
          sums[i][j] += tile.weights[ty + i * kSide][k + step] * tile.slabs.b[step][tx + j * kSide];
        }
      }
    }
    PYMM_SYNC();
  }
}

// The rows of a span from t on, and its columns from s on.
template <class Acc, class T>
PYMM_DEVICE Rows<Acc, const T> rows_from(const Span& span, const HeadRows<const T>& x, int64_t h, int t) {
  return {span.row_at(x, h, t), span.rows - t, x.row, 1};
}

template <class Acc, class T>
PYMM_DEVICE Rows<Acc, const T> columns_from(const Span& span, const HeadRows<const T>& x, int64_t h, int s) {
  return {span.column_at(x, h, s), span.columns - s, x.row, 1};
}

// Stores the numbers from `first` on of `left` rows, times `scale`; `target` is the tile's first row.
template <class Acc, class T>
PYMM_DEVICE void store_tile(T* target, int64_t stride, int left, int first, int64_t width, const Acc (&scale)[kEach],
                            const Acc (&sums)[kEach][kEach]) {
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    PYMM_UNROLL
    for (int j = 0; j < kEach; ++j) {
      const int r = ty + i * kSide, d = first + tx + j * kSide;
      if (r < left && d < width) target[r * stride + d] = from_float(sums[i][j] * scale[i], T{});
    }
  }
}

template <class T>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kSide* kSide) void exact_forward_kernel(Call c, HeadRows<const T> q,
                                                                        HeadRows<const T> k, HeadRows<const T> v,
                                                                        HeadRows<T> out, Accumulator<T>* lse,
                                                                        int64_t tiles, int64_t chunks) {
  using Acc = Accumulator<T>;
  PYMM_SHARED AttentionTile<Acc> tile;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const Place at(c.of_rows, tiles, c.heads, chunks);
  const Span span(c, at.of);
  if (at.row >= span.rows) return;
  const Head<T> head(span, at.h);
  const Acc lowest = -static_cast<Acc>(INFINITY);
  Acc sums[kEach][kEach] = {}, top[kEach], total[kEach] = {};
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) top[i] = lowest;
  const int64_t key_head = c.key_head(at.h);
  const int end = span.columns_of(at.row + kTile - 1);
  for (int s = 0; s < end; s += kTile) {
    Acc x[kEach][kEach] = {};
    add_scores(tile, rows_from<Acc>(span, q, at.h, at.row), columns_from<Acc>(span, k, key_head, s), c.width, x);
    PYMM_UNROLL
    for (int i = 0; i < kEach; ++i) {
      const int t = at.row + ty + i * kSide;
      Acc higher = top[i];
      PYMM_UNROLL
      for (int j = 0; j < kEach; ++j) {
        x[i][j] = head.logit(t, s + tx + j * kSide, x[i][j]);
        higher = x[i][j] > higher ? x[i][j] : higher;
      }
      higher = warp_max<kSide>(higher);
      const Acc shift = higher == lowest ? Acc(0) : higher, before = exp(top[i] - shift);
      Acc sum = 0;
      PYMM_UNROLL
      for (int j = 0; j < kEach; ++j) {
        const Acc p = exp(x[i][j] - shift);
        sum += p;
        tile.weights[ty + i * kSide][tx + j * kSide] = p * head.factor(t, s + tx + j * kSide);
        sums[i][j] *= before;
      }
      total[i] = total[i] * before + warp_sum<kSide>(sum);
      top[i] = higher;
    }
    add_weighted(tile, columns_from<Acc>(span, v, key_head, s), at.first, c.value_width, sums);
  }
  Acc inverse[kEach];
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    const int t = at.row + ty + i * kSide;
    inverse[i] = total[i] > 0 ? Acc(1) / total[i] : Acc(0);
    if (t < span.rows && tx == 0 && at.first == 0) {
      lse[span.statistics(at.h) + t] = total[i] > 0 ? top[i] + Acc(log(total[i])) : lowest;
    }
  }
  store_tile(span.row_at(out, at.h, at.row), out.row, span.rows - at.row, at.first, c.value_width, inverse, sums);
}

// The weight that met v, and the gradient of the score, from the products q . k and dout . v; lse and delta of head 0.
template <class T>
struct ScoreGradient {
  using Acc = Accumulator<T>;
  Head<T> head;
  const Acc *lse, *delta;

  PYMM_DEVICE ScoreGradient(const Span& span, const Gradients<T>& g, int64_t h)
      : head(span, h), lse(g.lse + span.statistics(h)), delta(g.delta + span.statistics(h)) {}

  PYMM_DEVICE void operator()(int t, int s, Acc dot, Acc dp, Acc& weight, Acc& ds) const {
    weight = ds = 0;
    if (t >= head.span.rows || s >= head.span.columns || lse[t] == -static_cast<Acc>(INFINITY)) return;
    const Acc p = exp(head.logit(t, s, dot) - lse[t]), factor = head.factor(t, s);
    weight = p * factor;
    ds = p * (dp * factor - delta[t]);
  }
};

template <class T>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kSide* kSide) void exact_rows_kernel(Call c, Gradients<T> g, int64_t tiles,
                                                                     int64_t chunks) {
  using Acc = Accumulator<T>;
  PYMM_SHARED AttentionTile<Acc> tile;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const Place at(c.of_rows, tiles, c.heads, chunks);
  const Span span(c, at.of);
  if (at.row >= span.rows) return;
  const ScoreGradient<T> gradient(span, g, at.h);
  Acc dq[kEach][kEach] = {};
  const int64_t key_head = c.key_head(at.h);
  const int end = span.columns_of(at.row + kTile - 1);
  for (int s = 0; s < end; s += kTile) {
    Acc x[kEach][kEach] = {}, dp[kEach][kEach] = {};
    const Rows<Acc, const T> keys = columns_from<Acc>(span, g.k, key_head, s);
    add_scores(tile, rows_from<Acc>(span, g.q, at.h, at.row), keys, c.width, x);
    add_scores(tile, rows_from<Acc>(span, g.dout, at.h, at.row), columns_from<Acc>(span, g.v, key_head, s),
               c.value_width, dp);
    PYMM_UNROLL
    for (int i = 0; i < kEach; ++i) {
      PYMM_UNROLL
      for (int j = 0; j < kEach; ++j) {
        Acc weight;
        gradient(at.row + ty + i * kSide, s + tx + j * kSide, x[i][j], dp[i][j], weight,
                 tile.weights[ty + i * kSide][tx + j * kSide]);
      }
    }
    add_weighted(tile, keys, at.first, c.width, dq);
  }
  Acc scale[kEach];
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) scale[i] = static_cast<Acc>(c.scale);
  store_tile(span.row_at(g.dq, at.h, at.row), g.dq.row, span.rows - at.row, at.first, c.width, scale, dq);
}

template <class T>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kSide* kSide) void exact_columns_kernel(Call c, Gradients<T> g, int64_t tiles,
                                                                        int64_t chunks) {
  using Acc = Accumulator<T>;
  PYMM_SHARED AttentionTile<Acc> tile;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const Place at(c.of_columns, tiles, c.groups, chunks);
  const Span span(c, at.of);
  if (at.row >= span.columns) return;
  Acc dk[kEach][kEach] = {}, dv[kEach][kEach] = {};
  const int64_t shared = c.heads / c.groups;
  for (int64_t h = at.h * shared; h < (at.h + 1) * shared; ++h) {
    const ScoreGradient<T> gradient(span, g, h);
    for (int t = span.first_row(at.row) / kTile * kTile; t < span.rows; t += kTile) {
      Acc x[kEach][kEach] = {}, dp[kEach][kEach] = {};
      const Rows<Acc, const T> queries = rows_from<Acc>(span, g.q, h, t);
      const Rows<Acc, const T> douts = rows_from<Acc>(span, g.dout, h, t);
      add_scores(tile, columns_from<Acc>(span, g.k, at.h, at.row), queries, c.width, x);
      add_scores(tile, columns_from<Acc>(span, g.v, at.h, at.row), douts, c.value_width, dp);
      PYMM_UNROLL
      for (int i = 0; i < kEach; ++i) {
        PYMM_UNROLL
        for (int j = 0; j < kEach; ++j) {
          Acc ds;
          gradient(t + tx + j * kSide, at.row + ty + i * kSide, x[i][j], dp[i][j],
                   tile.weights[ty + i * kSide][tx + j * kSide], ds);
          x[i][j] = ds;
        }
      }
      add_weighted(tile, douts, at.first, c.value_width, dv);
      PYMM_UNROLL
      for (int i = 0; i < kEach; ++i) {
        PYMM_UNROLL
        for (int j = 0; j < kEach; ++j) tile.weights[ty + i * kSide][tx + j * kSide] = x[i][j];
      }
      add_weighted(tile, queries, at.first, c.width, dk);
    }
  }
  Acc scale[kEach], one[kEach];
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    scale[i] = static_cast<Acc>(c.scale);
    one[i] = 1;
  }
  const int left = span.columns - at.row;
  store_tile(span.column_at(g.dk, at.h, at.row), g.dk.row, left, at.first, c.width, scale, dk);
  store_tile(span.column_at(g.dv, at.h, at.row), g.dv.row, left, at.first, c.value_width, one, dv);
}

template <class T>
PYMM_GLOBAL PYMM_EVERY_REGISTER(kSide* kSide) void exact_mask_kernel(Call c, Gradients<T> g, MaskShape m, void* dmask,
                                                                     int64_t tiles_t, int64_t tiles_s) {
  using Acc = Accumulator<T>;
  PYMM_SHARED AttentionTile<Acc> tile;
  const int tx = static_cast<int>(threadIdx.x), ty = static_cast<int>(threadIdx.y);
  const int64_t t_tile = blockIdx.x % tiles_t, s_tile = blockIdx.x / tiles_t % tiles_s;
  const int64_t own_h = blockIdx.x / tiles_t / tiles_s % m.heads, own_b = blockIdx.x / tiles_t / tiles_s / m.heads;
  const int64_t b_end = m.batch == 1 ? c.batch : own_b + 1, h_end = m.heads == 1 ? c.heads : own_h + 1;
  const int t_first = static_cast<int>(t_tile * kTile), s_first = static_cast<int>(s_tile * kTile);
  Acc sums[kEach][kEach] = {};
  for (int64_t b = own_b; b < b_end; ++b) {
    const Span span(c, b);
    const int t_end = m.rows == 1 ? span.rows : t_first + 1, s_end = m.columns == 1 ? span.columns : s_first + 1;
    for (int64_t h = own_h; h < h_end; ++h) {
      const ScoreGradient<T> gradient(span, g, h);
      const int64_t key_head = c.key_head(h);
      for (int t = t_first; t < t_end; t += kTile) {
        for (int s = s_first; s < s_end; s += kTile) {
          Acc x[kEach][kEach] = {}, dp[kEach][kEach] = {};
          add_scores(tile, rows_from<Acc>(span, g.q, h, t), columns_from<Acc>(span, g.k, key_head, s), c.width, x);
          add_scores(tile, rows_from<Acc>(span, g.dout, h, t), columns_from<Acc>(span, g.v, key_head, s), c.value_width,
                     dp);
          PYMM_UNROLL
          for (int i = 0; i < kEach; ++i) {
            PYMM_UNROLL
            for (int j = 0; j < kEach; ++j) {
              Acc weight, ds;
              gradient(t + ty + i * kSide, s + tx + j * kSide, x[i][j], dp[i][j], weight, ds);
              sums[i][j] += ds;
            }
          }
        }
      }
    }
  }
  PYMM_UNROLL
  for (int i = 0; i < kEach; ++i) {
    PYMM_UNROLL
    for (int j = 0; j < kEach; ++j) tile.weights[ty + i * kSide][tx + j * kSide] = sums[i][j];
  }
  PYMM_SYNC();
  store_mask<T>(m, own_b, own_h, t_first, s_first, tile.weights, ty * kSide + tx, kSide * kSide,
                c.mask_kind == kWideBias, dmask);
}

}  // namespace pymm::cuda
