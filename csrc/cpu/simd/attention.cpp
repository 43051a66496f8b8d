// Parallel: nothing here; a call computes a range of rows (forward) or of columns (backward) of one key head.
// On chip: a block of k and v, packed once, passes all rows while it is in L2; the scores of a few rows stay in L1
// from their product to the next, with one exponential each; the accumulators of out, dk and dv stay in L2.
// Bytes: k and v are read once per range of rows, q and dout once per block of columns; no scores reach memory.
// Ragged edges: packed operands are padded with zeros, a row's weights are zero beyond the columns that it may see,
// rows that were padded have a log-sum-exp of infinity, so that every register tile is whole.
#include "cpu/simd/attention.h"

#include "cpu/simd/attention_rows.h"
#include "cpu/simd/tile.h"

namespace pymm::PYMM_ISA {
namespace {

constexpr int64_t kScoreBytes = 32 * 1024;  // of the scores of one block of rows, forward
constexpr int64_t kWholeColumns = 640;      // up to here a forward pass needs no second block of columns
constexpr int64_t kBlockColumns = 512;
constexpr int64_t kBackwardRows = 64, kBackwardColumns = 256;

// Hands out parts of a scratch buffer, each from a cache line of its own; without a buffer it only counts.
class Parts {
 public:
  explicit Parts(void* base) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(int64_t count) {
    char* part = base_ ? base_ + used_ : nullptr;
    used_ += round_up(max_of(count, 0) * static_cast<int64_t>(sizeof(U)), 64);
    return reinterpret_cast<U*>(part);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

// Calls f(local row, head, row, count) for the runs of rows [first, first + count) that lie in one head.
template <class F>
void for_runs(int64_t first, int64_t count, int64_t rows, F&& f) {
  for (int64_t done = 0; done < count;) {
    const int64_t head = (first + done) / rows, t = (first + done) % rows;
    const int64_t run = min_of(count - done, rows - t);
    f(done, head, t, run);
    done += run;
  }
}

template <class T>
struct Impl {
  using Acc = Accumulator<T>;
  using V = Vector<Acc>;
  using Rows = AttentionRows<T>;
  using E = typename TileOf<T>::Element;
  using RegisterTile = Tile<T>;
  static constexpr int lanes = lanes_of<Acc>();
  static constexpr int64_t kPair = TileOf<T>::kPair, kUnit = TileOf<T>::kUnit;
  static constexpr int64_t kRowUnit = RegisterTile::kRowUnit, kColumnUnit = RegisterTile::kColumnUnit;
  static constexpr int64_t kTileRows = RegisterTile::kRows, kTileColumns = RegisterTile::kColumns;
  static constexpr int64_t kRowPad = kRowUnit > kUnit ? kRowUnit : kUnit;
  static constexpr int64_t kWeightPad = lanes > kUnit ? lanes : kUnit;
  static constexpr int64_t kNarrowing = sizeof(Acc) / sizeof(E);  // weights per score in memory
  static constexpr int64_t kMostRows = 64;                        // of a block
  static constexpr Acc kInfinity = static_cast<Acc>(__builtin_inf());

  // The distance between rows of scores: one cache line more than a multiple of 256 bytes, so that rows above each
  // other do not fall into one set of L1.
  static int64_t score_stride(int64_t columns) {
    const int64_t padded = round_up(columns, max_of(kWeightPad, kColumnUnit));
    const int64_t line = 64 / static_cast<int64_t>(sizeof(Acc));
    return padded % (4 * line) ? padded : padded + line;
  }

  static bool plain(const AttentionCall& call, const AttentionHead& head) {
    return head.bias_type == Bias::none && !head.allowed.data && !head.valid.data && call.scale > 0;
  }

  // A block of rows: where each lies, and how many of the block's columns it sees.
  struct RowBlock {
    int64_t count, padded;  // rows, and rows with padding
    int64_t head[kMostRows], row[kMostRows], seen[kMostRows], tile_seen[kMostRows];
    int64_t most;  // the largest of `seen`

    int64_t seen_by_tile(int64_t i) const { return tile_seen[i / kTileRows]; }
  };

  static void lay(const AttentionCall& call, const AttentionHead& head, int64_t first, int64_t count,
                  int64_t first_column, int64_t columns, RowBlock& block) {
    block.count = count;
    block.padded = round_up(count, kRowPad);
    block.most = 0;
    for (int64_t i = 0; i < block.padded; i += kTileRows) block.tile_seen[i / kTileRows] = 0;
    int64_t query_head = first / head.rows, t = first % head.rows;
    for (int64_t i = 0; i < block.padded; ++i) {
      block.head[i] = query_head;
      block.row[i] = t;
      const int64_t limit = call.causal ? t + head.causal_offset + 1 - first_column : columns;
      block.seen[i] = i < count ? max_of(0, min_of(limit, columns)) : 0;
      int64_t& of_tile = block.tile_seen[i / kTileRows];
      of_tile = max_of(of_tile, block.seen[i]);
      block.most = max_of(block.most, block.seen[i]);
      if (++t == head.rows) {
        t = 0;
        ++query_head;
      }
    }
  }

  // The columns below which all rows [first, first + count) lie that see anything.
  static int64_t columns_seen(const AttentionCall& call, const AttentionHead& head, int64_t first, int64_t count) {
    if (!call.causal) return head.columns;
    const bool whole_head = first % head.rows + count >= head.rows;
    const int64_t last = whole_head ? head.rows - 1 : (first + count - 1) % head.rows;
    return max_of(0, min_of(last + head.causal_offset + 1, head.columns));
  }

  static void pack_block(const HeadView& from, const AttentionHead& head, int64_t first, const RowBlock& block,
                         int64_t width, E* target, int64_t ld) {
    for_runs(first, block.count, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      pack_rows<T>(from.at<T>(query_head, t), from.row_stride, run, width, run, target + done * ld, ld);
    });
    memset(static_cast<void*>(target + block.count * ld), 0,
           static_cast<size_t>((block.padded - block.count) * ld) * sizeof(E));
  }

  // scores = rows . columns^T, each register tile only as far as its rows see.
  static void score(const RowBlock& block, const E* rows, int64_t depth, const E* panels, Acc* scores, int64_t ld) {
    const int64_t all = round_up(block.most, kColumnUnit);
    for (int64_t j = 0; j < all; j += kTileColumns, panels += panel_elements<T>(depth)) {
      for (int64_t i = 0; i < block.padded; i += kTileRows) {
        const int64_t left = round_up(block.seen_by_tile(i), kColumnUnit) - j;
        if (left <= 0) continue;
        RegisterTile::run(static_cast<int>(min_of(block.padded - i, kTileRows)),
                          static_cast<int>(min_of(left, kTileColumns)), depth, rows + i * depth, depth, panels,
                          kTileColumns * kPair, scores + i * ld + j, ld, false);
      }
    }
  }

  // ---- forward

  struct ForwardPlan {
    int64_t depth, width, block, stride, block_rows;
    bool single;  // one block of columns
    E *k, *v, *q;
    Acc *scores, *factors, *sums, *maxima, *out;

    ForwardPlan(const AttentionCall& call, const AttentionHead& head, int64_t rows, Parts& parts) {
      depth = round_up(call.d, kUnit);
      width = round_up(call.dv, kColumnUnit);
      single = head.columns <= kWholeColumns;
      block = single ? head.columns : kBlockColumns;
      stride = score_stride(block);
      const int64_t fitting = kScoreBytes / (max_of(stride, 1) * static_cast<int64_t>(sizeof(Acc)));
      block_rows = max_of(kTileRows, min_of(fitting / kTileRows * kTileRows, kMostRows));
      k = parts.take<E>(ceil_div(block, kTileColumns) * panel_elements<T>(depth));
      v = parts.take<E>(round_up(block, kUnit) * width);
      q = parts.take<E>(block_rows * depth);
      scores = parts.take<Acc>(block_rows * stride);
      factors = parts.take<Acc>(call.dropout_p > 0 ? round_up(block, 64) : 0);
      const int64_t kept = single ? block_rows : round_up(rows, kRowPad);
      sums = parts.take<Acc>(kept);
      maxima = parts.take<Acc>(kept);
      out = parts.take<Acc>(round_up(kept, kRowPad) * width);
    }
  };

  static int64_t forward_bytes(const AttentionCall& call, const AttentionHead& head, int64_t rows) {
    Parts parts(nullptr);
    ForwardPlan plan(call, head, rows, parts);
    return parts.used();
  }

  static void scale_row(Acc* row, Acc factor, int64_t width) {
    for (int64_t i = 0; i < width; i += lanes) store(row + i, load(row + i) * factor);
  }

  // Turns the scores of a block's rows into weights, and brings their running maxima and sums up to date.
  static void softmax(const AttentionCall& call, const AttentionHead& head, const ForwardPlan& plan,
                      const RowBlock& block, int64_t column, bool again, Acc* maxima, Acc* sums, Acc* out) {
    const bool is_plain = plain(call, head);
    const Acc unit = static_cast<Acc>(is_plain ? call.scale * kLog2e : kLog2e);
    for (int64_t i = 0; i < block.padded; ++i) {
      Acc* s = plan.scores + i * plan.stride;
      const int64_t n = block.seen[i], padded = round_up(block.seen_by_tile(i), kWeightPad);
      Acc before = again ? maxima[i] : -kInfinity, sum = again ? sums[i] : Acc{0};
      const Acc largest =
          is_plain ? Rows::row_max(s, n) : Rows::mask_row(head, call.scale, block.head[i], block.row[i], column, s, n);
      const Acc maximum = largest * unit > before ? largest * unit : before;
      if (maximum == -kInfinity && !Rows::has_nan(s, n)) {
        Rows::clear_weights(reinterpret_cast<E*>(s), 0, padded);
      } else {
        if (again && maximum != before) {
          const Acc fade = vexp2(broadcast<Acc>(before - maximum))[0];
          sum *= fade;
          scale_row(out + i * plan.width, fade, plan.width);
        }
        const Acc* factors = nullptr;  // of dropout
        if (call.dropout_p > 0 && i < block.count) {
          dropout_factors(call, head.first_head + block.head[i], block.row[i], column, n, plan.factors);
          factors = plan.factors;
        }
        sum += Rows::softmax_row(s, n, padded, unit, maximum, factors);
      }
      maxima[i] = maximum;
      sums[i] = sum;
    }
  }

  // out = sums of weighted rows of v / sums of weights, and the log-sum-exp.
  static void finish_rows(const AttentionCall& call, const AttentionHead& head, const AttentionForward& to,
                          int64_t first, int64_t count, const Acc* maxima, const Acc* sums, const Acc* out,
                          int64_t width) {
    for_runs(first, count, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      Acc* lse = static_cast<Acc*>(to.lse) + query_head * to.lse_stride + t;
      for (int64_t i = 0; i < run; ++i) {
        const Acc sum = sums[done + i];
        const bool nowhere = sum == 0;
        const V inverse = broadcast<Acc>(nowhere ? Acc{0} : 1 / sum);
        lse[i] = nowhere ? -kInfinity : log_sum_exp(maxima[done + i], sum);
        T* row = to.out.at<T>(query_head, t + i);
        const Acc* from = out + (done + i) * width;
        for (int64_t d = 0; d < call.dv; d += lanes) store_some(row + d, load(from + d) * inverse, call.dv - d);
      }
    });
  }
  static float log_sum_exp(float maximum, float sum) {
    return static_cast<float>(kLn2) * (maximum + __builtin_log2f(sum));
  }
  static double log_sum_exp(double maximum, double sum) { return kLn2 * (maximum + __builtin_log2(sum)); }

  static void forward(const AttentionCall& call, const AttentionHead& head, const AttentionForward& to, int64_t first,
                      int64_t rows, void* scratch) {
    Parts parts(scratch);
    const ForwardPlan plan(call, head, rows, parts);
    const int64_t end = columns_seen(call, head, first, rows);
    RowBlock block;
    RegisterTile::begin();
    for (int64_t column = 0; column == 0 || column < end; column += plan.block) {
      const int64_t columns = min_of(plan.block, end - column);
      pack_panels<T>(head.k.at<T>(0, column), head.k.row_stride, columns, call.d, plan.depth, plan.k);
      pack_units<T>(head.v.at<T>(0, column), head.v.row_stride, columns, call.dv, round_up(columns, kUnit), plan.v,
                    plan.width);
      for (int64_t r = 0; r < rows; r += plan.block_rows) {
        const int64_t count = min_of(plan.block_rows, rows - r), kept = plan.single ? 0 : r;
        lay(call, head, first + r, count, column, columns, block);
        if (column > 0 && block.most == 0) continue;
        pack_block(head.q, head, first + r, block, call.d, plan.q, plan.depth);
        score(block, plan.q, plan.depth, plan.k, plan.scores, plan.stride);
        Acc* out = plan.out + kept * plan.width;
        softmax(call, head, plan, block, column, column > 0, plan.maxima + kept, plan.sums + kept, out);
        multiply<T>(
            block.padded, plan.width, [&](int64_t i) { return block.seen_by_tile(i); },
            reinterpret_cast<const E*>(plan.scores), plan.stride * kNarrowing, plan.v, plan.width * kPair, out,
            plan.width, column > 0);
        if (plan.single) finish_rows(call, head, to, first + r, count, plan.maxima, plan.sums, out, plan.width);
      }
      if (plan.block == 0) break;
    }
    RegisterTile::end();
    if (!plan.single) finish_rows(call, head, to, first, rows, plan.maxima, plan.sums, plan.out, plan.width);
  }

  // ---- backward

  struct BackwardPlan {
    int64_t depth, depth_v;       // of rows of q and k, of dout and v
    int64_t width;                // of rows of k as B, and of dq's accumulators
    int64_t turned, turned_v;     // rows of q^T and dout^T
    int64_t block, stride, rows;  // columns of a block, from score row to score row, all rows of the heads
    E *k, *v, *k_units, *q, *dout, *q_turned, *dout_turned, *ds_rows;
    Acc *scores, *dp, *dq, *dk, *dv, *shift, *offset, *factors;

    BackwardPlan(const AttentionCall& call, const AttentionHead& head, int64_t columns, Parts& parts) {
      depth = round_up(call.d, kUnit);
      depth_v = round_up(call.dv, kUnit);
      width = round_up(call.d, kColumnUnit);
      turned = round_up(call.d, kRowUnit);
      turned_v = round_up(call.dv, kRowUnit);
      block = min_of(columns, kBackwardColumns);
      stride = score_stride(block);
      rows = call.heads * head.rows;
      k = parts.take<E>(ceil_div(block, kTileColumns) * panel_elements<T>(depth));
      v = parts.take<E>(ceil_div(block, kTileColumns) * panel_elements<T>(depth_v));
      k_units = parts.take<E>(round_up(block, kUnit) * width);
      q = parts.take<E>(kBackwardRows * depth);
      dout = parts.take<E>(kBackwardRows * depth_v);
      q_turned = parts.take<E>(turned * kBackwardRows);
      dout_turned = parts.take<E>(turned_v * kBackwardRows);
      ds_rows = parts.take<E>(kPair == 2 ? kBackwardRows * stride : 0);
      scores = parts.take<Acc>(kBackwardRows * stride);
      dp = parts.take<Acc>(kBackwardRows * stride);
      dq = parts.take<Acc>(round_up(rows, kRowPad) * width);
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
                             const BackwardPlan& plan) {
    for_runs(0, plan.rows, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      const int64_t at = query_head * with.lse_stride + t;
      const Acc* lse = static_cast<const Acc*>(with.lse) + at;
      const Acc* dlse = with.dlse ? static_cast<const Acc*>(with.dlse) + at : nullptr;
      for (int64_t i = 0; i < run; ++i) {
        const T *g = with.dout.at<T>(query_head, t + i), *o = with.out.at<T>(query_head, t + i);
        V sum{};
        for (int64_t d = 0; d < call.dv; d += lanes)
          sum += load_some(g + d, call.dv - d) * load_some(o + d, call.dv - d);
        plan.shift[done + i] = lse[i] == -kInfinity ? kInfinity : lse[i] * static_cast<Acc>(kLog2e);
        plan.offset[done + i] = reduce_add(sum) - (dlse ? dlse[i] : Acc{0});
      }
    });
  }

  // Weights, and the gradient of the scores, of a block of rows.
  static void softmax_gradient(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                               const BackwardPlan& plan, const RowBlock& block, int64_t first, int64_t column) {
    const bool is_plain = plain(call, head);
    const Acc unit = static_cast<Acc>(is_plain ? call.scale * kLog2e : kLog2e);
    const int64_t padded = round_up(block.most, kWeightPad);
    const auto row_of = [&](int64_t i, Acc* factors) {
      const int64_t h = block.head[i], t = block.row[i], n = block.seen[i];
      typename Rows::GradientRow row{
          plan.scores + i * plan.stride, plan.dp + i * plan.stride, n, kInfinity, 0, nullptr, nullptr, 1};
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
      Rows::gradient_rows(upper, lower, padded, unit, plan.ds_rows + i * plan.stride, plan.stride);
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
    const V factor = broadcast<Acc>(static_cast<Acc>(call.scale));
    for_runs(0, plan.rows, head.rows, [&](int64_t done, int64_t query_head, int64_t t, int64_t run) {
      for (int64_t i = 0; i < run; ++i) {
        const Acc* from = plan.dq + (done + i) * plan.width;
        if (to.dq_partial) {
          memcpy(static_cast<Acc*>(to.dq_partial) + (done + i) * call.d, from,
                 static_cast<size_t>(call.d) * sizeof(Acc));
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
    const BackwardPlan plan(call, head, columns, parts);
    RowBlock block;
    row_statistics(call, head, with, plan);
    memset(plan.dq, 0, static_cast<size_t>(round_up(plan.rows, kRowPad) * plan.width) * sizeof(Acc));
    RegisterTile::begin();
    for (int64_t column = first; column < first + columns; column += plan.block) {
      const int64_t count = min_of(plan.block, first + columns - column);
      pack_panels<T>(head.k.at<T>(0, column), head.k.row_stride, count, call.d, plan.depth, plan.k);
      pack_panels<T>(head.v.at<T>(0, column), head.v.row_stride, count, call.dv, plan.depth_v, plan.v);
      pack_units<T>(head.k.at<T>(0, column), head.k.row_stride, count, call.d, round_up(count, kUnit), plan.k_units,
                    plan.width);
      memset(plan.dk, 0, static_cast<size_t>(plan.turned * plan.stride) * sizeof(Acc));
      memset(plan.dv, 0, static_cast<size_t>(plan.turned_v * plan.stride) * sizeof(Acc));
      for (int64_t r = 0; r < plan.rows; r += kBackwardRows) {
        lay(call, head, r, min_of(kBackwardRows, plan.rows - r), column, count, block);
        if (block.most == 0) continue;
        backward_block(call, head, with, plan, block, r, column);
      }
      write_turned(plan.dk, plan.stride, count, call.d, call.scale, with.dk, column);
      write_turned(plan.dv, plan.stride, count, call.dv, 1, with.dv, column);
    }
    RegisterTile::end();
    write_dq(call, head, with, plan);
  }

  static void backward_block(const AttentionCall& call, const AttentionHead& head, const AttentionBackward& with,
                             const BackwardPlan& plan, const RowBlock& block, int64_t first, int64_t column) {
    pack_block(head.q, head, first, block, call.d, plan.q, plan.depth);
    pack_block(with.dout, head, first, block, call.dv, plan.dout, plan.depth_v);
    pack_rows_turned<T>(plan.q, plan.depth, block.padded, call.d, plan.turned, plan.q_turned, block.padded);
    pack_rows_turned<T>(plan.dout, plan.depth_v, block.padded, call.dv, plan.turned_v, plan.dout_turned, block.padded);
    score(block, plan.q, plan.depth, plan.k, plan.scores, plan.stride);
    score(block, plan.dout, plan.depth_v, plan.v, plan.dp, plan.stride);
    softmax_gradient(call, head, with, plan, block, first, column);
    // Paired weights and ds of two rows lie in the upper one, so units are two rows of scores apart.
    const int64_t unit_stride = kPair * plan.stride * kNarrowing;
    const E *weights = reinterpret_cast<const E*>(plan.scores), *ds = reinterpret_cast<const E*>(plan.dp);
    const auto all_rows = [&](int64_t) { return block.padded; };
    multiply<T>(call.dv, block.most, all_rows, plan.dout_turned, block.padded, weights, unit_stride, plan.dv,
                plan.stride, true);
    multiply<T>(call.d, block.most, all_rows, plan.q_turned, block.padded, ds, unit_stride, plan.dk, plan.stride, true);
    multiply<T>(
        block.padded, plan.width, [&](int64_t i) { return block.seen_by_tile(i); }, kPair == 2 ? plan.ds_rows : ds,
        plan.stride, plan.k_units, plan.width * kPair, plan.dq + first * plan.width, plan.width, true);
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

  static constexpr AttentionKernels table{&forward_bytes, &forward, &backward_bytes, &backward, &join};
};

}  // namespace

const AttentionTable& attention_table() {
  static constexpr AttentionTable table{{Impl<float>::table, Impl<double>::table, Impl<bf16>::table, Impl<f16>::table}};
  return table;
}

}  // namespace pymm::PYMM_ISA
