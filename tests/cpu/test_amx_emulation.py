"""The AMX kernels on a machine without AMX: a build in which the tile instructions are emulated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pymm.ops._extension import require_extension

ROOT = Path(__file__).parents[2]


def _tool(name: str) -> str:
    """A build tool beside Python or on the path."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"needs {name}")
    return found


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "avx512_bf16" not in require_extension().available_isas():
        pytest.skip("the rest of the AMX variant needs AVX-512 BF16")
    pybind11 = pytest.importorskip("pybind11")
    build = tmp_path_factory.mktemp("amx")
    configure = [_tool("cmake"), "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DPYMM_EMULATE_AMX=ON"]
    configure += ["-DPYMM_CUDA=OFF", f"-DCMAKE_MAKE_PROGRAM={_tool('ninja')}", "-DSKBUILD_PROJECT_VERSION=0"]
    configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
    for command in (configure, [_tool("ninja"), "-C", str(build)]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return next(build.glob("_C*.so"))


def _run(emulated: Path, tests: str, chosen: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", chosen]
    environment = {**os.environ, "PYMM_TEST_EXTENSION": str(emulated)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "passed" in done.stdout


def test_bfloat16_on_every_sample(emulated: Path) -> None:
    _run(emulated, "tests/ops/test_records.py", "test_kernel_equals and amx and not fp16 and bfloat16")


def test_float16_on_every_sample(emulated: Path) -> None:
    chosen = "test_kernel_equals and amx_fp16 and float16 and not bfloat16"
    _run(emulated, "tests/ops/test_records.py", chosen)


def test_float16_at_the_ends_of_its_range(emulated: Path) -> None:
    _run(emulated, "tests/cpu/test_float16_range.py", "amx_fp16")
