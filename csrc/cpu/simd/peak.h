// The arithmetic limit of one thread: loops whose operands never leave the registers.
#pragma once

#include <cstdint>

#include "cpu/isa.h"

namespace pymm {

// Each runs `steps` rounds of independent multiply-adds and returns how many operations that were, a multiplication
// and an addition counting as two. bf16 and f16 are what the matrix products of that type use: tiles, dot products of
// pairs, or float where there is neither.
struct Peak {
  double (*f32)(int64_t steps);
  double (*f64)(int64_t steps);
  double (*bf16)(int64_t steps);
  double (*f16)(int64_t steps);
};

PYMM_DECLARE_KERNELS(Peak, peak)

}  // namespace pymm
