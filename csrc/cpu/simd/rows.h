// Inner loops over rows of numbers that several ops share. Accumulators are float, or double for double.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

struct Rows {
  // 1 / max(||row||, eps) of each row of the type.
  void (*inverse_norms)(const void* x, int64_t row_stride, int64_t rows, int64_t n, double eps, void* out);
  // target[i] = source[i] * scale, from the type to accumulators, and back.
  void (*widen)(const void* source, double scale, int64_t n, void* accumulators);
  void (*narrow)(const void* accumulators, double scale, int64_t n, void* target);
  // target[j] = accumulators[j] * scale * column_scale[j], to the type.
  void (*narrow_columns)(const void* accumulators, double scale, const void* column_scale, int64_t n, void* target);
  // sum_i a[i] * b[i], a accumulators, b of the type.
  double (*dot)(const void* accumulators, const void* b, int64_t n);
  // accumulators[i] += scale * x[i], x of the type.
  void (*add_scaled)(void* accumulators, double scale, const void* x, int64_t n);
};

struct RowsTable {
  Rows for_dtype[4];  // by DType
};

PYMM_DECLARE_KERNELS(RowsTable, rows_table)

inline const Rows& rows_for(DType dtype) { return rows_table().for_dtype[static_cast<int>(dtype)]; }

}  // namespace pymm
