"""What the Triton kernels of several ops share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
ROWS_AT_ONCE = 8192  # of which copies in float32 are made
# An option of launches of at most 8 warps: a thread may have every register. Otherwise the assembler may
# spill a few to fit a second block on a multiprocessor.
EVERY_REGISTER = {"maxnreg": 255}


@dataclass(frozen=True)
class Compilation:
    """One configuration of a kernel that is launched, for compiling it without a GPU.

    Args:
        label: what the configuration is for.
        kernel: the `triton.jit` function.
        signature: the type of each argument that is no constexpr: `"*bf16"`, `"i64"`, `"fp32"` ...
        constants: the value of each constexpr.
        options: `num_warps`, `num_stages`, `maxnreg`.
        capabilities: the compute capabilities, times 10, on which it is launched.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)
    capabilities: tuple[int, ...] = (80, 90, 100)


def float_only(*tensors: torch.Tensor | None) -> str | None:
    """Why tensors of these types are left to the reference: tensor cores have no float64 path here."""
    for t in tensors:
        if t is not None and t.dtype not in POINTERS:
            return f"the Triton kernels take float32, bfloat16 and float16, not {t.dtype}"
    return None


def dot_precision(x: torch.Tensor) -> str:
    """How float32 products are made: in float32, or in TF32 where the user allows it for torch's matmul."""
    tf32 = x.dtype == torch.float32 and x.is_cuda and torch.backends.cuda.matmul.allow_tf32
    return "tf32" if tf32 else "ieee"


def capability(x: torch.Tensor) -> int:
    """The compute capability of x's GPU, times 10; Hopper's in the interpreter."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


cdiv = triton.cdiv


def precisions(dtype: torch.dtype) -> tuple[str, ...]:
    """What `dot_precision` may answer for a type."""
    return ("ieee", "tf32") if dtype == torch.float32 else ("ieee",)


def product(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` of matrices in float32, whatever their type."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).float()


def through_norms(du: Tensor, t: Tensor, inverse: Tensor | None, eps: float) -> Tensor:
    """The gradient of the rows of `t`, given `du`, that of `t / ||t||` already divided by the norms.

    Args:
        du: `(N, E)` float32; overwritten.
        inverse: `(N,)`, `1 / max(norm, eps)`, or None where the rows were not divided.
    """
    if inverse is not None:
        free = torch.where(inverse < (1 - 1e-6) / eps, inverse, 0.0)  # of no row is eps the divisor
        for first in range(0, t.shape[0], ROWS_AT_ONCE):
            rows = slice(first, first + ROWS_AT_ONCE)
            unit = t[rows].float() * free[rows, None]
            du[rows] -= (du[rows] * unit).sum(-1, keepdim=True) * unit
    return du.to(t.dtype)


def signature_of(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """The type of each argument of a kernel that is no constant: that of `types`, else an int32."""
    return {name: types.get(name, "i32") for name in kernel.arg_names if name not in constants}
