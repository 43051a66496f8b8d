"""Every CUDA source compiles for each GPU, without spills and without warnings."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc")
# Shared memory that a block may have without asking for more, in bytes.
STATIC_SHARED = 48 << 10


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
@pytest.mark.parametrize("capability", ["80", "90a", "100a"])
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.stem)
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
    used = re.findall(r"Used (\d+) registers.*?(?:, (\d+) bytes smem)?", done.stderr)
    assert used, "ptxas reported no kernel"
    assert not [n for n in re.findall(r"(\d+) bytes spill", done.stderr) if n != "0"]
    shared = [int(n) for n in re.findall(r"(\d+) bytes smem", done.stderr)]
    assert all(n <= STATIC_SHARED for n in shared)
