// Inner loops of info_nce over one tile of scores, row-major and `ld` apart, in accumulators (float or double).
//
// A tile arrives as dot products. `cosines` turns them into c[i, j] = dot * row_factor[i] * column_factor[j]; a logit
// is scale * c with scale >= 0 (a negative scale has its sign in the row factors). Exponentials are taken against a
// reference: one for the tile when all maxima lie close together, so that a score costs one exponential for its row
// and its column, or one per row and one per column when they do not.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

template <class Acc>
struct ScoreTile {
  Acc* data;
  int64_t ld, rows, columns;
};

// What exponentials are taken against: exp(scale * c - reference). A side that is absent has a null array.
template <class Acc>
struct References {
  bool shared;
  Acc tile;                 // shared: for all scores
  const Acc *row, *column;  // not shared: for each row, and again for each column
};

template <class Acc>
struct ExpSums {
  bool rows, columns;  // which sums are wanted; all are added to
  double *row, *column;
  const Acc* weights;  // another tile of the same shape, or null: the sums of exp * weight too
  double *row_weighted, *column_weighted;
};

template <class Acc>
struct TileGradient {
  const Acc *row_factor, *column_factor;
  // d loss / d logit = exp(..) * row_weight[i] + exp(..) * column_weight[j] - targets. A null weight: no such side.
  const Acc *row_weight, *column_weight;
  // Targets of equal ids, row[i] + column[j]; null: none.
  const Acc *row_hard, *column_hard;
  const int32_t *row_ids, *column_ids;
  // The partner of row r is column r + diagonal, where there is such a column: what it adds to the gradient of the
  // scale, and its own gradient, are left to the caller.
  bool has_diagonal;
  int64_t diagonal;
  // Targets of every score, row[i] + column[j]; null: none.
  const Acc *row_smooth, *column_smooth;
  // Targets of every score: a tile that `soft_targets` made, as this one apart; null: none.
  const Acc* soft;
};

template <class Acc>
struct InfoNceLoops {
  // Cosines in place, running maxima of rows and columns (either may be null), and the range of those maxima.
  void (*cosines)(ScoreTile<Acc> tile, const Acc* row_factor, const Acc* column_factor, Acc* row_max, Acc* column_max,
                  Acc* lowest, Acc* highest);
  void (*exp_sums)(ScoreTile<Acc> cosines, Acc scale, const References<Acc>& reference, const ExpSums<Acc>& sums);
  // Sums of the cosines of equal ids, and of all cosines; a null column array: no column side.
  void (*sums)(ScoreTile<Acc> cosines, const int32_t* row_ids, const int32_t* column_ids, double* row_equal,
               double* column_equal, double* row_all, double* column_all);
  // From dot products to the teacher's share of the targets, exp(..) * row_weight + exp(..) * column_weight, in place.
  void (*soft_targets)(ScoreTile<Acc> tile, Acc scale, const References<Acc>& reference,
                       const TileGradient<Acc>& gradient);
  // From dot products to d loss / d logit * row_factor * column_factor, in place; returns the sum of
  // d loss / d logit * c, the gradient of the scale, over all but the diagonal.
  double (*gradient)(ScoreTile<Acc> tile, Acc scale, const References<Acc>& reference,
                     const TileGradient<Acc>& gradient);
};

struct InfoNceTable {
  InfoNceLoops<float> of_float;
  InfoNceLoops<double> of_double;
};

PYMM_DECLARE_KERNELS(InfoNceTable, info_nce_table)

}  // namespace pymm
