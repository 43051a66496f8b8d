// Inner loops over the three rows of one triplet: an anchor a, a positive p and a negative n of one type.
#pragma once

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

struct Triplet {
  // sums = <a, p>, <a, n>, <a, a>, <p, p>, <n, n>.
  void (*products)(const void* a, const void* p, const void* n, int64_t d, double* sums);
  // sums = |a - p|^2, |a - n|^2.
  void (*square_distances)(const void* a, const void* p, const void* n, int64_t d, double* sums);
  // da = w[0] a + w[1] p + w[2] n, dp = w[3] a + w[4] p, dn = w[5] a + w[6] n.
  void (*combine)(const void* a, const void* p, const void* n, int64_t d, const double* w, void* da, void* dp,
                  void* dn);
  // With u = w[0] (a - p) and v = w[1] (a - n): da = u - v, dp = -u, dn = v.
  void (*differences)(const void* a, const void* p, const void* n, int64_t d, const double* w, void* da, void* dp,
                      void* dn);
};

struct TripletTable {
  Triplet for_dtype[4];  // by DType
};

PYMM_DECLARE_KERNELS(TripletTable, triplet_table)

inline const Triplet& triplet_for(DType dtype) { return triplet_table().for_dtype[static_cast<int>(dtype)]; }

}  // namespace pymm
