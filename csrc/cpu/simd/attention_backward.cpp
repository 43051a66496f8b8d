// Attention's backward pass over a range of columns of one key head.
// On chip: a block of k and v, packed once, passes all rows while it is in L2; the scores of a block of rows and their
// gradients stay in L2 from product to product, with one exponential each; so do the accumulators of dq, dk and dv.
// Bytes: q and dout are read once per block of columns; no scores reach memory.
// Range: where ds becomes float16, which ends at 65504 and thins out below 2^-14, it is held times a power of two that
// brings its bound near the end; dq and dk are divided by it.
// Ragged edges: packed operands are padded with zeros, rows that were padded have a log-sum-exp of infinity.
#include "cpu/simd/attention.h"
#include "cpu/simd/attention_blocks.h"

namespace pymm::PYMM_ISA {
namespace {

constexpr int64_t kBackwardRows = 64, kBackwardColumns = 256;

template <class T>
struct Backward {
  using Blocks = AttentionBlocks<T>;
  using Acc = typename Blocks::Acc;
  using V = typename Blocks::V;
  using E = typename Blocks::E;
  using Rows = typename Blocks::Rows;
  using RowBlock = typename Blocks::RowBlock;
  using RegisterTile = typename Blocks::RegisterTile;
  static constexpr int lanes = Blocks::lanes;

  struct BackwardPlan {
    int64_t depth, depth_v;       // of rows of q and k, of dout and v
    int64_t width;                // of rows of k as B, and of dq's accumulators
    int64_t turned, turned_v;     // rows of q^T and dout^T
    int64_t block, stride, rows;  // columns of a block, from score row to score row, all rows of the heads
    E *k, *v, *k_units, *q, *dout, *q_turned, *dout_turned, *ds_rows;
    Acc *scores, *dp, *dq, *dk, *dv, *shift, *offset, *factors;
    Acc power = 1;  // that ds is held times

    BackwardPlan(const AttentionCall& call, const AttentionHead& head, int64_t columns, Parts& parts) {
      depth = round_up(call.d, Blocks::kUnit);
      depth_v = round_up(call.dv, Blocks::kUnit);
      width = round_up(call.d, Blocks::kColumnUnit);
      turned = round_up(call.d, Blocks::kRowUnit);
      turned_v = round_up(call.dv, Blocks::kRowUnit);
      block = min_of(columns, kBackwardColumns);
      stride = Blocks::score_stride(block);
      rows = call.heads * head.rows;
      k = parts.take<E>(ceil_div(block, Blocks::kTileColumns) * panel_elements<T>(depth));
      v = parts.take<E>(ceil_div(block, Blocks::kTileColumns) * panel_elements<T>(depth_v));
      k_units = parts.take<E>(round_up(block, Blocks::kUnit) * width);
      q = parts.take<E>(kBackwardRows * depth);
      dout = parts.take<E>(kBackwardRows * depth_v);
      q_turned = parts.take<E>(turned * kBackwardRows);
      dout_turned = parts.take<E>(turned_v * kBackwardRows);
      ds_rows = parts.take<E>(Blocks::kPair == 2 ? kBackwardRows * stride : 0);
      scores = parts.take<Acc>(kBackwardRows * stride);
      dp = parts.take<Acc>(kBackwardRows * stride);
      dq = parts.take<Acc>(round_up(rows, Blocks::kRowPad) * width);
      dk = parts.take<Acc>(turned * stride);
      dv = parts.take<Acc>(turned_v * stride);
      shift = parts.take<Acc>(rows);
      offset = parts.take<Acc>(rows);
      factors = parts.take<Acc>(call.dropout_p > 0 ? 2 * round_up(block, 64) : 0);
    }
  };

  static int64_t backward_bytes(const AttentionCall& call, const AttentionHead& head, int64_t columns) {
    Parts parts(nullptr);
    BackwardPlan plan(call, head, columns, parts);
    return parts.used();
  }

  // Each row's log-sum-exp in powers of two, infinity where it attends nowhere, and sum(dout * out) - dlse.
  static void row_statistics(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                             BackwardPlan& plan, int64_t first, int64_t columns) {
    Acc largest_dout = 0, largest_offset = 0;  // squared norm, magnitude
    for_runs(0, plan.rows, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      const int64_t at = query_head * with.lse_stride + t;
      const Acc* lse = static_cast<const Acc*>(with.lse) + at;
      const Acc* dlse = with.dlse ? static_cast<const Acc*>(with.dlse) + at : nullptr;
      for (int64_t i = 0; i < run; ++i) {
        const T *g = with.dout.at<T>(query_head, t + i), *o = with.out.at<T>(query_head, t + i);
        V sum{}, squares{};
        for (int64_t d = 0; d < call.dv; d += lanes) {
          const V value = load_some(g + d, call.dv - d);
          sum += value * load_some(o + d, call.dv - d);
          if constexpr (Rows::ds_is_scaled) squares += value * value;
        }
        plan.shift[done + i] = lse[i] == -Blocks::kInfinity ? Blocks::kInfinity : lse[i] * static_cast<Acc>(kLog2e);
        plan.offset[done + i] = reduce_add(sum) - (dlse ? dlse[i] : Acc{0});
        if constexpr (Rows::ds_is_scaled) {
          largest_dout = larger(largest_dout, reduce_add(squares));
          largest_offset = larger(largest_offset, __builtin_fabsf(plan.offset[done + i]));
        }
      }
    });
    if constexpr (Rows::ds_is_scaled) {
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
  static Acc larger(Acc a, Acc b) { return b > a ? b : a; }

  // The power of two that brings numbers up to `bound` to 2^14 at most; 1 where there is none.
  static float power_for(float bound) {
    const int exponent = static_cast<int>(bit_cast<uint32_t>(bound) >> 23) - 126;  // bound < 2^exponent
    if (exponent < -100 || exponent > 100) return 1;
    return bit_cast<float>(static_cast<uint32_t>(14 - exponent + 127) << 23);
  }

  // Weights, and the gradient of the scores, of a block of rows.
  static void softmax_gradient(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                               const BackwardPlan& plan, const RowBlock& block, int64_t first, int64_t column) {
    const bool is_plain = Blocks::plain(call, head);
    const Acc unit = static_cast<Acc>(is_plain ? call.scale * kLog2e : kLog2e);
    const int64_t padded = round_up(block.most, Blocks::kWeightPad);
    const auto row_of = [&](int64_t i, Acc* factors) {
      const int64_t h = block.head[i], t = block.row[i], n = block.seen[i];
      typename Rows::GradientRow row{
          plan.scores + i * plan.stride, plan.dp + i * plan.stride, n, Blocks::kInfinity, 0, nullptr, nullptr, 1};
      if (i >= block.count) return row;
      if (!is_plain) Rows::mask_row(head, call.scale, h, t, column, row.s, n);
      row.shift = plan.shift[first + i];
      row.offset = plan.offset[first + i];
      if (call.dropout_p > 0) {
        dropout_factors(call, head.first_head + h, t, column, n, factors);
        row.factors = factors;
      }
      if (with.mask_gradient) {
        row.mask_gradient = static_cast<Acc*>(with.mask_gradient) + h * with.mask_head_stride +
                            t * with.mask_row_stride + column * with.mask_column_stride;
        row.mask_stride = with.mask_column_stride;
      }
      return row;
    };
    for (int64_t i = 0; i < block.padded; i += 2) {
      const auto upper = row_of(i, plan.factors), lower = row_of(i + 1, plan.factors + round_up(plan.block, 64));
      Rows::gradient_rows(upper, lower, padded, unit, plan.power, plan.ds_rows + i * plan.stride, plan.stride);
    }
  }

  // Rows of dk or dv from accumulators that hold them as columns.
  static void write_turned(const Acc* from, int64_t ld, int64_t columns, int64_t width, double scale,
                           const HeadView& to, int64_t first) {
    const V factor = broadcast<Acc>(static_cast<Acc>(scale));
    for (int64_t s = 0; s < columns; s += lanes) {
      for (int64_t d = 0; d < width; d += lanes) {
        const auto put = [&](int64_t q, V line) {
          if (s + q < columns) store_some(to.at<T>(0, first + s + q) + d, line * factor, width - d);
        };
        if constexpr (__is_same(Acc, float)) {
          turn([&](int r) { return d + r < width ? bit_cast<vuint>(load(from + (d + r) * ld + s)) : vuint{}; }, lanes,
               [&](int q, vuint line) { put(q, bit_cast<V>(line)); });
        } else {
          for (int64_t q = 0; q < lanes; ++q) {
            V line{};
            for (int64_t r = 0; r < min_of(lanes, width - d); ++r) line[r] = from[(d + r) * ld + s + q];
            put(q, line);
          }
        }
      }
    }
  }

  static void write_dq(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& to,
                       const BackwardPlan& plan) {
    const Acc inverse = 1 / plan.power;
    const V factor = broadcast<Acc>(static_cast<Acc>(call.scale) * inverse);
    for_runs(0, plan.rows, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      for (int64_t i = 0; i < run; ++i) {
        const Acc* from = plan.dq + (done + i) * plan.width;
        if (to.dq_partial) {
          Acc* part = static_cast<Acc*>(to.dq_partial) + (done + i) * call.d;
          for (int64_t d = 0; d < call.d; ++d) part[d] = from[d] * inverse;
          continue;
        }
        T* row = to.dq.at<T>(query_head, t + i);
        for (int64_t d = 0; d < call.d; d += lanes) store_some(row + d, load(from + d) * factor, call.d - d);
      }
    });
  }

  static void backward(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                       int64_t first, int64_t columns, void* scratch) {
    Parts parts(scratch);
    BackwardPlan plan(call, head, columns, parts);
    RowBlock block;
    row_statistics(call, head, with, plan, first, columns);
    memset(plan.dq, 0, static_cast<size_t>(round_up(plan.rows, Blocks::kRowPad) * plan.width) * sizeof(Acc));
    RegisterTile::begin();
    for (int64_t column = first; column < first + columns; column += plan.block) {
      const int64_t count = min_of(plan.block, first + columns - column);
      pack_panels<T>(head.k.at<T>(0, column), head.k.row_stride, count, call.d, plan.depth, plan.k);
      pack_panels<T>(head.v.at<T>(0, column), head.v.row_stride, count, call.dv, plan.depth_v, plan.v);
      pack_units<T>(head.k.at<T>(0, column), head.k.row_stride, count, call.d, round_up(count, Blocks::kUnit),
                    plan.k_units, plan.width);
      memset(plan.dk, 0, static_cast<size_t>(plan.turned * plan.stride) * sizeof(Acc));
      memset(plan.dv, 0, static_cast<size_t>(plan.turned_v * plan.stride) * sizeof(Acc));
      for (int64_t r = 0; r < plan.rows; r += kBackwardRows) {
        Blocks::lay(call, head, r, min_of(kBackwardRows, plan.rows - r), column, count, block);
        if (block.most == 0) continue;
        backward_block(call, head, with, plan, block, r, column);
      }
      write_turned(plan.dk, plan.stride, count, call.d, call.scale / plan.power, with.dk, column);
      write_turned(plan.dv, plan.stride, count, call.dv, 1, with.dv, column);
    }
    RegisterTile::end();
    write_dq(call, head, with, plan);
  }

  static void backward_block(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                             const BackwardPlan& plan, const RowBlock& block, int64_t first, int64_t column) {
    Blocks::pack_block(head.q, head, first, block, call.d, plan.q, plan.depth);
    Blocks::pack_block(with.dout, head, first, block, call.dv, plan.dout, plan.depth_v);
    pack_rows_turned<T>(plan.q, plan.depth, block.padded, call.d, plan.turned, plan.q_turned, block.padded);
    pack_rows_turned<T>(plan.dout, plan.depth_v, block.padded, call.dv, plan.turned_v, plan.dout_turned, block.padded);
    Blocks::score(block, plan.q, plan.depth, plan.k, plan.scores, plan.stride);
    Blocks::score(block, plan.dout, plan.depth_v, plan.v, plan.dp, plan.stride);
    softmax_gradient(call, head, with, plan, block, first, column);
    // Paired weights and ds of two rows lie in the upper one, so units are two rows of scores apart.
    const int64_t unit_stride = Blocks::kPair * plan.stride * Blocks::kNarrowing;
    const E *weights = reinterpret_cast<const E*>(plan.scores), *ds = reinterpret_cast<const E*>(plan.dp);
    const auto all_rows = [&](int64_t) { return block.padded; };
    multiply<T>(call.dv, block.most, all_rows, plan.dout_turned, block.padded, weights, unit_stride, plan.dv,
                plan.stride, true);
    multiply<T>(call.d, block.most, all_rows, plan.q_turned, block.padded, ds, unit_stride, plan.dk, plan.stride, true);
    multiply<T>(
        block.padded, plan.width, [&](int64_t i) { return block.seen_by_tile(i); },
        Blocks::kPair == 2 ? plan.ds_rows : ds, plan.stride, plan.k_units, plan.width * Blocks::kPair,
        plan.dq + first * plan.width, plan.width, true);
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

  static constexpr AttentionBackwardKernels table{&backward_bytes, &backward, &join};
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
