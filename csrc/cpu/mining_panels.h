// Mining that needs all candidates of an anchor at once ("semi-hard", "all"), a panel of anchors at a time.
//
// A panel holds the cosines of some anchors with every candidate. Parallel: forward over panels of kMinedRows anchors,
// each thread its own. Backward over the same rows of one larger panel, in which W, the weights of the cosines in the
// loss, replaces the cosines and T_x += W y^ is added by the thread that mined them; then over candidates, T_y += W^T
// x^. Memory: kMinedRows rows of N per thread, in backward a panel of kPanelNumbers or of kMinedRows rows, and packed
// copies of the rows; never N x N. Every sum has one order, whatever the number of threads. An anchor with P positives
// costs O(N log P): its candidates are ranked among its sorted positives, by bisection, and all else follows from the
// ranks.
#pragma once

#include "cpu/mining.h"

namespace pymm {

constexpr int64_t kMinedRows = 48;                   // a multiple of every register tile's rows
constexpr int64_t kPanelNumbers = int64_t{1} << 20;  // of backward's panel, if that is more than kMinedRows rows

// The mining of one anchor's row of cosines, with the buffers it needs.
template <class Acc>
class RowMiner {
 public:
  RowMiner(int64_t candidates, double margin, bool semi_hard)
      : margin_(static_cast<Acc>(margin)), semi_hard_(semi_hard), ranks_(static_cast<size_t>(candidates)) {}

  // `s` holds the cosines of anchor `i` with all candidates and is destroyed; with `weights` it becomes W's row.
  Mined mine(Acc* s, int64_t i, bool crossed, const Labels& labels, bool weights) {
    const int64_t n = labels.rows();
    collect(s, i, crossed, labels);
    Mined mined;
    const bool valid = !positives_.empty() && labels.end(i) - labels.begin(i) < n;
    if (valid) mined = semi_hard_ ? semi_hard(s, n) : all(s, n);
    if (!weights) return mined;
    if (semi_hard_ || !valid) {
      std::fill(s, s + n, Acc(0));
    } else {
      for (int64_t j = 0; j < n; ++j) s[j] = static_cast<Acc>(ranks_[static_cast<size_t>(j)]);
    }
    for (const Change& change : changes_) s[change.at] += static_cast<Acc>(change.by);
    return mined;
  }

 private:
  struct Positive {
    Acc value;
    int64_t at;
  };
  struct Change {
    int64_t at;
    int64_t by;
  };

  // Takes the positives out of the row, sorted; they and the anchor itself become -inf, which no rule selects.
  void collect(Acc* s, int64_t i, bool crossed, const Labels& labels) {
    positives_.clear();
    changes_.clear();
    for (const int64_t* p = labels.begin(i); p != labels.end(i); ++p) {
      if (crossed || *p != i) positives_.push_back({s[*p], *p});
      s[*p] = -std::numeric_limits<Acc>::infinity();
    }
    std::sort(positives_.begin(), positives_.end(), [](const Positive& a, const Positive& b) {
      return a.value != b.value ? a.value < b.value : a.at < b.at;
    });
    size_t capacity = 1;
    while (capacity - 1 < positives_.size()) capacity *= 2;
    sorted_.assign(capacity - 1, std::numeric_limits<Acc>::infinity());
    for (size_t k = 0; k < positives_.size(); ++k) sorted_[k] = positives_[k].value;
  }

  // Each negative n has a positive hinge with the ranks[n] positives whose cosine is below s_n + margin.
  Mined all(const Acc* s, int64_t n) {
    const size_t count = positives_.size();
    select_for<Acc>().ranks(sorted_.data(), static_cast<int64_t>(count), s, margin_, false, n, ranks_.data());
    with_rank_.assign(count + 1, 0);
    double sum = 0;
    for (int64_t j = 0; j < n; ++j) {
      const Index<Acc> rank = ranks_[static_cast<size_t>(j)];
      if (rank == 0) continue;
      ++with_rank_[static_cast<size_t>(rank)];
      sum += static_cast<double>(rank) * (static_cast<double>(s[j]) + static_cast<double>(margin_));
    }
    Mined mined;
    int64_t negatives = 0;  // that have a positive hinge with positive k: those of a rank above k
    for (size_t k = count; k-- > 0;) {
      negatives += with_rank_[k + 1];
      mined.count += negatives;
      sum -= static_cast<double>(negatives) * static_cast<double>(positives_[k].value);
      if (negatives > 0) changes_.push_back({positives_[k].at, -negatives});
    }
    mined.loss = sum;
    return mined;
  }

  // Each negative is farther than the positives of its rank or above. So the nearest negative beyond positive k is the
  // best of those with rank <= k, kept as k grows.
  Mined semi_hard(const Acc* s, int64_t n) {
    const size_t count = positives_.size();
    select_for<Acc>().ranks(sorted_.data(), static_cast<int64_t>(count), s, 0, true, n, ranks_.data());
    nearest_.assign(count + 1, {-std::numeric_limits<Acc>::infinity(), -1});
    for (int64_t j = 0; j < n; ++j) {
      Positive& best = nearest_[static_cast<size_t>(ranks_[static_cast<size_t>(j)])];
      if (s[j] > best.value) best = {s[j], j};
    }
    Mined mined;
    Positive negative{-std::numeric_limits<Acc>::infinity(), -1};
    for (size_t k = 0; k < count; ++k) {
      const Positive& found = nearest_[k];
      if (found.value > negative.value || (found.value == negative.value && found.at < negative.at)) negative = found;
      if (negative.at < 0 || !(negative.value + margin_ > positives_[k].value)) continue;
      ++mined.count;
      mined.loss +=
          static_cast<double>(margin_) + static_cast<double>(negative.value) - static_cast<double>(positives_[k].value);
      changes_.push_back({negative.at, 1});
      changes_.push_back({positives_[k].at, -1});
    }
    return mined;
  }

  Acc margin_;
  bool semi_hard_;
  std::vector<Index<Acc>> ranks_;
  std::vector<Positive> positives_, nearest_;
  std::vector<Acc> sorted_;
  std::vector<int64_t> with_rank_;
  std::vector<Change> changes_;
};

// Rows [first, first + count) of `side`, normalized, as the second operand of a product over these rows: (D, count).
template <class T>
PackedB packed_units(const Gemm& gemm, const Side<T>& side, int64_t first, int64_t count) {
  using Acc = Accumulator<T>;
  return PackedB(gemm, side.d, count, [&](int64_t row, int64_t rows, int64_t k, int64_t depth, void* panels) {
    Scratch unit(depth * rows * static_cast<int64_t>(sizeof(Acc)));
    for (int64_t j = 0; j < depth; ++j) {
      const int64_t at = first + k + j;
      rows_for(dtype_of<T>()).widen(side.row(at) + row, side.inverse[at], rows, unit.as<Acc>() + j * rows);
    }
    gemm.pack_b_accumulators(unit.as<Acc>(), 1, rows, rows, depth, panels);
  });
}

// to[i, :] += A[i, :] . b^T for the rows of A that are packed; A and `to` are in accumulators.
template <class Acc>
void add_product(const PackedA& a, int64_t rows, const PackedB& b, int64_t d, Acc* tile, Acc* to) {
  for (int64_t block = 0; block < b.blocks(); ++block) {
    a.multiply(b, block, tile, kColumns);
    for (int64_t r = 0; r < rows; ++r) {
      Acc* target = to + r * d + block * kColumns;
      rows_for(dtype_of<Acc>()).add_scaled(target, 1, tile + r * kColumns, b.columns(block));
    }
  }
}

// Mines the anchors of one side among the candidates of the other, which is the same unless `crossed`.
template <class T>
class Panels {
 public:
  using Acc = Accumulator<T>;

  Panels(const Side<T>& anchors, const Side<T>& candidates, bool crossed, const Labels& labels, double margin,
         bool semi_hard)
      : anchors_(anchors),
        candidates_(candidates),
        crossed_(crossed),
        labels_(labels),
        margin_(margin),
        semi_hard_(semi_hard),
        n_(anchors.n),
        d_(anchors.d),
        ldc_(round_up(n_, kColumns)),
        packed_(gemm_for(dtype_of<T>()), n_, d_, matrix(candidates.rows, d_, 1)) {}

  Mined loss() const {
    std::vector<Mined> of_row(static_cast<size_t>(n_));
    parallel_ranges(ceil_div(n_, kMinedRows), 1, [&](int64_t begin, int64_t end) {
      Miner miner(*this);
      Scratch panel(kMinedRows * ldc_ * static_cast<int64_t>(sizeof(Acc)));
      for (int64_t task = begin; task < end; ++task) {
        const int64_t first = task * kMinedRows, count = min_of(kMinedRows, n_ - first);
        miner.mine(first, count, panel.as<Acc>(), false, of_row.data() + first);
      }
    });
    Mined mined;
    for (const Mined& row : of_row) {
      mined.loss += row.loss;
      mined.count += row.count;
    }
    return mined;
  }

  // Adds W y^ to t_anchors and W^T x^ to t_candidates, (N, D) each; they may be one.
  void gradient(Acc* t_anchors, Acc* t_candidates) const {
    const Gemm& gemm = gemm_for(dtype_of<Acc>());  // W holds counts, which 16 bits would round
    const int64_t tasks = min_of(ceil_div(n_, kMinedRows), max_of(1, kPanelNumbers / ldc_ / kMinedRows));
    const int64_t panel_rows = tasks * kMinedRows;
    const PackedB units = packed_units(gemm, candidates_, 0, n_);
    Scratch panel(panel_rows * ldc_ * static_cast<int64_t>(sizeof(Acc)));
    Acc* w = panel.as<Acc>();
    for (int64_t start = 0; start < n_; start += panel_rows) {
      const int64_t rows = min_of(panel_rows, n_ - start);
      parallel_ranges(ceil_div(rows, kMinedRows), 1, [&](int64_t begin, int64_t end) {
        Miner miner(*this);
        PackedA packed(gemm, n_, kMinedRows);
        Scratch tile(kMinedRows * kColumns * static_cast<int64_t>(sizeof(Acc)));
        Mined unused[kMinedRows];
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task * kMinedRows, count = min_of(kMinedRows, rows - row);
          miner.mine(start + row, count, w + row * ldc_, true, unused);
          packed.fill(row, count, accumulator_matrix(w, ldc_, 1));
          add_product(packed, count, units, d_, tile.as<Acc>(), t_anchors + (start + row) * d_);
        }
      });
      const PackedB anchor_units = packed_units(gemm, anchors_, start, rows);
      parallel_ranges(ceil_div(n_, kRows), 1, [&](int64_t begin, int64_t end) {
        PackedA packed(gemm, rows);
        Scratch tile(kRows * kColumns * static_cast<int64_t>(sizeof(Acc)));
        for (int64_t task = begin; task < end; ++task) {
          const int64_t row = task * kRows, count = min_of(kRows, n_ - row);
          packed.fill(row, count, accumulator_matrix(w, 1, ldc_));
          add_product(packed, count, anchor_units, d_, tile.as<Acc>(), t_candidates + row * d_);
        }
      });
    }
  }

 private:
  // One thread's part.
  class Miner {
   public:
    explicit Miner(const Panels& p)
        : p_(p), a_(p.packed_.gemm(), p.d_, kMinedRows), row_(p.n_, p.margin_, p.semi_hard_) {}

    // Cosines of `count` anchors with all candidates, in place of which their rows of W may stand at the end.
    void mine(int64_t first, int64_t count, Acc* s, bool weights, Mined* of_row) {
      a_.fill(first, count, matrix(p_.anchors_.rows, p_.d_, 1));
      for (int64_t block = 0; block < p_.packed_.blocks(); ++block) {
        Acc* tile = s + block * kColumns;
        a_.multiply(p_.packed_, block, tile, p_.ldc_);
        for (int64_t r = 0; r < count; ++r) {
          rows_for(dtype_of<Acc>())
              .narrow_columns(tile + r * p_.ldc_, p_.anchors_.inverse[first + r],
                              p_.candidates_.inverse + block * kColumns, p_.packed_.columns(block), tile + r * p_.ldc_);
        }
      }
      for (int64_t r = 0; r < count; ++r) {
        of_row[r] = row_.mine(s + r * p_.ldc_, first + r, p_.crossed_, p_.labels_, weights);
      }
    }

   private:
    const Panels& p_;
    PackedA a_;
    RowMiner<Acc> row_;
  };

  Side<T> anchors_, candidates_;
  bool crossed_;
  const Labels& labels_;
  double margin_;
  bool semi_hard_;
  int64_t n_, d_, ldc_;
  PackedB packed_;
};

// dx_i = g (t - <t, x^> x^) / ||x_i||, with t the row of T, which is destroyed.
template <class T>
void finish_gradient(const Side<T>& side, double g, Accumulator<T>* t, T* dx) {
  using Acc = Accumulator<T>;
  const Rows& rows_of = rows_for(dtype_of<T>());
  parallel_ranges(side.n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Acc* row = t + i * side.d;
      const double inverse = side.inverse[i];
      if (norm_is_free(inverse)) {
        const double radial = rows_of.dot(row, side.row(i), side.d) * inverse * inverse;
        rows_of.add_scaled(row, -radial, side.row(i), side.d);
      }
      rows_of.narrow(row, g * inverse, side.d, dx + i * side.d);
    }
  });
}

}  // namespace pymm
