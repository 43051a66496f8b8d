// The instruction sets that the inner loops are compiled for, and the one in use.
//
// The choice is made once, from CPUID, from XCR0 (does the kernel save the registers?) and, for AMX, from the
// permission that Linux grants per process (arch_prctl). PYMM_ISA or set_isa() pins a lower one.
#pragma once

#include <string>
#include <vector>

// Every variant of an inner loop lives in the namespace of its instruction set; the list below is in rank order.
// amx_fp16 has no variant of its own: it is amx, whose float16 products go through tiles when current_isa() says so.
#if defined(__x86_64__)
#define PYMM_FOR_EACH_ISA(X) X(portable) X(avx2) X(avx512) X(avx512_bf16) X(amx) X(amx_fp16)
#else
#define PYMM_FOR_EACH_ISA(X) X(portable)
#endif

namespace pymm {

enum class Isa : int {
#define PYMM_ISA_ENUMERATOR(name) name,
  PYMM_FOR_EACH_ISA(PYMM_ISA_ENUMERATOR)
#undef PYMM_ISA_ENUMERATOR
};

const char* isa_name(Isa isa);

// The instruction set in use. The first call detects the machine and reads PYMM_ISA.
Isa current_isa();

// The best one that this machine can run.
Isa best_isa();

// All that this machine can run, lowest first.
std::vector<std::string> available_isas();

// All that were compiled.
std::vector<std::string> compiled_isas();

// Pins one; throws std::invalid_argument when the name is unknown or the machine cannot run it.
void set_isa(const std::string& name);

}  // namespace pymm

// PYMM_DECLARE_KERNELS(Table, name) declares `const Table& name()` in the namespace of every instruction set, which
// csrc/cpu/simd/<op>.cpp defines in its PYMM_ISA, and `pymm::name()`, which returns the variant of the one in use.
#if defined(__x86_64__)
#define PYMM_DECLARE_KERNELS(Table, name)                                                  \
  namespace portable {                                                                     \
  const Table& name();                                                                     \
  }                                                                                        \
  namespace avx2 {                                                                         \
  const Table& name();                                                                     \
  }                                                                                        \
  namespace avx512 {                                                                       \
  const Table& name();                                                                     \
  }                                                                                        \
  namespace avx512_bf16 {                                                                  \
  const Table& name();                                                                     \
  }                                                                                        \
  namespace amx {                                                                          \
  const Table& name();                                                                     \
  }                                                                                        \
  inline const Table& name() {                                                             \
    using Variant = const Table& (*)();                                                    \
    static constexpr Variant variants[] = {&portable::name,    &avx2::name, &avx512::name, \
                                           &avx512_bf16::name, &amx::name,  &amx::name};   \
    return variants[static_cast<int>(current_isa())]();                                    \
  }
#else
#define PYMM_DECLARE_KERNELS(Table, name) \
  namespace portable {                    \
  const Table& name();                    \
  }                                       \
  inline const Table& name() { return portable::name(); }
#endif
