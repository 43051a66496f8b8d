# Where torch's headers and libraries are, asked of the torch that Python imports. torch's own CMake package
# is not used: it searches for the whole CUDA toolkit, and the stable ABI needs three paths only.
execute_process(
  COMMAND ${Python_EXECUTABLE} -c
          "import pathlib, torch; p = pathlib.Path(torch.__file__).parent; print(p); print(torch.__version__)"
  OUTPUT_VARIABLE torch_answer
  RESULT_VARIABLE torch_result
  ERROR_VARIABLE torch_error
  OUTPUT_STRIP_TRAILING_WHITESPACE)
if(NOT torch_result EQUAL 0)
  message(FATAL_ERROR "pymm needs torch>=2.10 in the environment that builds it "
                      "(pip install torch==2.13.0): ${torch_error}")
endif()
string(REPLACE "\n" ";" torch_answer "${torch_answer}")
list(GET torch_answer 0 torch_root)
list(GET torch_answer 1 PYMM_TORCH_VERSION)

set(PYMM_TORCH_INCLUDES ${torch_root}/include)
# The oldest torch whose stable ABI is used: a binary built against a later one loads there.
set(PYMM_TORCH_DEFINITIONS TORCH_TARGET_VERSION=0x020a000000000000 TORCH_STABLE_ONLY)
set(PYMM_TORCH_LIBRARIES ${torch_root}/lib/libtorch_cpu.so)
message(STATUS "pymm: torch ${PYMM_TORCH_VERSION} at ${torch_root}")
