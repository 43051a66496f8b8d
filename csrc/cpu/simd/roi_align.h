// Inner loops of region pooling: one box on one plane of features, whose bilinear weights are known.
//
// A bin is the mean of samples on a grid, and a sample's four weights are products of two of its row and two of its
// column; so a box is two small matrices, out = Y F X^T, and each of the box's rows is read once for each bin row.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

// The weights of one box. Row r of bins takes the taps [first_tap[r], first_tap[r + 1]).
template <class Acc>
struct RoiBox {
  int64_t bins_h, bins_w;
  const int32_t* first_tap;  // bins_h + 1
  const int32_t* tap_row;
  const Acc* tap_weight;
  int64_t x, span;        // columns of the plane that are read: [x, x + span)
  const int32_t* column;  // those with a weight, counted from x
  int64_t columns;
  const Acc* by_column;  // [columns][bins_w], and one register of anything behind
  const Acc* by_bin;     // [bins_w][span]
};

struct RoiAlign {
  // out [bins_h][bins_w] of the type; rows holds bins_h * span accumulators and one register.
  void (*forward)(const void* box, const void* plane, int64_t width, void* rows, void* out);
  // The same of `channels` channels that are neighbours in memory: out [channels][bins_h][bins_w]; scratch holds
  // columns + bins_h * bins_w registers of accumulators.
  void (*forward_last)(const void* box, const void* image, int64_t row_stride, int64_t pixel_stride, int64_t channels,
                       void* scratch, void* out);
  // grad += Y^T dout X, grad a plane of accumulators.
  void (*backward)(const void* box, const void* dout, int64_t width, void* grad);
};

struct RoiAlignTable {
  RoiAlign for_dtype[4];  // by DType
};

PYMM_DECLARE_KERNELS(RoiAlignTable, roi_align_table)

inline const RoiAlign& roi_align_for(DType dtype) { return roi_align_table().for_dtype[static_cast<int>(dtype)]; }

}  // namespace pymm
