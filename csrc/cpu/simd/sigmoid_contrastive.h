// Inner loops of sigmoid_contrastive over one tile of dot products, row-major and `ld` apart, in accumulators.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

template <class Acc>
struct SigmoidTile {
  Acc* data;  // dot products; a logit is scale * dot * row_factor[i] * column_factor[j] + bias
  int64_t ld, rows, columns;
  const Acc *row_factor, *column_factor;
  Acc scale, bias;
  int64_t diagonal;  // row r belongs to column r + diagonal, where there is such a column
};

struct SigmoidSums {
  double bias, scale;  // gradients
};

template <class Acc>
struct SigmoidLoops {
  // The sum of log(1 + exp(-z logit)), z = 1 for the pairs that belong together and -1 for the others.
  double (*loss)(const SigmoidTile<Acc>& tile);
  // From dot products to d loss / d logit * row_factor * column_factor * share, in place.
  SigmoidSums (*gradient)(const SigmoidTile<Acc>& tile, Acc share);
};

struct SigmoidTable {
  SigmoidLoops<float> of_float;
  SigmoidLoops<double> of_double;
};

PYMM_DECLARE_KERNELS(SigmoidTable, sigmoid_contrastive_table)

}  // namespace pymm
