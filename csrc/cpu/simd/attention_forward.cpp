// Attention's forward pass over a range of rows of one key head.
// On chip: a block of k and v, packed once, passes all rows while it is in L2; the scores of a few rows stay in L1
// from their product to the next, with one exponential each; the accumulators of out stay in L2.
// Bytes: k and v are read once per range of rows; no scores reach memory.
// Ragged edges: packed operands are padded with zeros, a row's weights are zero beyond the columns that it may see,
// so that every register tile is whole.
#include "cpu/simd/attention.h"
#include "cpu/simd/attention_blocks.h"

namespace pymm::PYMM_ISA {
namespace {

constexpr int64_t kScoreBytes = 32 * 1024;  // of the scores of one block of rows
constexpr int64_t kWholeColumns = 640;      // up to here one block of columns holds all
constexpr int64_t kBlockColumns = 512;

template <class T>
struct Forward {
  using Blocks = AttentionBlocks<T>;
  using Acc = typename Blocks::Acc;
  using V = typename Blocks::V;
  using E = typename Blocks::E;
  using RowBlock = typename Blocks::RowBlock;
  using RegisterTile = typename Blocks::RegisterTile;
  static constexpr int lanes = Blocks::lanes;

  struct ForwardPlan {
    int64_t depth, width, block, stride, block_rows;
    bool single;  // one block of columns
    E *k, *v, *q;
    Acc *scores, *factors, *sums, *maxima, *out;

    ForwardPlan(const AttentionCall& call, const AttentionHead& head, int64_t rows, Parts& parts) {
      depth = round_up(call.d, Blocks::kUnit);
      width = round_up(call.dv, Blocks::kColumnUnit);
      single = head.columns <= kWholeColumns;
      block = single ? head.columns : kBlockColumns;
      stride = Blocks::score_stride(block);
      const int64_t fitting = kScoreBytes / (max_of(stride, 1) * static_cast<int64_t>(sizeof(Acc)));
      block_rows =
          max_of(Blocks::kTileRows, min_of(fitting / Blocks::kTileRows * Blocks::kTileRows, Blocks::kMostRows));
      k = parts.take<E>(ceil_div(block, Blocks::kTileColumns) * panel_elements<T>(depth));
      v = parts.take<E>(round_up(block, Blocks::kUnit) * width);
      q = parts.take<E>(block_rows * depth);
      scores = parts.take<Acc>(block_rows * stride);
      factors = parts.take<Acc>(call.dropout_p > 0 ? round_up(block, 64) : 0);
      const int64_t kept = single ? block_rows : round_up(rows, Blocks::kRowPad);
      sums = parts.take<Acc>(kept);
      maxima = parts.take<Acc>(kept);
      out = parts.take<Acc>(round_up(kept, Blocks::kRowPad) * width);
    }
  };

  static int64_t forward_bytes(const AttentionCall& call, const AttentionHead& head, int64_t rows) {
    Parts parts(nullptr);
    ForwardPlan plan(call, head, rows, parts);
    return parts.used();
  }

  // out = sums of weighted rows of v / sums of weights, and the log-sum-exp.
  static void finish_rows(const AttentionCall& call, const AttentionHead& head, const AttentionForward& to,
                          int64_t first, int64_t count, const Acc* maxima, const Acc* sums, const Acc* out,
                          int64_t width) {
    for_runs(first, count, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      Acc* lse = static_cast<Acc*>(to.lse) + query_head * to.lse_stride + t;
      for (int64_t i = 0; i < run; i += lanes) {
        const V maximum = load_some(maxima + done + i, run - i), sum = load_some(sums + done + i, run - i);
        store_some(lse + i, Blocks::log_sum_exp(maximum, sum), run - i);
      }
      for (int64_t i = 0; i < run; ++i) {
        const Acc sum = sums[done + i];
        const V inverse = broadcast<Acc>(sum == 0 ? Acc{0} : 1 / sum);
        T* row = to.out.at<T>(query_head, t + i);
        const Acc* from = out + (done + i) * width;
        for (int64_t d = 0; d < call.dv; d += lanes) store_some(row + d, load(from + d) * inverse, call.dv - d);
      }
    });
  }
  static void forward(const AttentionCall& call, const AttentionHead& head, const AttentionForward& to, int64_t first,
                      int64_t rows, void* scratch) {
    Parts parts(scratch);
    const ForwardPlan plan(call, head, rows, parts);
    const int64_t end = Blocks::columns_seen(call, head, first, rows);
    RowBlock block;
    RegisterTile::begin();
    for (int64_t column = 0; column == 0 || column < end; column += plan.block) {
      const int64_t columns = min_of(plan.block, end - column);
      pack_panels<T>(head.k.at<T>(0, column), head.k.row_stride, columns, call.d, plan.depth, plan.k);
      pack_units<T>(head.v.at<T>(0, column), head.v.row_stride, columns, call.dv, round_up(columns, Blocks::kUnit),
                    plan.v, plan.width);
      for (int64_t r = 0; r < rows; r += plan.block_rows) {
        const int64_t count = min_of(plan.block_rows, rows - r), kept = plan.single ? 0 : r;
        Blocks::lay(call, head, first + r, count, column, columns, block);
        if (column > 0 && block.most == 0) continue;
        Blocks::pack_block(head.q, head, first + r, block, call.d, plan.q, plan.depth);
        Blocks::score(block, plan.q, plan.depth, plan.k, plan.scores, plan.stride);
        Acc* out = plan.out + kept * plan.width;
        Blocks::softmax(call, head, block, column, column > 0, {plan.scores, plan.stride, plan.factors},
                        {plan.maxima + kept, plan.sums + kept, out, plan.width});
        multiply<T>(
            block.padded, plan.width,
            [&](int64_t i, int64_t, int64_t) { return Span{0, round_up(block.seen_by_tile(i), Blocks::kUnit)}; },
            reinterpret_cast<const E*>(plan.scores), plan.stride * Blocks::kNarrowing, plan.v,
            plan.width * Blocks::kPair, out, plan.width, column > 0);
        if (plan.single) finish_rows(call, head, to, first + r, count, plan.maxima, plan.sums, out, plan.width);
      }
      if (plan.block == 0) break;
    }
    RegisterTile::end();
    if (!plan.single) finish_rows(call, head, to, first, rows, plan.maxima, plan.sums, plan.out, plan.width);
  }

  static constexpr AttentionForwardKernels table{&forward_bytes, &forward};
};

}  // namespace

const AttentionForwardTable& attention_forward_table() {
  static constexpr AttentionForwardTable table{
      {Forward<float>::table, Forward<double>::table, Forward<bf16>::table, Forward<f16>::table}, Forward<f16>::table};
#if PYMM_ISA_LEVEL >= 4
  static constexpr AttentionForwardTable with_f16{
      {Forward<float>::table, Forward<double>::table, Forward<bf16>::table, Forward<tiled_f16>::table},
      Forward<f16>::table};
  if (current_isa() >= Isa::amx_fp16) return with_f16;
#endif
  return table;
}

}  // namespace pymm::PYMM_ISA
