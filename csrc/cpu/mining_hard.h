// Batch-hard mining: for every anchor its positive of lowest and its negative of highest cosine, in one pass over
// tiles.
//
// Parallel over blocks of rows, handed out one after another, since the triangle's blocks differ in size. On chip: a
// tile of kRows x kColumns products, whose rows and columns both update their anchors' extremes while it is in cache:
// so the pairs of x with itself are computed once, above the diagonal, and those of x and y serve the anchors of both.
// Memory: a packed copy of the candidates and, per thread, two numbers and two positions per column. The extremes are
// ordered by value and then by position, so they do not depend on which thread saw them.
#pragma once

#include <atomic>

#include "cpu/mining.h"

namespace pymm {

template <class Acc>
class ExtremesOf {
 public:
  explicit ExtremesOf(int64_t n)
      : positive_(static_cast<size_t>(n), std::numeric_limits<Acc>::infinity()),
        negative_(static_cast<size_t>(n), -std::numeric_limits<Acc>::infinity()),
        positive_at_(static_cast<size_t>(n), -1),
        negative_at_(static_cast<size_t>(n), -1) {}

  Extremes<Acc> view() { return {positive_.data(), positive_at_.data(), negative_.data(), negative_at_.data()}; }
  // Takes what another has seen of the same anchors.
  void merge(const ExtremesOf& other, int64_t n) {
    for (size_t i = 0; i < static_cast<size_t>(n); ++i) {
      keep(other.positive_[i], other.positive_at_[i], positive_[i] > other.positive_[i], positive_[i], positive_at_[i]);
      keep(other.negative_[i], other.negative_at_[i], negative_[i] < other.negative_[i], negative_[i], negative_at_[i]);
    }
  }
  // Adds the triplet of every anchor that has both; writes (positive, negative) where the hinge is positive, else -1.
  Mined finish(int64_t n, double margin, int64_t* triplets) const {
    Mined mined;
    for (int64_t i = 0; i < n; ++i) {
      const size_t at = static_cast<size_t>(i);
      triplets[2 * i] = triplets[2 * i + 1] = -1;
      if (positive_at_[at] < 0 || negative_at_[at] < 0) continue;
      ++mined.count;
      const double z = margin + static_cast<double>(negative_[at]) - static_cast<double>(positive_[at]);
      if (!(z > 0)) continue;
      mined.loss += z;
      triplets[2 * i] = positive_at_[at];
      triplets[2 * i + 1] = negative_at_[at];
    }
    return mined;
  }

 private:
  static void keep(Acc value, Index<Acc> at, bool better, Acc& kept, Index<Acc>& kept_at) {
    if (at < 0) return;
    if (kept_at < 0 || better || (value == kept && at < kept_at)) {
      kept = value;
      kept_at = at;
    }
  }
  std::vector<Acc> positive_, negative_;
  std::vector<Index<Acc>> positive_at_, negative_at_;
};

// Without y (`y` null) the anchors are the rows of x; with it they are those of x and then those of y.
template <class T>
Mined mine_hard(const Side<T>& x, const Side<T>* y, const Labels& labels, double margin, int64_t* triplets) {
  using Acc = Accumulator<T>;
  const Gemm& gemm = gemm_for(dtype_of<T>());
  const Select<Acc>& select = select_for<Acc>();
  const Side<T>& other = y ? *y : x;
  const int64_t n = x.n, padded = round_up(n, kColumns), row_blocks = ceil_div(n, kRows);

  std::vector<Acc> column_scale(static_cast<size_t>(padded), std::numeric_limits<Acc>::quiet_NaN());
  std::vector<Index<Acc>> column_labels(static_cast<size_t>(padded), -1);
  for (int64_t i = 0; i < n; ++i) {
    column_scale[static_cast<size_t>(i)] = other.inverse[i];
    column_labels[static_cast<size_t>(i)] = static_cast<Index<Acc>>(labels.group[static_cast<size_t>(i)]);
  }
  const PackedB packed(gemm, n, x.d, matrix(other.rows, x.d, 1));
  const int64_t workers = min_of(thread_count(), row_blocks);
  ExtremesOf<Acc> rows(n);
  std::vector<ExtremesOf<Acc>> columns(static_cast<size_t>(workers), ExtremesOf<Acc>(padded));
  std::atomic<int64_t> next{0};
  parallel_tasks(workers, [&](int64_t worker) {
    PackedA a(gemm, x.d);
    Scratch tile(kRows * kColumns * static_cast<int64_t>(sizeof(Acc)));
    const Extremes<Acc> of_rows = rows.view(), of_columns = columns[static_cast<size_t>(worker)].view();
    for (int64_t task = next++; task < row_blocks; task = next++) {
      const int64_t row = task * kRows, count = min_of(kRows, n - row);
      a.fill(row, count, matrix(x.rows, x.d, 1));
      for (int64_t block = y ? 0 : (row + 1) / kColumns; block < packed.blocks(); ++block) {
        a.multiply(packed, block, tile.as<Acc>(), kColumns);
        for (int64_t r = row; r < row + count; ++r) {
          select.extremes(tile.as<Acc>() + (r - row) * kColumns, x.inverse[r], column_scale.data(),
                          column_labels.data(), column_labels[static_cast<size_t>(r)], static_cast<Index<Acc>>(r),
                          static_cast<Index<Acc>>(block * kColumns), kColumns, static_cast<Index<Acc>>(y ? -1 : r),
                          of_rows, of_columns);
        }
      }
    }
  });
  for (size_t w = 1; w < columns.size(); ++w) columns[0].merge(columns[w], n);
  if (!y) {
    rows.merge(columns[0], n);
    return rows.finish(n, margin, triplets);
  }
  const Mined first = rows.finish(n, margin, triplets), second = columns[0].finish(n, margin, triplets + 2 * n);
  return {first.loss + second.loss, first.count + second.count};
}

// The gradient of dloss / count times the sum of hinges, from the chosen triplets: few pairs, so no product of
// matrices.
template <class T>
void hard_gradient(const Side<T>& x, const Side<T>* y, const int64_t* triplets, double g, T* dx, T* dy) {
  using Acc = Accumulator<T>;
  const Side<T>& other = y ? *y : x;
  const RowsOf x_rows{x.rows, dtype_of<T>(), x.n, x.d}, y_rows{other.rows, dtype_of<T>(), other.n, x.d};
  std::vector<Pair> of_x, of_y;  // by row of x, and by row of the other side
  const auto add = [&](int64_t in_x, int64_t in_y, double weight) {
    of_x.push_back({in_x, in_y, weight});
    (y ? of_y : of_x).push_back({in_y, in_x, weight});
  };
  for (int64_t i = 0; i < x.n; ++i) {
    if (triplets[2 * i] < 0) continue;
    add(i, triplets[2 * i], -g);
    add(i, triplets[2 * i + 1], g);
  }
  for (int64_t j = 0; y && j < x.n; ++j) {
    const int64_t* triplet = triplets + 2 * (x.n + j);
    if (triplet[0] < 0) continue;
    add(triplet[0], j, -g);
    add(triplet[1], j, g);
  }
  chosen_gradient<Acc>(Groups(of_x, x.n), x_rows, y_rows, dx);
  if (y) chosen_gradient<Acc>(Groups(of_y, x.n), y_rows, x_rows, dy);
}

}  // namespace pymm
