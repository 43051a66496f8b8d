// Inner loops of linear's epilogue and of its backward pass, per type and activation.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

enum class Activation : int { none, gelu, gelu_tanh, quick_gelu, relu, silu };
constexpr int kActivations = 6;

struct LinearLoops {
  // With z = c + bias over n columns of one row: out = f(z) + residual, and pre = z. c are accumulators; bias,
  // residual and pre may be null.
  using Epilogue = void (*)(const void* c, const void* bias, const void* residual, int64_t n, void* pre, void* out);
  // dz = dout f'(pre); sums += dz as it is rounded to the type, unless sums (accumulators) is null.
  using Backward = void (*)(const void* dout, const void* pre, int64_t n, void* dz, void* sums);

  Epilogue epilogue[kActivations];
  Backward backward[kActivations];
};

struct LinearTable {
  LinearLoops for_dtype[4];  // by DType
};

PYMM_DECLARE_KERNELS(LinearTable, linear_table)

inline const LinearLoops& linear_for(DType dtype) { return linear_table().for_dtype[static_cast<int>(dtype)]; }

}  // namespace pymm
