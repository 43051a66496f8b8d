// Parallel: nothing here; the caller runs one loop per thread. Moves no bytes.
//
// Twelve chains hide the latency of a multiply-add on every processor in question (at most 2 per cycle, 6 cycles) and
// leave the AVX2 registers room for both factors. The values go to a fixed point, so none becomes subnormal or
// infinite.
#include "cpu/simd/peak.h"

#include "cpu/simd/amx.h"
#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

constexpr int kChains = 12;

template <class Acc>
double multiply_adds(int64_t steps) {
  using V = Vector<Acc>;
  V chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = broadcast<Acc>(static_cast<Acc>(i));
  V factor = broadcast<Acc>(Acc(0.5)), addend = broadcast<Acc>(Acc(1));
  asm volatile("" : "+x"(factor), "+x"(addend));  // unknown to the compiler
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = chains[i] * factor + addend;
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "x"(chains[i]));
  return 2.0 * lanes_of<Acc>() * kChains * static_cast<double>(steps);
}

#if PYMM_ISA_LEVEL >= 4
template <class E>
double tiles_of(int64_t steps) {
  constexpr int kTiles = 6;  // accumulators; a product takes 52 cycles and a new one starts every 16
  constexpr double kOperations = 2.0 * 16 * 16 * 32;
  configure_tiles();
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  zero_tile<4>();
  zero_tile<5>();
  zero_tile<6>();
  zero_tile<7>();
  for (int64_t s = 0; s < steps; ++s) {
    dot_tiles<E, 0, 6, 7>();
    dot_tiles<E, 1, 6, 7>();
    dot_tiles<E, 2, 6, 7>();
    dot_tiles<E, 3, 6, 7>();
    dot_tiles<E, 4, 6, 7>();
    dot_tiles<E, 5, 6, 7>();
  }
  release_tiles();
  return kOperations * kTiles * static_cast<double>(steps);
}
constexpr auto kOfBf16 = &tiles_of<bf16>;
#elif PYMM_ISA_LEVEL == 3
double pairs_of_bf16(int64_t steps) {
  __m512 chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = _mm512_setzero_ps();
  __m512i ones = _mm512_set1_epi16(0x3f80);
  asm volatile("" : "+x"(ones));
  for (int64_t s = 0; s < steps; ++s) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) chains[i] = _mm512_dpbf16_ps(chains[i], (__m512bh)ones, (__m512bh)ones);
  }
  for (int i = 0; i < kChains; ++i) asm volatile("" : : "x"(chains[i]));
  return 2.0 * 32 * kChains * static_cast<double>(steps);
}
constexpr auto kOfBf16 = &pairs_of_bf16;
#else
constexpr auto kOfBf16 = &multiply_adds<float>;
#endif

}  // namespace

const Peak& peak() {
  static constexpr Peak table{&multiply_adds<float>, &multiply_adds<double>, kOfBf16, &multiply_adds<float>};
#if PYMM_ISA_LEVEL >= 4
  static constexpr Peak with_f16{&multiply_adds<float>, &multiply_adds<double>, kOfBf16, &tiles_of<f16>};
  if (current_isa() >= Isa::amx_fp16) return with_f16;
#endif
  return table;
}

}  // namespace pymm::PYMM_ISA
