// Inner loops of pooling by the largest value: one box on one plane of features, whose bins are known.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

// Bin row r holds rows [top[r], bottom[r]) of the plane, and bin q columns [left[q], right[q]), counted from x.
struct RoiPoolBox {
  int64_t bins_h, bins_w;
  const int32_t *top, *bottom, *left, *right;
  int64_t x, span;  // columns of the plane that are read: [x, x + span)
};

struct RoiPool {
  // out [bins_h][bins_w] of the type and their places in the plane, -1 where a bin is empty; scratch holds span
  // accumulators and as many integers of their width, each with one register behind.
  void (*forward)(const RoiPoolBox* box, const void* plane, int64_t width, void* scratch, void* out, int32_t* argmax);
  // grad[argmax[i]] += dout[i], grad a plane of accumulators.
  void (*backward)(const void* dout, const int32_t* argmax, int64_t bins, void* grad);
};

struct RoiPoolTable {
  RoiPool for_dtype[4];  // by DType
};

PYMM_DECLARE_KERNELS(RoiPoolTable, roi_pool_table)

inline const RoiPool& roi_pool_for(DType dtype) { return roi_pool_table().for_dtype[static_cast<int>(dtype)]; }

}  // namespace pymm
