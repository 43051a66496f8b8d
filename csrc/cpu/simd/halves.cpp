// Parallel: nothing here; callers split rows over threads. Bytes: 4 per element read and 4 written.
#include "cpu/simd/halves.h"

#include "cpu/simd/vec.h"

namespace pymm::PYMM_ISA {
namespace {

void join(const bf16* upper, const uint16_t* lower, int64_t n, float* whole) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    vhalf_bits low;
    memcpy(&low, lower + i, sizeof(low));
    store(whole + i, (vfloat)((vuint)load(upper + i) | __builtin_convertvector(low, vuint)));
  }
  for (; i < n; ++i) whole[i] = bit_cast<float>(static_cast<uint32_t>(upper[i].bits) << 16 | lower[i]);
}

void split(const float* whole, int64_t n, bf16* upper, uint16_t* lower) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const vuint bits = (vuint)load(whole + i);
    const vhalf_bits high = __builtin_convertvector(bits >> 16, vhalf_bits);
    const vhalf_bits low = __builtin_convertvector(bits & 0xffff, vhalf_bits);
    memcpy(upper + i, &high, sizeof(high));
    memcpy(lower + i, &low, sizeof(low));
  }
  for (; i < n; ++i) {
    const uint32_t bits = bit_cast<uint32_t>(whole[i]);
    upper[i] = bf16{static_cast<uint16_t>(bits >> 16)};
    lower[i] = static_cast<uint16_t>(bits);
  }
}

}  // namespace

const Halves& halves() {
  static constexpr Halves table{&join, &split};
  return table;
}

}  // namespace pymm::PYMM_ISA
