// A warp's instructions: shuffles and sums, products on tensor cores, copies that run beside the arithmetic.
//
// `mma` is mma.sync.m16n8k16 (sm_80 and later), c += a b with a (16, 16), b (16, 8), both of bf16 or f16, and c in
// float32. Lane l holds, with g = l / 4 and t = l % 4 (PTX ISA, "Matrix Fragments for mma.m16n8k16"):
//   a: the pairs (g, 2t), (g + 8, 2t), (g, 2t + 8), (g + 8, 2t + 8), each with the column after it, low half first
//   b: the pairs (2t, g), (2t + 8, g), each with the row after it
//   c: (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// `load_matrices` is ldmatrix.x4: lane l gives the address of row l % 8 of the 8 x 8 matrix l / 8, in shared memory and
// aligned to 16 bytes, and register m receives the pair (g, 2t) of matrix m; transposed, the pair (2t, g).
//   a from rows (16, 16) in memory: lane l points to row l % 16, column l / 16 * 8.
//   b of two neighbours, from rows of its columns, (8 + 8, 16) in memory: lane l points to row l % 8 + l / 16 * 8,
//   column l / 8 % 2 * 8; registers 0, 1 are the first b and 2, 3 the second.
//   b of two neighbours, from its rows, (16, 8 + 8) in memory, transposed: row l % 16, column l / 16 * 8.
//   a from its columns, (16 of k, 16 of rows) in memory, transposed: row l % 8 + l / 16 * 8, column l / 8 % 2 * 8.
// tests/cuda/primitives.cu holds each of these against float64.
#pragma once

#include "cuda/device.h"

#if !defined(__CUDACC__)
#include "emulated_warp.h"
#endif

namespace pymm::cuda {

constexpr int kWarp = 32, kChunk = 16;  // lanes; bytes that are copied and loaded at once

#if defined(__CUDACC__)
PYMM_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % kWarp); }

// All 32 lanes take part: the value of lane `from`, or of the lane whose number differs in the bits of `mask`.
template <class V>
PYMM_DEVICE V shuffle(V value, int from) {
  return __shfl_sync(0xffffffffu, value, from);
}
template <class V>
PYMM_DEVICE V shuffle_xor(V value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
// Which lanes' `holds` is true, lane 0 in the lowest bit; and how many bits are set.
PYMM_DEVICE uint32_t ballot(bool holds) { return __ballot_sync(0xffffffffu, holds); }
PYMM_DEVICE int count_bits(uint32_t bits) { return __popc(bits); }

// Two values in one register, as `mma` takes them.
template <class T>
PYMM_DEVICE uint32_t pack(float low, float high) {
  uint32_t bits;
  if constexpr (std::is_same_v<T, bf16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(bits) : "f"(high), "f"(low));
  }
  return bits;
}

template <class T>
PYMM_DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}

PYMM_DEVICE unsigned shared_address(const void* p) { return static_cast<unsigned>(__cvta_generic_to_shared(p)); }

PYMM_DEVICE void load_matrices(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}
PYMM_DEVICE void load_matrices_transposed(uint32_t (&registers)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes to shared memory, of which the first `bytes` are read and the rest become 0; both addresses aligned to 16.
// They are there for the thread itself after its commit and wait, for the others after a barrier behind that.
PYMM_DEVICE void copy_async(void* shared, const void* global, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global), "r"(bytes)
               : "memory");
}
PYMM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most `left` of the thread's groups are under way.
template <int left>
PYMM_DEVICE void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(left) : "memory");
}
#endif

// The sum, the largest of `width` neighbouring lanes, the same in each of them; `width` a power of two up to 32. With
// `step`, only of the lanes whose numbers agree modulo it.
template <int width = kWarp, int step = 1, class V>
PYMM_DEVICE V warp_sum(V value) {
  PYMM_UNROLL
  for (int mask = width / 2; mask >= step; mask /= 2) value += shuffle_xor(value, mask);
  return value;
}
template <int width = kWarp, int step = 1, class V>
PYMM_DEVICE V warp_max(V value) {
  PYMM_UNROLL
  for (int mask = width / 2; mask >= step; mask /= 2) {
    const V other = shuffle_xor(value, mask);
    value = value > other ? value : other;
  }
  return value;
}

// Where a 16-byte chunk of a row stands in shared memory, in chunks from the start: the eight rows that one matrix of
// ldmatrix reads at the same chunk lie in eight different groups of four banks. Rows have 2, 4 or a multiple of 8
// chunks.
template <int chunks>
PYMM_DEVICE int swizzled(int row, int chunk) {
  static_assert(chunks == 2 || chunks == 4 || chunks % 8 == 0);
  if constexpr (chunks == 2) return row * 2 + (chunk ^ ((row >> 2) & 1));
  if constexpr (chunks == 4) return row * 4 + (chunk ^ ((row >> 1) & 3));
  return row * chunks + (chunk ^ (row & 7));
}
// For rows of any other length: an odd number of chunks from row to row does the same.
constexpr int padded_chunks(int chunks) { return chunks | 1; }

}  // namespace pymm::cuda
