// Products of packed blocks, C[m, n] (+)= A[m, :] . B[n, :], the core of every op here.
//
// M rows of A, N rows of B (so B is "N x K", as a weight is), K the reduction. Operands are packed once into panels
// that the register tile reads front to back, then multiplied as often as needed:
//   A panel: [M / mr][K / ka][mr][ka]      B panel: [N / nr][K / kb][nr][kb]      zero-padded in every direction.
// An op packs a block of B that stays in L2 and a block of A that stays in L1, calls multiply(), and reads the
// accumulators C while they are in L1: its epilogue costs no trip to memory.
//
// What a panel holds depends on the input type and the machine: double for double; bfloat16 where AVX-512 BF16 or
// AMX multiply it, float16 where AMX does; float for everything else (bfloat16 and float16 are widened while packing).
#pragma once

#include <cstdint>

#include "cpu/isa.h"
#include "cpu/types.h"

namespace pymm {

struct Gemm {
  // Strides in elements: element (i, k) of the source is source[i * row_stride + k * k_stride].
  using Pack = void (*)(const void* source, int64_t row_stride, int64_t k_stride, int64_t rows, int64_t k,
                        void* panels);
  // C is row-major with `ldc` accumulators from row to row; `accumulate` adds to what is there.
  using Multiply = void (*)(int64_t m, int64_t n, int64_t k, const void* a, const void* b, void* c, int64_t ldc,
                            bool accumulate);

  int64_t mr, nr;                                 // rows and columns of the register tile
  int64_t k_unit;                                 // panels are padded to a multiple of this along K
  int64_t element_bytes;                          // of a panel
  Pack pack_a, pack_b;                            // from the input type
  Pack pack_a_accumulators, pack_b_accumulators;  // from float (double for double): a tile computed before
  Multiply multiply;

  int64_t a_bytes(int64_t m, int64_t k) const { return round_up(m, mr) * round_up(k, k_unit) * element_bytes; }
  int64_t b_bytes(int64_t n, int64_t k) const { return round_up(n, nr) * round_up(k, k_unit) * element_bytes; }
};

struct GemmTable {
  Gemm for_dtype[4];  // by DType
  Gemm f16_as_float;
};

PYMM_DECLARE_KERNELS(GemmTable, gemm_table)

inline const Gemm& gemm_for(DType dtype) { return gemm_table().for_dtype[static_cast<int>(dtype)]; }

// For operands computed before that may be beyond float16's range, which ends at 65504 and thins out below 2^-14.
inline const Gemm& wide_gemm_for(DType dtype) {
  return dtype == DType::f16 ? gemm_table().f16_as_float : gemm_for(dtype);
}

}  // namespace pymm
