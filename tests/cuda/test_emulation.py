"""The CUDA kernels against the reference, compiled as C++ with emulation.h, on every sample."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pymm.ops import _dispatch, _gpu
from pymm.ops._record import REGISTRY, library_of
from tests.ops.harness import DTYPES, cases, run, sample_of
from tests.ops.test_records import check

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
NAMES = {source.stem for source in SOURCES}
CASES = [pytest.param(n, i, id=f"{n}-{label}".replace(" ", "_")) for n, i, label in cases() if n in NAMES]


@pytest.fixture(scope="module")
def _emulated(tmp_path_factory):
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    root = Path(torch.__file__).parent
    library = tmp_path_factory.mktemp("cuda") / "libpymm_cuda.so"
    command = [compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", f"-I{ROOT / 'csrc'}"]
    command += [f"-I{Path(__file__).parent}", "-isystem", str(root / "include")]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-Wall", "-Werror"]
    command += ["-x", "c++", *map(str, SOURCES), "-x", "none", str(root / "lib" / "libtorch_cpu.so")]
    done = subprocess.run([*command, "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(str(library))
    for name in NAMES:
        library_of("cuda", REGISTRY[name])


@pytest.mark.usefixtures("_emulated", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CASES)
def test_kernel_equals_reference_in_float64(
    name: str, index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, sample = sample_of(name, index, dtype)
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    monkeypatch.setattr(_dispatch, "_allowed", lambda kind: ("cuda",))
    monkeypatch.setattr(_gpu, "problem_of", lambda candidate, op: None)
    got = run(op, sample, backend="cuda")
    check(op, sample, dtype, truth, got)
