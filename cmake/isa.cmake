# The inner loops, compiled once per instruction set with that set's flags and chosen at run time.
# PYMM_ISA is the namespace of the variant and PYMM_ISA_LEVEL its rank in csrc/cpu/isa.h.
set(PYMM_ISAS portable)
set(PYMM_FLAGS_portable "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND PYMM_ISAS avx2 avx512 avx512_bf16 amx)
  set(PYMM_FLAGS_avx2 -mavx2 -mfma -mf16c -mbmi2)
  set(PYMM_FLAGS_avx512 ${PYMM_FLAGS_avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl
                        -mprefer-vector-width=512)
  set(PYMM_FLAGS_avx512_bf16 ${PYMM_FLAGS_avx512} -mavx512bf16)
  set(PYMM_FLAGS_amx ${PYMM_FLAGS_avx512_bf16})  # the tile instructions are written out, csrc/cpu/simd/amx.h
endif()

function(pymm_add_isa_objects target sources)
  set(level 0)
  foreach(isa IN LISTS PYMM_ISAS)
    add_library(pymm_${isa} OBJECT ${sources})
    set(optimization -O3)
    if(PYMM_EMULATE_AMX AND NOT isa STREQUAL "amx")
      set(optimization -O0)  # such a build is for the AMX variant alone
    endif()
    # GCC 12 reports its own intrinsics' undefined pass-through operands as uninitialized.
    target_compile_options(pymm_${isa} PRIVATE ${optimization} ${PYMM_FLAGS_${isa}} -Wno-uninitialized
                           -Wno-maybe-uninitialized)
    target_compile_definitions(pymm_${isa} PRIVATE PYMM_ISA=${isa} PYMM_ISA_LEVEL=${level})
    target_link_libraries(${target} PRIVATE pymm_${isa})
    list(APPEND pymm_targets pymm_${isa})
    math(EXPR level "${level} + 1")
  endforeach()
  list(LENGTH PYMM_ISAS count)
  target_compile_definitions(${target} PRIVATE PYMM_ISA_COUNT=${count})
  set(pymm_targets ${pymm_targets} PARENT_SCOPE)
endfunction()
