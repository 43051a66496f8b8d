"""The kernels that a GPU can choose from, Triton's and CUDA C++'s. Both are loaded on first use.

A file `pymm.triton_kernels.<op>` holds `IMPLEMENTATIONS`, the host function of each torch op by name, and may
hold `limits(*torch-op arguments)`, which says why it would not take them. The CUDA library registers itself.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from pymm.ops._record import NAMESPACES, REGISTRY, library_of

# Which candidate serves an op when nobody chooses, best first. No GPU has measured either yet; where torch
# has a library's tuned product, that stays until a measurement says otherwise.
ORDER = ("triton", "cuda")
TORCH_FIRST = {"linear"}


def preference(op: str) -> tuple[str, ...]:
    """The candidates of an op in the order in which they are tried."""
    return () if op in TORCH_FIRST else ORDER


@torch.compiler.assume_constant_result
def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def missing(candidate: str, op: str, arguments: tuple[Any, ...]) -> str | None:
    """Why a candidate would not run these arguments, or None when it would."""
    problem = problem_of(candidate, op)
    if problem is not None:
        return problem
    limits = _limits(candidate, op)
    return limits(*arguments) if limits is not None else None


@torch.compiler.assume_constant_result
def problem_of(candidate: str, op: str) -> str | None:
    """Why a candidate has no kernel for the op here, or None when it has one; registers it."""
    loaded = _triton(op) if candidate == "triton" else _cuda(op)
    return loaded if isinstance(loaded, str) else None


def _limits(candidate: str, op: str) -> Callable[..., str | None] | None:
    loaded = _triton(op) if candidate == "triton" else None
    return getattr(loaded, "limits", None)


@functools.cache
def _triton(op: str) -> ModuleType | str:
    """The op's Triton kernels, registered; or why there are none."""
    name = f"pymm.triton_kernels.{op}"
    if importlib.util.find_spec("pymm.triton_kernels") is None or importlib.util.find_spec(name) is None:
        return "this op has no Triton kernel"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"Triton does not load ({error}); install it with: pip install triton"
    library = library_of("triton", REGISTRY[op])
    for torch_op, implementation in module.IMPLEMENTATIONS.items():
        library.impl(torch_op, implementation, "CUDA")
        if interpreting():
            library.impl(torch_op, implementation, "CPU")
    return module


@functools.cache
def _cuda(op: str) -> bool | str:
    """True when the CUDA library is loaded and has the op; or why not."""
    problem = load_cuda_library()
    if problem is not None:
        return problem
    library_of("cuda", REGISTRY[op])
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACES['cuda']}::{op}", "CUDA"):
        return "this op has no CUDA kernel"
    return True


@functools.cache
def load_cuda_library() -> str | None:
    """Load the CUDA kernels where a GPU is available; or say why they are not."""
    spec = importlib.util.find_spec("pymm._C")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path(__file__).parents[1]
    path = folder / "libpymm_cuda.so"
    if not path.exists():
        return "the CUDA kernels were not compiled; build where nvcc is found"
    if not torch.cuda.is_available():
        return "torch finds no usable GPU"
    try:
        # Ours is linked to no CUDA build of torch; so torch's symbols have to be in sight when it is loaded.
        of_torch = Path(torch.__file__).parent / "lib" / "libtorch_cuda.so"
        if of_torch.exists():
            ctypes.CDLL(str(of_torch), mode=ctypes.RTLD_GLOBAL)
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"the CUDA kernels do not load ({error})"
    return None
