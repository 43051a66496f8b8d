// Attention's backward pass over a range of columns of one key head.
// On chip: a block of rows (of q and dout, packed once for all products) passes all keys, 64 at a time. A register tile
// of scores and of dout . v becomes weights and ds in L1, with one exponential each, in the layouts of the products
// that follow; those sum over all rows of the block, or all keys of a chunk, in registers.
// Bytes: q and dout are read once, k and v once per block of rows; no scores reach memory.
// Range: where ds becomes float16, which ends at 65504 and thins out below 2^-14, it is held times a power of two that
// brings its bound near the end; dq and dk are divided by it.
// Ragged edges: packed operands are padded with zeros, and what a row does not see is zero in weights and ds.
#include "cpu/simd/attention.h"
#include "cpu/simd/attention_plan.h"

namespace pymm::PYMM_ISA {
namespace {

template <class T>
struct Backward {
  using Blocks = AttentionBlocks<T>;
  using Gradient = AttentionGradient<T>;
  using Acc = typename Blocks::Acc;
  using V = typename Blocks::V;
  using E = typename Blocks::E;
  using Number = typename Gradient::Number;
  using Plan = BackwardPlan<T>;
  using RegisterTile = typename Blocks::RegisterTile;
  static constexpr int lanes = Blocks::lanes;
  static constexpr int64_t kKeys = Gradient::kKeys;

  // A float mask may want its gradient.
  static int64_t backward_bytes(const AttentionCall& call, const AttentionHead& head, int64_t columns) {
    Parts parts(nullptr);
    const Plan plan(call, head, columns, head.bias_type != Bias::none, parts);
    return parts.used();
  }

  // Writes rows that accumulators hold as columns: row i is put(head, row, d, line).
  template <class Put>
  static void each_turned(const Acc* from, int64_t ld, const AttentionHead& head, int64_t first, int64_t count,
                          int64_t width, Put&& put) {
    for_runs(first, count, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      for (int64_t i = 0; i < run; i += lanes) {
        for (int64_t d = 0; d < width; d += lanes) {
          Gradient::turned(from + d * ld + done + i, ld, width - d, [&](int q, V line) {
            if (i + q < run) put(query_head, t + i + q, d, line);
          });
        }
      }
    });
  }

  static void write_dq(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& to,
                       const Plan& plan, int64_t first, int64_t count) {
    const V inverse = broadcast<Acc>(1 / plan.power), factor = inverse * broadcast<Acc>(static_cast<Acc>(call.scale));
    each_turned(plan.dq, plan.ld_dq, head, first, count, call.d, [&](int64_t h, int64_t t, int64_t d, V line) {
      if (to.dq_partial) {
        store_some(static_cast<Acc*>(to.dq_partial) + (h * head.rows + t) * call.d + d, line * inverse, call.d - d);
      } else {
        store_some(to.dq.at<T>(h, t) + d, line * factor, call.d - d);
      }
    });
  }

  // Rows [first, first + count) of dk or dv.
  static void write_keys(const Acc* from, int64_t ld, int64_t width, Acc scale, const HeadView& to, int64_t first,
                         int64_t count) {
    for (int64_t s = 0; s < count; ++s, from += ld) {
      T* row = to.at<T>(0, first + s);
      for (int64_t d = 0; d < width; d += lanes) store_some(row + d, load(from + d) * broadcast<Acc>(scale), width - d);
    }
  }

  static void write_dk_dv(const AttentionCall& call, const AttentionBackward& to, const Plan& plan, int64_t first,
                          int64_t count) {
    write_keys(plan.dk, plan.width, call.d, static_cast<Acc>(call.scale) / plan.power, to.dk, first, count);
    write_keys(plan.dv, plan.width_v, call.dv, 1, to.dv, first, count);
  }

  // As B of the products with k or v, and of those with ds or weights.
  static void pack_across(const AttentionCall& call, const AttentionHead& head, const HeadView& from, int64_t first,
                          int64_t count, int64_t width, T* staged, E* panels, int64_t depth, E* units,
                          int64_t unit_width) {
    const T* source = from.at<T>(0, first);
    int64_t stride = from.row_stride;
    if (call.heads > 1) {
      for_runs(first, count, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
        for (int64_t i = 0; i < run; ++i) {
          memcpy(static_cast<void*>(staged + (done + i) * width), from.at<T>(query_head, t + i),
                 static_cast<size_t>(width) * sizeof(T));
        }
      });
      source = staged;
      stride = width;
    }
    pack_panels<T>(source, stride, count, width, depth, panels);
    pack_units<T>(source, stride, count, width, round_up(count, Blocks::kUnit), units, unit_width);
  }

  // What the rows [first, first + count) see of the columns [first_column, first_column + columns), counted from there.
  static void lay_seen(const AttentionCall& call, const AttentionHead& head, const Plan& plan, int64_t first,
                       int64_t count, int64_t first_column, int64_t columns) {
    int64_t t = head.rows ? first % head.rows : 0;
    for (int64_t i = 0; i < plan.block; ++i, t = t + 1 == head.rows ? 0 : t + 1) {
      const int64_t limit = call.causal ? t + head.causal_offset + 1 - first_column : columns;
      plan.seen[i] = static_cast<Number>(i < count ? max_of(0, min_of(limit, columns)) : 0);
    }
    for (int64_t v = 0; v < plan.block / lanes; ++v) {
      int64_t most = 0, fewest = columns;
      for (int64_t i = v * lanes; i < (v + 1) * lanes; ++i) {
        most = max_of(most, plan.seen[i]);
        fewest = min_of(fewest, plan.seen[i]);
      }
      plan.most[v] = static_cast<Number>(most);
      plan.fewest[v] = static_cast<Number>(fewest);
    }
  }

  // One block of rows against one block of keys, `n` of them from key `at` of the chunk on: weights, ds, dv and dk.
  struct Keys {
    int64_t at, column, from_first, n;
  };
  static void key_block(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                        const Plan& plan, int64_t first, int64_t count, const Keys& keys) {
    const int64_t padded = round_up(keys.n, Blocks::kRowPad);
    E* units = plan.units + keys.at * plan.ld;
    const typename Gradient::Across across{plan.shift + first, plan.offset + first, plan.seen, plan.most, plan.fewest};
    Acc* ds_sums = with.mask_gradient ? plan.ds_sums : nullptr;
    if (with.mask_turned) {
      ds_sums = static_cast<Acc*>(with.mask_gradient) + keys.column * with.mask_column_stride + first;
    }
    typename Gradient::Block block{keys.n,
                                   static_cast<Acc>(call.scale * kLog2e),
                                   plan.power,
                                   plan.ld,
                                   with.mask_turned ? with.mask_column_stride : plan.ld,
                                   plan.has_added ? plan.added : nullptr,
                                   call.dropout_p > 0 ? plan.factors : nullptr,
                                   ds_sums,
                                   with.mask_turned,
                                   plan.weights,
                                   Gradient::paired ? plan.ds : units,
                                   units,
                                   {}};
    const MaskView& valid = head.valid;
    for (int64_t i = 0; i < padded; ++i) {
      const bool hidden = i >= keys.n || (valid.data && !*valid.at<uint8_t>(0, 0, keys.column + i));
      block.limit[i] = static_cast<Number>(hidden ? plan.columns : keys.from_first + i);
    }
    Gradient::lay_terms(call, head, first, count, keys.column, keys.n, block);

    Span seen[kKeys / Blocks::kRowUnit];
    for (int64_t i = 0; i < padded; i += Blocks::kTileRows) {
      const int64_t tile_keys = min_of(padded - i, Blocks::kTileRows);
      seen[i / Blocks::kTileRows] = Gradient::seen_rows(across, block, i, tile_keys, plan.block);
    }
    const bool plain = !block.added && !block.factors && !block.ds_sums;
    for (int64_t j = 0; j < plan.block; j += Blocks::kTileColumns) {
      const E *q = plan.q + j * plan.depth, *dout = plan.dout + j * plan.depth_v;
      for (int64_t i = 0; i < padded; i += Blocks::kTileRows) {
        const Span& rows = seen[i / Blocks::kTileRows];
        const int64_t tile_keys = min_of(padded - i, Blocks::kTileRows);
        const int64_t end = min_of(j + Blocks::kTileColumns, plan.block);
        const int64_t left = max_of(rows.from, j), right = min_of(rows.to, end);
        for (int64_t t = j; t < min_of(left, end); t += lanes) Gradient::nothing_seen(block, i, tile_keys, t);
        if (left < right) {
          const int height = static_cast<int>(tile_keys), width = static_cast<int>(right - left);
          RegisterTile::run(height, width, plan.depth, plan.k + (keys.at + i) * plan.depth, plan.depth,
                            q + (left - j) * Blocks::kPair, Blocks::kTileColumns * Blocks::kPair, plan.scores,
                            Blocks::kTileColumns, false);
          RegisterTile::run(height, width, plan.depth_v, plan.v + (keys.at + i) * plan.depth_v, plan.depth_v,
                            dout + (left - j) * Blocks::kPair, Blocks::kTileColumns * Blocks::kPair, plan.dp,
                            Blocks::kTileColumns, false);
          int64_t highest = 0;
          for (int64_t key = 0; key < tile_keys; ++key) highest = max_of(highest, block.limit[i + key]);
          for (int64_t t = left; t < right; t += lanes) {
            const Acc *scores = plan.scores + t - left, *dp = plan.dp + t - left;
            if (plain && plan.fewest[t / lanes] > highest) {
              Gradient::template vector_of_rows<true>(across, block, i, tile_keys, t, scores, dp);
            } else {
              Gradient::template vector_of_rows<false>(across, block, i, tile_keys, t, scores, dp);
            }
          }
        }
        for (int64_t t = max_of(right, j); t < end; t += lanes) Gradient::nothing_seen(block, i, tile_keys, t);
      }
    }
    const auto span = [&](int64_t i, int64_t, int64_t) {
      const Span& rows = seen[i / Blocks::kTileRows];
      return Span{rows.from / Blocks::kUnit * Blocks::kUnit, round_up(min_of(rows.to, count), Blocks::kUnit)};
    };
    const int64_t kept = plan.single ? 0 : keys.from_first;
    multiply<T>(padded, plan.width_v, span, block.weights, plan.ld, plan.dout_units, plan.width_v * Blocks::kPair,
                plan.dv + kept * plan.width_v, plan.width_v, !plan.single);
    multiply<T>(padded, plan.width, span, block.ds, plan.ld, plan.q_units, plan.width * Blocks::kPair,
                plan.dk + kept * plan.width, plan.width, !plan.single);
    if (with.mask_gradient && !with.mask_turned)
      Gradient::add_to_mask(head, with, first, count, keys.column, keys.n, block);
  }

  static void backward(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                       int64_t first_column, int64_t columns, void* scratch) {
    Parts parts(scratch);
    Plan plan(call, head, columns, with.mask_gradient, parts);
    row_statistics<T>(call, head, with, plan, first_column, columns);
    if (!plan.single) {
      memset(plan.dk, 0, static_cast<size_t>(columns * plan.width) * sizeof(Acc));
      memset(plan.dv, 0, static_cast<size_t>(columns * plan.width_v) * sizeof(Acc));
    }
    RegisterTile::begin();
    for (int64_t first = 0; first == 0 || first < plan.rows; first += plan.block) {
      const int64_t count = min_of(plan.block, plan.rows - first);
      lay_seen(call, head, plan, first, count, first_column, columns);
      pack_across(call, head, head.q, first, count, call.d, plan.staged, plan.q, plan.depth, plan.q_units, plan.width);
      pack_across(call, head, with.dout, first, count, call.dv, plan.staged, plan.dout, plan.depth_v, plan.dout_units,
                  plan.width_v);
      int64_t end = 0;  // of the columns that any of these rows sees
      for (int64_t v = 0; v < plan.block / lanes; ++v) end = max_of(end, plan.most[v]);
      for (int64_t chunk = 0; chunk < (plan.single ? columns : end); chunk += plan.chunk) {
        const int64_t n = min_of(plan.chunk, columns - chunk), padded = round_up(n, Blocks::kRowPad);
        const T *k = head.k.at<T>(0, first_column + chunk), *v = head.v.at<T>(0, first_column + chunk);
        pack_rows<T>(k, head.k.row_stride, n, call.d, padded, plan.k, plan.depth);
        pack_rows<T>(v, head.v.row_stride, n, call.dv, padded, plan.v, plan.depth_v);
        pack_rows_turned<T>(plan.k, plan.depth, padded, call.d, plan.turned, plan.k_turned, plan.ld_k);
        for (int64_t at = 0; at < n; at += kKeys) {
          const Keys keys{at, first_column + chunk + at, chunk + at, min_of(kKeys, n - at)};
          key_block(call, head, with, plan, first, count, keys);
          if (plan.single) write_dk_dv(call, with, plan, keys.column, keys.n);
        }
        const auto seen_keys = [&](int64_t, int64_t j, int64_t width) {
          int64_t most = 0;
          for (int64_t v = j / lanes; v < (j + width) / lanes; ++v) most = max_of(most, plan.most[v]);
          return Span{0, min_of(padded, round_up(max_of(0, most - chunk), Blocks::kUnit))};
        };
        multiply<T>(call.d, count, seen_keys, plan.k_turned, plan.ld_k, plan.units, plan.ld * Blocks::kPair, plan.dq,
                    plan.ld_dq, chunk > 0);
      }
      if (columns == 0 || end == 0) memset(plan.dq, 0, static_cast<size_t>(plan.turned * plan.ld_dq) * sizeof(Acc));
      write_dq(call, head, with, plan, first, count);
      if (plan.block == 0) break;
    }
    RegisterTile::end();
    if (!plan.single) write_dk_dv(call, with, plan, first_column, columns);
  }

  static void join(const void* parts, int64_t count, int64_t part_stride, double scale, int64_t n, void* target) {
    const Acc* from = static_cast<const Acc*>(parts);
    const V factor = broadcast<Acc>(static_cast<Acc>(scale));
    for (int64_t i = 0; i < n; i += lanes) {
      V sum{};
      for (int64_t part = 0; part < count; ++part) sum += load_some(from + part * part_stride + i, n - i);
      store_some(static_cast<T*>(target) + i, sum * factor, n - i);
    }
  }

  template <class U>
  static void turn_mask_to(const Acc* from, int64_t ld, int64_t rows, int64_t columns, U* target) {
    for (int64_t t = 0; t < rows; t += lanes) {
      for (int64_t c = 0; c < columns; c += lanes) {
        Gradient::turned(from + c * ld + t, ld, columns - c, [&](int q, V line) {
          if (t + q < rows) store_some(target + (t + q) * columns + c, line, columns - c);
        });
      }
    }
  }
  static void turn_mask(const void* turned, int64_t ld, int64_t rows, int64_t columns, bool accumulators,
                        void* target) {
    const Acc* from = static_cast<const Acc*>(turned);
    if (accumulators) {
      turn_mask_to(from, ld, rows, columns, static_cast<Acc*>(target));
    } else {
      turn_mask_to(from, ld, rows, columns, static_cast<T*>(target));
    }
  }

  static constexpr AttentionBackwardKernels table{&backward_bytes, &backward, &join, &turn_mask};
};

}  // namespace

const AttentionBackwardTable& attention_backward_table() {
  static constexpr AttentionBackwardTable table{
      {Backward<float>::table, Backward<double>::table, Backward<bf16>::table, Backward<f16>::table},
      Backward<f16>::table};
#if PYMM_ISA_LEVEL >= 4
  static constexpr AttentionBackwardTable with_f16{
      {Backward<float>::table, Backward<double>::table, Backward<bf16>::table, Backward<tiled_f16>::table},
      Backward<f16>::table};
  if (current_isa() >= Isa::amx_fp16) return with_f16;
#endif
  return table;
}

}  // namespace pymm::PYMM_ISA
