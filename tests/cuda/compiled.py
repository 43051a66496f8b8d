"""CUDA sources compiled as C++ with emulation.h, for a machine without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))


def load_emulated(sources: Iterable[Path], folder: Path) -> None:
    """Compile the sources and load them into this process as one library."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++")
    root = Path(torch.__file__).parent
    command = [
        compiler,
        "-std=c++20",
        "-O2",
        "-fPIC",
        "-fvisibility=hidden",
        f"-I{ROOT / 'csrc'}",
        f"-I{FOLDER}",
    ]
    # To glibc's checks a switch of fibers looks like a jump into a function that has returned.
    command += ["-U_FORTIFY_SOURCE", "-Wall", "-Werror", "-Wno-psabi", "-isystem", str(root / "include")]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY", "-x", "c++", "-c"]
    command += ["-DPYMM_SORTED_ON_CHIP=128", "-DPYMM_PANEL_BYTES=65536"]  # csrc/cuda/mining_panels.h

    def run(*arguments: str) -> None:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def compiled(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        run(*command, str(source), "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = str(folder / "libemulated.so")
    run(compiler, "-shared", *objects, str(root / "lib" / "libtorch_cpu.so"), "-o", library)
    torch.ops.load_library(library)
