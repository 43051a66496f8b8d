#include "cpu/isa.h"

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pymm {
namespace {

constexpr const char* kNames[] = {
#define PYMM_ISA_NAME(name) #name,
    PYMM_FOR_EACH_ISA(PYMM_ISA_NAME)
#undef PYMM_ISA_NAME
};
constexpr int kCount = sizeof(kNames) / sizeof(kNames[0]);
#if defined(__x86_64__)
constexpr int kWithoutVariant = 1;  // amx_fp16
#else
constexpr int kWithoutVariant = 0;
#endif
static_assert(kCount == PYMM_ISA_COUNT + kWithoutVariant, "cmake/isa.cmake and PYMM_FOR_EACH_ISA list the same sets");

#if defined(PYMM_EMULATE_AMX)
[[maybe_unused]] constexpr bool kEmulatedTiles = true;
#else
[[maybe_unused]] constexpr bool kEmulatedTiles = false;
#endif

#if defined(__x86_64__)
bool bit(uint32_t word, int index) { return (word >> index) & 1u; }

uint64_t enabled_register_state() {
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

// Linux hands out the tile registers only to a process that asks for them (XFEATURE_XTILEDATA = 18).
bool tile_permission() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023;
  return syscall(SYS_arch_prctl, kRequestPermission, 18) == 0;
#else
  return false;
#endif
}

Isa detect() {
  uint32_t a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return Isa::portable;
  const bool osxsave = bit(c, 27), fma = bit(c, 12), f16c = bit(c, 29);
  if (!osxsave || !fma || !f16c) return Isa::portable;
  const uint64_t state = enabled_register_state();
  constexpr uint64_t kYmm = 0x6, kZmm = 0xe6, kTiles = 0x60000;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return Isa::portable;
  const bool avx2 = bit(b, 5) && bit(b, 8) && (state & kYmm) == kYmm;
  if (!avx2) return Isa::portable;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && (state & kZmm) == kZmm;
  if (!avx512) return Isa::avx2;
  const bool amx = bit(d, 24) && bit(d, 22) && (state & kTiles) == kTiles;
  if (!__get_cpuid_count(7, 1, &a, &b, &c, &d) || !bit(a, 5)) return Isa::avx512;
  if (kEmulatedTiles) return Isa::amx_fp16;
  const bool amx_fp16 = bit(a, 21);
  if (!amx || !tile_permission()) return Isa::avx512_bf16;
  return amx_fp16 ? Isa::amx_fp16 : Isa::amx;
}
#else
Isa detect() { return Isa::portable; }
#endif

Isa parse(const std::string& name, const char* who) {
  for (int i = 0; i < kCount; ++i) {
    if (name != kNames[i]) continue;
    if (i > static_cast<int>(best_isa())) {
      throw std::invalid_argument(std::string(who) + ": this machine cannot run '" + name + "', its best is '" +
                                  isa_name(best_isa()) + "'");
    }
    return static_cast<Isa>(i);
  }
  std::string choices;
  for (const char* choice : kNames) choices += (choices.empty() ? "" : ", ") + std::string(choice);
  throw std::invalid_argument(std::string(who) + ": expected one of " + choices + ", got '" + name + "'");
}

std::atomic<int>& current() {
  static std::atomic<int> value = [] {
    const char* pinned = std::getenv("PYMM_ISA");
    return static_cast<int>(pinned && *pinned ? parse(pinned, "PYMM_ISA") : best_isa());
  }();
  return value;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

Isa current_isa() { return static_cast<Isa>(current().load(std::memory_order_relaxed)); }

void set_isa(const std::string& name) { current().store(static_cast<int>(parse(name, "set_isa"))); }

std::vector<std::string> available_isas() { return {kNames, kNames + static_cast<int>(best_isa()) + 1}; }

std::vector<std::string> compiled_isas() { return {kNames, kNames + kCount}; }

}  // namespace pymm
