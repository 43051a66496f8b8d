"""Every CUDA source compiles for each GPU, without spills and without warnings.

Each source is compiled for one GPU here, each GPU in turn; `PYMM_COMPILE=all` compiles each for all of them.
So does a build with `PYMM_STRICT_CUDA`, which ends where a register is spilled, as `.ci/run` makes it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
SOURCES = [*sorted((ROOT / "csrc" / "cuda").glob("*.cu")), Path(__file__).with_name("primitives.cu")]
CAPABILITIES = ("80", "90a", "100a")
# Static shared memory of a block, in bytes. Dynamic memory is checked where it is launched
# (csrc/cuda/device.h), in the emulation too, so the samples of test_emulation.py have passed that.
STATIC_SHARED = 48 << 10

CASES = [
    pytest.param(source, capability, id=f"{source.stem}-{capability}")
    for i, source in enumerate(SOURCES)
    for j, capability in enumerate(CAPABILITIES)
    if os.environ.get("PYMM_COMPILE") == "all" or (i - j) % len(CAPABILITIES) == 0
]


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize(("source", "capability"), CASES)
def test_compiles_without_spills(source: Path, capability: str, tmp_path: Path) -> None:
    command = [NVCC, "-std=c++20", "-O3", "-Xptxas", "-v", "-Werror", "all-warnings", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", str(Path(torch.__file__).parent / "include")]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-DUSE_CUDA"]
    command += ["-gencode", f"arch=compute_{capability},code=sm_{capability}"]
    done = subprocess.run(
        [*command, "-c", str(source), "-o", str(tmp_path / "kernel.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"for 'sm_{capability}'" in done.stderr, "ptxas reported no kernel"
    assert not [n for n in re.findall(r"(\d+) bytes spill", done.stderr) if n != "0"], done.stderr
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)]
    assert all(n <= STATIC_SHARED for n in shared)
