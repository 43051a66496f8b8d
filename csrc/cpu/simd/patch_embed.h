// Inner loops of patch_embed: pixels to the rows that a product packs, and products to tokens and pixels.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

// A patch is read as a row of the weight: element k is channel k / (height * width), then line, then column.
// Strides in elements.
struct PatchLayout {
  int64_t height, width;
  int64_t channel_stride, line_stride, column_stride;
};

struct PatchLoops {
  // target[i] = element first + i of the patch whose first pixel is `pixels`, for i < count. With `scale` and `shift`
  // (accumulators, one per channel) it becomes x * scale + shift, rounded to the type.
  void (*gather)(const void* pixels, const PatchLayout& patch, const void* scale, const void* shift, int64_t first,
                 int64_t count, void* target);
  void (*gather_bytes)(const void* pixels, const PatchLayout& patch, const void* scale, const void* shift,
                       int64_t first, int64_t count, void* target);
  // The reverse: element first + i of the patch = values[i] * scale, from accumulators; scale may be null.
  void (*scatter)(const void* values, const PatchLayout& patch, const void* scale, int64_t first, int64_t count,
                  void* pixels);
  // out = c + first + second; c are accumulators, each of the three may be null.
  void (*add)(const void* c, const void* first, const void* second, int64_t n, void* out);
  // sums[j] = the sum over i < count of rows[index[i] * stride + j], in accumulators; index null means 0, 1, 2 ...
  void (*sum_rows)(const void* rows, int64_t stride, const int64_t* index, int64_t count, int64_t n, void* sums);
};

struct PatchTable {
  PatchLoops for_dtype[4];  // by DType
};

PYMM_DECLARE_KERNELS(PatchTable, patch_table)

inline const PatchLoops& patch_loops_for(DType dtype) { return patch_table().for_dtype[static_cast<int>(dtype)]; }

}  // namespace pymm
