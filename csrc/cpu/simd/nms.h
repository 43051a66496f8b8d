// The inner loop of non-maximum suppression: one box against those that are kept so far.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

// Boxes by coordinate, and their areas.
template <class Acc>
struct BoxColumns {
  const Acc *x1, *y1, *x2, *y2, *area;
};

// Whether one of `count` kept boxes overlaps box b, given as x1, y1, x2, y2, area, by more than `threshold` >= 0.
template <class Acc>
using Overlaps = bool (*)(const BoxColumns<Acc>& kept, int64_t count, const Acc* b, Acc threshold);

struct NmsTable {
  Overlaps<float> f32;
  Overlaps<double> f64;
};

PYMM_DECLARE_KERNELS(NmsTable, nms_table)

}  // namespace pymm
