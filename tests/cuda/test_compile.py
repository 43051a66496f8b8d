"""Every CUDA source compiles for each GPU, without spills and without warnings.

`PYMM_COMPILE=all` compiles every kernel for every GPU, in ten minutes; otherwise only what no build compiles.
A build with `PYMM_STRICT_CUDA`, as `.ci/run` makes it for one GPU, ends where a register is spilled.
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
PRIMITIVES = Path(__file__).with_name("primitives.cu")
KERNELS = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
SOURCES = [PRIMITIVES, *(KERNELS if os.environ.get("PYMM_COMPILE") == "all" else ())]
CAPABILITIES = ("80", "90a", "100a")
# Static shared memory of a block, in bytes. Dynamic memory is checked where it is launched
# (csrc/cuda/device.h), in the emulation too, so the samples of test_emulation.py have passed that.
STATIC_SHARED = 48 << 10


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.stem)
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
