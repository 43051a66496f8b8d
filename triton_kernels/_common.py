"""What the Triton kernels of several ops share."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import triton

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


@dataclass(frozen=True)
class Compilation:
    """One configuration of a kernel that is launched, for compiling it without a GPU.

    Args:
        label: what the configuration is for.
        kernel: the `triton.jit` function.
        signature: the type of each argument that is no constexpr: `"*bf16"`, `"i64"`, `"fp32"` ...
        constants: the value of each constexpr.
        options: `num_warps`, `num_stages`.
    """

    label: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int] = field(default_factory=dict)


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


cdiv = triton.cdiv
