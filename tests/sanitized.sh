#!/usr/bin/env bash
# Builds the C++ core with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitized and runs the op
# tests with it, in an environment that the README's test command has filled. Arguments go to pytest.
#
# Left out by default: what compiles with inductor or differentiates by finite differences, as neither reaches
# other C++ than the rest does and both take hours there, and peaks of memory, as freed memory is kept to catch
# late uses.
set -euo pipefail
cd "$(dirname "$0")/.."
cmake -S . -B build/sanitized -G Ninja -DPYMM_SANITIZE=address,undefined -DPYMM_CUDA=OFF \
  -DPython_EXECUTABLE="$(command -v python)" -Dpybind11_DIR="$(python -m pybind11 --cmakedir)" \
  -DSKBUILD_PROJECT_VERSION=0
cmake --build build/sanitized
[ $# -gt 0 ] || set -- tests/ops -k "not opcheck and not compile and not graph and not gradcheck and not memory"
PYMM_TEST_EXTENSION=$(echo "$PWD"/build/sanitized/_C*.so)
export PYMM_TEST_EXTENSION PYTHONPATH=.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
# The interpreter itself leaks by design.
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
exec python -m pytest -q "$@"
