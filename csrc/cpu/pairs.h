// Every pair of a row of X and a row of Y, tile by tile: what the contrastive losses do instead of an N x N matrix.
//
// Y is cut into strips; a strip is packed once, for all threads. Parallel: over blocks of rows of X, each owned by one
// part, so that sums over columns need no lock; sums over rows are kept per part and added in the order of the parts
// at the end of a strip. The parts depend on the number of threads and of rows only, so a rerun gives the same bits.
// On chip: a block of X, one tile of scores and what is made of it; the panels of the strip stream from L2 and L3.
// Memory: the strip, O(parts * strip * D), and for the gradient of X one accumulator per element (row_sums.h).
//
// Both sides may have a second set of rows (a queue of negatives); rows of the second sets never meet. A teacher's
// features beside a set's own give every tile a second tile of the teacher's scores.
#pragma once

#include <algorithm>

#include "cpu/product.h"
#include "cpu/row_sums.h"
#include "cpu/simd/rows.h"

namespace pymm {

template <class T>
struct Features {
  const T* data = nullptr;     // (n, d)
  const T* teacher = nullptr;  // (n, d), or null
  int64_t n = 0;
};

template <class T>
struct Pairs {
  Features<T> rows[2], columns[2];
  int64_t d = 0;
};

// Dot products of rows [row, row + rows) of a set with columns [column, column + columns) of a set. `strip_column`
// is where the tile begins in its strip.
template <class Acc>
struct PairTile {
  int64_t part;
  int row_set;
  int64_t row, rows;
  int column_set;
  int64_t column, columns, strip_column;
  Acc* scores;
  Acc* teacher;
  int64_t ld;
};

struct RowBlock {
  int set;
  int64_t row, rows;
};

// The blocks of the rows that meet one set of columns, and which part owns which.
class RowBlocks {
 public:
  template <class T>
  RowBlocks(const Pairs<T>& pairs, int column_set, int64_t most_rows, int64_t unit) {
    const int sets = column_set == 0 ? 2 : 1;
    int64_t tiles[2] = {};
    for (int set = 0; set < sets; ++set) tiles[set] = ceil_div(pairs.rows[set].n, unit);
    parts_ = min_of(thread_count(), max_of(tiles[0], tiles[1]));
    // Each part gets as many register tiles as every other, and cuts them into blocks of one size.
    for (int64_t part = 0; part < parts_; ++part) {
      first_.push_back(blocks_.size());
      for (int set = 0; set < sets; ++set) {
        const int64_t begin = tiles[set] * part / parts_, count = tiles[set] * (part + 1) / parts_ - begin;
        const int64_t blocks = ceil_div(count, most_rows / unit);
        for (int64_t i = 0; i < blocks; ++i) {
          const int64_t row = (begin + count * i / blocks) * unit;
          blocks_.push_back({set, row, min_of(pairs.rows[set].n, (begin + count * (i + 1) / blocks) * unit) - row});
        }
      }
    }
    first_.push_back(blocks_.size());
  }

  int64_t parts() const { return parts_; }

  // f(part) in parallel; of(part, f) calls f(block) for each block of a part, in order.
  template <class F>
  void of(int64_t part, F&& f) const {
    for (size_t i = first_[part]; i < first_[part + 1]; ++i) f(blocks_[i]);
  }

 private:
  std::vector<RowBlock> blocks_;
  std::vector<size_t> first_;  // block of each part
  int64_t parts_;
};

// A part's packed rows, and the products with a tile's columns of the packed strip.
template <class T>
class TileProduct {
 public:
  using Acc = Accumulator<T>;
  TileProduct(const Gemm& gemm, int64_t d, int64_t rows) : d_(d), a_(gemm, d, rows) {}

  void fill(const T* rows, int64_t count) {
    count_ = count;
    a_.fill(0, count, matrix(rows, d_, 1));
  }
  void multiply(const PackedB& strip, int64_t column, int64_t columns, Acc* tile, int64_t ld) const {
    if (d_ == 0) std::fill(tile, tile + count_ * ld, Acc{0});
    for (int64_t done = 0; done < columns; done += kColumns) {
      a_.multiply(strip, (column + done) / kColumns, tile + done, ld);
    }
  }

 private:
  int64_t d_, count_ = 0;
  PackedA a_;
};

template <class T>
class PackedStrip {
 public:
  PackedStrip(const Gemm& gemm, const Features<T>& columns, int64_t first, int64_t count, int64_t d)
      : own_(gemm, count, d, matrix(columns.data + first * d, d, 1)) {
    if (columns.teacher) teacher_.emplace(gemm, count, d, matrix(columns.teacher + first * d, d, 1));
  }
  const PackedB& own() const { return own_; }
  const PackedB* teacher() const { return teacher_ ? &*teacher_ : nullptr; }

 private:
  PackedB own_;
  std::optional<PackedB> teacher_;
};

// One sum per part, each on a cache line of its own, added in the order of the parts.
class PartSums {
 public:
  PartSums() : sums_(thread_count() * 8) {}
  double& operator[](int64_t part) { return sums_[part * 8]; }
  double total() const {
    double sum = 0;
    for (size_t i = 0; i < sums_.size(); i += 8) sum += sums_[i];
    return sum;
  }

 private:
  std::vector<double> sums_;
};

constexpr int64_t kScanRows = 96, kScanColumns = 128, kScanStrip = 1024;

// visit(tile) for every tile; begin_strip(column_set, first, count, parts) before and end_strip(the same) after each
// strip of columns. visit runs in parallel, once at a time per part, and must not throw.
template <class T, class Begin, class Visit, class End>
void scan_pairs(const Pairs<T>& pairs, Begin&& begin_strip, Visit&& visit, End&& end_strip) {
  using Acc = Accumulator<T>;
  const Gemm& gemm = gemm_for(dtype_of<T>());
  for (int set = 0; set < 2; ++set) {
    const Features<T>& columns = pairs.columns[set];
    const RowBlocks blocks(pairs, set, kScanRows, gemm.mr);
    for (int64_t first = 0; first < columns.n; first += kScanStrip) {
      const int64_t count = min_of(kScanStrip, columns.n - first);
      const PackedStrip<T> strip(gemm, columns, first, count, pairs.d);
      begin_strip(set, first, count, blocks.parts());
      parallel_tasks(blocks.parts(), [&](int64_t part) {
        constexpr int64_t bytes = kScanRows * kScanColumns * static_cast<int64_t>(sizeof(Acc));
        Scratch scores(bytes), teacher_scores(strip.teacher() ? bytes : 0);
        TileProduct<T> own(gemm, pairs.d, kScanRows);
        std::optional<TileProduct<T>> teacher;
        if (strip.teacher()) teacher.emplace(gemm, pairs.d, kScanRows);
        blocks.of(part, [&](const RowBlock& block) {
          const Features<T>& rows = pairs.rows[block.set];
          own.fill(rows.data + block.row * pairs.d, block.rows);
          if (teacher) teacher->fill(rows.teacher + block.row * pairs.d, block.rows);
          for (int64_t column = 0; column < count; column += kScanColumns) {
            const int64_t width = min_of(kScanColumns, count - column);
            own.multiply(strip.own(), column, width, scores.as<Acc>(), kScanColumns);
            if (teacher) {
              teacher->multiply(*strip.teacher(), column, width, teacher_scores.as<Acc>(), kScanColumns);
            }
            visit(PairTile<Acc>{part, block.set, block.row, block.rows, set, first + column, width, column,
                                scores.as<Acc>(), teacher ? teacher_scores.as<Acc>() : nullptr, kScanColumns});
          }
        });
      });
      end_strip(set, first, count, blocks.parts());
    }
  }
}

constexpr int64_t kGradientRows = 192, kGradientColumns = 256, kGradientStrip = 512;
constexpr int64_t kStripBytes = 8 << 20;  // of the parts' sums over rows, together

// The columns of a strip: as many as the parts' sums allow.
inline int64_t gradient_strip(int64_t parts, int64_t d, int64_t element_bytes) {
  const int64_t fitting = kStripBytes / max_of(1, parts * d * element_bytes);
  return max_of(kGradientColumns, min_of(kGradientStrip, fitting / kGradientColumns * kGradientColumns));
}

// What to make of the gradients G of the dot products.
template <class T>
struct Wanted {
  const RowSums<T>* rows[2] = {};  // += G . Y, per set; null: not wanted
  bool columns[2] = {};            // G^T . X, per set
  bool everywhere = true;          // visit every tile, wanted for that or not
  bool wide = false;               // G is beyond float16's range (gradient_range.h)
};

// For every tile, visit(tile) turns its dot products into G in place. finish(set, first, count, sums) receives G^T . X
// in accumulators, (count, d), for the columns [first, first + count) of a set.
template <class T, class Visit, class Finish>
void differentiate_pairs(const Pairs<T>& pairs, const Wanted<T>& wanted, Visit&& visit, Finish&& finish) {
  using Acc = Accumulator<T>;
  const Gemm& gemm = (wanted.wide ? wide_gemm_for : gemm_for)(dtype_of<T>());
  const int64_t d = pairs.d, acc_bytes = sizeof(Acc);
  for (int set = 0; set < 2; ++set) {
    const Features<T>& columns = pairs.columns[set];
    const RowBlocks blocks(pairs, set, kGradientRows, gemm.mr);
    const int64_t parts = blocks.parts();
    const bool to_columns = wanted.columns[set] && d > 0;
    const int64_t width = gradient_strip(parts, d, acc_bytes);
    const int64_t part_bytes = round_up(min_of(width, columns.n) * d * acc_bytes, 64) + 64;
    Scratch column_sums(to_columns && columns.n > 0 ? parts * part_bytes : 0);
    for (int64_t first = 0; first < columns.n; first += width) {
      const int64_t count = min_of(width, columns.n - first), tiles = ceil_div(count, kGradientColumns);
      const PackedStrip<T> strip(gemm, columns, first, count, d);
      // The strip again for G . Y, where K runs over its rows.
      const int64_t turned_bytes = round_up(gemm.b_bytes(d, kGradientColumns), 64);
      Scratch turned((wanted.rows[0] || wanted.rows[1]) ? tiles * turned_bytes : 0);
      if (wanted.rows[0] || wanted.rows[1]) {
        parallel_tasks(tiles, [&](int64_t tile) {
          const int64_t column = tile * kGradientColumns;
          gemm.pack_b(columns.data + (first + column) * d, 1, d, d, min_of(kGradientColumns, count - column),
                      turned.as<char>(tile * turned_bytes));
        });
      }
      parallel_tasks(parts, [&](int64_t part) {
        constexpr int64_t bytes = kGradientRows * kGradientColumns * static_cast<int64_t>(sizeof(Acc));
        Scratch scores(bytes), teacher_scores(strip.teacher() ? bytes : 0);
        Scratch by_rows(gemm.a_bytes(kGradientRows, kGradientColumns));
        Scratch by_columns(gemm.a_bytes(kGradientColumns, kGradientRows));
        Scratch block_panels(to_columns ? gemm.b_bytes(d, kGradientRows) : 0);
        TileProduct<T> own(gemm, d, kGradientRows);
        std::optional<TileProduct<T>> teacher;
        if (strip.teacher()) teacher.emplace(gemm, d, kGradientRows);
        bool first_block = true;
        blocks.of(part, [&](const RowBlock& block) {
          const Features<T>& rows = pairs.rows[block.set];
          const RowSums<T>* const to_rows = d > 0 ? wanted.rows[block.set] : nullptr;
          if (!to_rows && !to_columns && !wanted.everywhere) return;
          own.fill(rows.data + block.row * d, block.rows);
          if (teacher) teacher->fill(rows.teacher + block.row * d, block.rows);
          if (to_columns) gemm.pack_b(rows.data + block.row * d, 1, d, d, block.rows, block_panels.as<void>());
          // Every row meets the first strip of the first set, before all others.
          bool fresh = set == 0 && first == 0;
          Acc* const sums = to_rows ? to_rows->open(part, block.row, block.rows, fresh) : nullptr;
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t column = tile * kGradientColumns, wide = min_of(kGradientColumns, count - column);
            Acc* const g = scores.as<Acc>();
            own.multiply(strip.own(), column, wide, g, kGradientColumns);
            if (teacher) teacher->multiply(*strip.teacher(), column, wide, teacher_scores.as<Acc>(), kGradientColumns);
            visit(PairTile<Acc>{part, block.set, block.row, block.rows, set, first + column, wide, column, g,
                                teacher ? teacher_scores.as<Acc>() : nullptr, kGradientColumns});
            if (to_rows) {
              gemm.pack_a_accumulators(g, kGradientColumns, 1, block.rows, wide, by_rows.as<void>());
              gemm.multiply(block.rows, d, wide, by_rows.as<void>(), turned.as<void>(tile * turned_bytes), sums, d,
                            !fresh);
              fresh = false;
            }
            if (to_columns) {
              gemm.pack_a_accumulators(g, 1, kGradientColumns, wide, block.rows, by_columns.as<void>());
              gemm.multiply(wide, d, block.rows, by_columns.as<void>(), block_panels.as<void>(),
                            column_sums.as<Acc>(part * part_bytes) + column * d, d, !first_block);
            }
          }
          if (to_rows) to_rows->close(part, block.row, block.rows);
          first_block = false;
        });
      });
      if (!to_columns) continue;
      parallel_ranges(count, 16, [&](int64_t begin, int64_t end) {
        Acc* const total = column_sums.as<Acc>() + begin * d;
        for (int64_t part = 1; part < parts; ++part) {
          rows_for(dtype_of<Acc>())
              .add_scaled(total, 1.0, column_sums.as<Acc>(part * part_bytes) + begin * d, (end - begin) * d);
        }
        finish(set, first + begin, end - begin, total);
      });
    }
  }
}

}  // namespace pymm
