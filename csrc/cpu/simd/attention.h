// Softmax attention of the query heads that share one key head: the inner loops behind csrc/cpu/attention.cpp.
//
// Query heads that share a key head are rows of one problem: row r is row r mod T of head r / T. Strides are in
// elements; the last dimension of q, k, v, out and the gradients is dense.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

// What all heads of a call share.
struct AttentionCall {
  int64_t d, dv;  // widths of q and k, and of v
  int64_t heads;  // query heads per key head
  double scale;
  bool causal;
  double dropout_p;  // 0: no dropout, and `seed` is unused
  uint64_t seed;
};

// A tensor as seen from one key head's first query head.
struct HeadView {
  void* data;
  int64_t head_stride, row_stride;
  template <class T>
  T* at(int64_t head, int64_t row) const {
    return static_cast<T*>(data) + head * head_stride + row * row_stride;
  }
};

// A mask as seen from there; its strides are 0 where it is broadcast.
struct MaskView {
  const void* data = nullptr;
  int64_t head_stride = 0, row_stride = 0, column_stride = 0;
  template <class T>
  const T* at(int64_t head, int64_t row, int64_t column) const {
    return static_cast<const T*>(data) + head * head_stride + row * row_stride + column * column_stride;
  }
};

enum class Bias : int { none, input_type, accumulators };

// One key head: its problem, inputs and masks.
struct AttentionHead {
  int64_t rows, columns;  // T and S
  int64_t causal_offset;  // row t sees the columns up to t + causal_offset
  int64_t first_head;     // index of the first query head in dropout's counter
  HeadView q, k, v;
  MaskView bias, allowed, valid;  // added; bool per score; bool per column
  Bias bias_type = Bias::none;
};

struct AttentionForward {
  HeadView out;
  void* lse;           // accumulators, one per row
  int64_t lse_stride;  // from head to head
};

struct AttentionBackward {
  HeadView dout, out, dq, dk, dv;
  const void *lse, *dlse;  // dlse may be null
  int64_t lse_stride;
  // Where dq's accumulators go when this call sees only some of the columns: rows of `d`, or null when it sees all.
  void* dq_partial;
  // The accumulators to which the scores' gradients are added, or null; strides are 0 where the mask is broadcast.
  void* mask_gradient;
  int64_t mask_head_stride, mask_row_stride, mask_column_stride;
  // They are turned: row stride 1, and each column has room for T rounded up to kTurnedRows. For one query head.
  bool mask_turned;
};
constexpr int64_t kTurnedRows = 16;

struct AttentionForwardKernels {
  // Rows [first, first + rows) of `heads` x T: out and lse.
  int64_t (*bytes)(const AttentionCall&, const AttentionHead&, int64_t rows);
  void (*run)(const AttentionCall&, const AttentionHead&, const AttentionForward&, int64_t first, int64_t rows,
              void* scratch);
};

// The forward pass of a few rows, as decoding has them: columns are shared out instead of rows.
struct AttentionDecodeKernels {
  int64_t (*bytes)(const AttentionCall&, const AttentionHead&);
  int64_t (*part_bytes)(const AttentionCall&, const AttentionHead&);
  // Columns [first, first + columns) of S, a multiple of 64 first: what all rows make of them, into `part`.
  void (*run)(const AttentionCall&, const AttentionHead&, int64_t first, int64_t columns, void* part, void* scratch);
  // out and lse from `count` parts, `apart` bytes from one to the next.
  void (*join)(const AttentionCall&, const AttentionHead&, const AttentionForward&, const void* parts, int64_t apart,
               int64_t count);
};

struct AttentionBackwardKernels {
  // Columns [first, first + columns) of S: dk and dv of these, and dq, whole or their part of it.
  int64_t (*bytes)(const AttentionCall&, const AttentionHead&, int64_t columns);
  void (*run)(const AttentionCall&, const AttentionHead&, const AttentionBackward&, int64_t first, int64_t columns,
              void* scratch);
  // target = scale * (sum of `parts` arrays of accumulators, `part_stride` apart), in the input type.
  void (*join)(const void* parts, int64_t count, int64_t part_stride, double scale, int64_t n, void* target);
  // A turned mask gradient, columns `ld` apart, to rows x columns, in the input type or as accumulators.
  void (*turn_mask)(const void* turned, int64_t ld, int64_t rows, int64_t columns, bool accumulators, void* target);
};

// By DType.
struct AttentionForwardTable {
  AttentionForwardKernels for_dtype[4];
  AttentionForwardKernels f16_as_float;
};
struct AttentionDecodeTable {
  AttentionDecodeKernels for_dtype[4];
};
struct AttentionBackwardTable {
  AttentionBackwardKernels for_dtype[4];
  AttentionBackwardKernels f16_as_float;
};

PYMM_DECLARE_KERNELS(AttentionForwardTable, attention_forward_table)
PYMM_DECLARE_KERNELS(AttentionDecodeTable, attention_decode_table)
PYMM_DECLARE_KERNELS(AttentionBackwardTable, attention_backward_table)

// The kernels for a call. What dropout keeps is multiplied by 1 / (1 - p), which may leave float16's range.
template <class Table>
inline const auto& kernels_for(const Table& table, DType dtype, const AttentionCall& call) {
  const bool leaves = call.dropout_p > 1 - 0x1p-15;
  return dtype == DType::f16 && leaves ? table.f16_as_float : table.for_dtype[static_cast<int>(dtype)];
}

}  // namespace pymm
