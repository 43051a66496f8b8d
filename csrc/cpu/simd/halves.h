// A float as two halves of 16 bits; the upper one is a bfloat16, cut off and not rounded.
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

struct Halves {
  void (*join)(const bf16* upper, const uint16_t* lower, int64_t n, float* whole);
  void (*split)(const float* whole, int64_t n, bf16* upper, uint16_t* lower);
};

PYMM_DECLARE_KERNELS(Halves, halves)

}  // namespace pymm
