// What the passes of attention share: scratch memory, a block of rows and the columns that each may see, its scores and
// their softmax.
#pragma once

#include "cpu/simd/attention_rows.h"
#include "cpu/simd/tile.h"

namespace pymm::PYMM_ISA {

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
struct AttentionBlocks {
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

  static void scale_row(Acc* row, Acc factor, int64_t width) {
    for (int64_t i = 0; i < width; i += lanes) store(row + i, load(row + i) * factor);
  }

  // The scores of a block of rows, and room for dropout's factors of one row.
  struct Scores {
    Acc* at;
    int64_t stride;
    Acc* factors;
  };

  // What is kept of a block's rows from one block of columns to the next.
  struct Running {
    Acc *maxima, *sums, *out;
    int64_t width;  // from row to row of out
  };

  // Turns the scores of a block's rows into weights, and brings their running maxima and sums up to date.
  static void softmax(const AttentionCall& call, const AttentionHead& head, const RowBlock& block, int64_t column,
                      bool again, const Scores& scores, const Running& running) {
    const bool is_plain = plain(call, head);
    const Acc unit = static_cast<Acc>(is_plain ? call.scale * kLog2e : kLog2e);
    for (int64_t i = 0; i < block.padded; ++i) {
      Acc* s = scores.at + i * scores.stride;
      const int64_t n = block.seen[i], padded = round_up(block.seen_by_tile(i), kWeightPad);
      Acc before = again ? running.maxima[i] : -kInfinity, sum = again ? running.sums[i] : Acc{0};
      const Acc largest =
          is_plain ? Rows::row_max(s, n) : Rows::mask_row(head, call.scale, block.head[i], block.row[i], column, s, n);
      const Acc maximum = largest * unit > before ? largest * unit : before;
      if (maximum == -kInfinity && !Rows::has_nan(s, n)) {
        Rows::clear_weights(reinterpret_cast<E*>(s), 0, padded);
      } else {
        if (again && maximum != before) {
          const Acc fade = vexp2(broadcast<Acc>(before - maximum))[0];
          sum *= fade;
          scale_row(running.out + i * running.width, fade, running.width);
        }
        const Acc* factors = nullptr;  // of dropout
        if (call.dropout_p > 0 && i < block.count) {
          dropout_factors(call, head.first_head + block.head[i], block.row[i], column, n, scores.factors);
          factors = scores.factors;
        }
        sum += Rows::softmax_row(s, n, padded, unit, maximum, factors);
      }
      running.maxima[i] = maximum;
      running.sums[i] = sum;
    }
  }

  static float log_sum_exp(float maximum, float sum) {
    return static_cast<float>(kLn2) * (maximum + __builtin_log2f(sum));
  }
  static double log_sum_exp(double maximum, double sum) { return kLn2 * (maximum + __builtin_log2(sum)); }

  // The same of a vector of rows; those that attend nowhere have a sum of 0.
  static V log_sum_exp(V maximum, V sum) {
    const V log = (maximum + log2_of(sum)) * broadcast<Acc>(static_cast<Acc>(kLn2));
    return sum == V{} ? broadcast<Acc>(-kInfinity) : log;
  }
  // log2(x) of normal numbers within 2 units in the last place: x = 2^n m with m from sqrt(1/2) to sqrt(2), and
  // ln m = 2 atanh((m - 1) / (m + 1)) as a series.
  static vfloat log2_of(vfloat x) {
    constexpr int32_t kRootHalf = 0x3f3504f3;
    const vint bits = (vint)x - kRootHalf;
    const vfloat n = __builtin_convertvector(bits >> 23, vfloat), m = (vfloat)((bits & 0x7fffff) + kRootHalf);
    const vfloat z = (m - 1.0f) / (m + 1.0f), q = z * z;
    vfloat p = q * (1.0f / 9) + 1.0f / 7;
    p = p * q + 1.0f / 5;
    p = p * q + 1.0f / 3;
    p = (p * q) * z + z;
    const vfloat log = p * static_cast<float>(2 * kLog2e) + n;
    return x < __builtin_inff() ? log : x;
  }
  static vdouble log2_of(vdouble x) {
    for (int i = 0; i < lanes_of<double>(); ++i) x[i] = __builtin_log2(x[i]);
    return x;
  }
};

}  // namespace pymm::PYMM_ISA
