"""Lets torchvision's native operators load beside a CPU build of torch.

The wheel on the package index is for CUDA: its library asks the linker for `libc10_cuda.so`,
`libtorch_cuda.so` and `libcudart.so.13`, and without them torchvision fails to import, and whatever imports
torchvision with it. Its CPU operators need none of the three. So two libraries of those names, whose
functions end the program, are compiled and loaded beside the wheel's own copy of the third, before
torchvision is imported.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

CUDA = ("_ZN3c104cuda", "_ZNK3c104cuda", "_ZN2at4cuda", "_ZNK2at4cuda")


def require() -> Any:
    """torchvision with its native operators; where it cannot be had, the test is skipped with the reason."""
    problem = prepare()
    if problem is not None:
        pytest.skip(problem)
    return pytest.importorskip("torchvision")


@functools.cache
def prepare() -> str | None:
    """Make `import torchvision` work; None, or why it will not. Where it is not installed nothing is done."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None or "torchvision" in sys.modules:
        return None
    package = Path(found.origin).parent
    library = package / "_C.so"
    if torch.version.cuda is not None or not library.exists():
        return None
    for tool in ("gcc", "nm"):
        if shutil.which(tool) is None:
            return f"torchvision's operators need stand-ins for CUDA's libraries, and there is no {tool}"
    symbols = _undefined(library)
    if not symbols:
        return None
    runtimes = sorted(package.parent.glob("torchvision.libs/libcudart*"))
    if not runtimes:
        return "torchvision's wheel is for CUDA and brings no libcudart"
    with tempfile.TemporaryDirectory() as folder:
        try:
            stubs = [
                _compile(Path(folder), "libc10_cuda.so", "".join(map(_stub, symbols))),
                _compile(Path(folder), "libtorch_cuda.so", ""),
            ]
            for path in (*runtimes[:1], *stubs):
                ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
        except (OSError, subprocess.CalledProcessError) as problem:
            return f"the stand-ins for CUDA's libraries cannot be made: {problem}"
    return None


def _undefined(library: Path) -> list[str]:
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True
    )
    names = (line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines())
    return sorted(name for name in names if name.startswith(CUDA))


def _stub(symbol: str) -> str:
    if symbol.endswith("CUDACachingAllocator9allocatorE"):
        return f"void *{symbol};\n"
    body = "return 0;" if symbol.endswith("12device_countEv") else "abort();"
    return f"int {symbol}(void) {{ {body} }}\n"


def _compile(folder: Path, name: str, functions: str) -> Path:
    source = folder / f"{name}.c"
    source.write_text(f"#include <stdlib.h>\n{functions}")
    command = ["gcc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return folder / name
