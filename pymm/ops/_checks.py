"""Argument checks of the public functions: one sentence that names op, argument, expected and got."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(op: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError that every wrong argument ends in."""
    raise ValueError(f"{op}: {argument} must be {expected}, got {got}")


def shape(t: Tensor) -> str:
    return f"({', '.join(str(n) for n in t.shape)}{',' if t.ndim == 1 else ''})"


def check_shape(op: str, argument: str, t: Tensor, expected: tuple[int | str, ...]) -> None:
    """Require `t` to have the shape `expected`; a string stands for any size and is what the error shows."""
    got = t.shape
    fits = len(got) == len(expected)
    if fits:
        for e, n in zip(expected, got, strict=True):
            fits = fits and (isinstance(e, str) or e == n)
    if not fits:
        wanted = f"({', '.join(str(e) for e in expected)}{',' if len(expected) == 1 else ''})"
        fail(op, argument, wanted, shape(t))


def check_same(op: str, first: str, a: Tensor, **others: Tensor | None) -> None:
    """Require a floating type that the kernels take, and the same type and device for every tensor given."""
    if not isinstance(a, Tensor):
        fail(op, first, "a tensor", type(a).__name__)
    if a.dtype not in DTYPES:
        fail(op, first, "float32, bfloat16, float16 or float64", a.dtype)
    for name, b in others.items():
        if b is None:
            continue
        if not isinstance(b, Tensor):
            fail(op, name, "a tensor", type(b).__name__)
        if b.dtype != a.dtype:
            fail(op, name, f"of {first}'s type {a.dtype}", b.dtype)
        check_device(op, first, a, name, b)


def check_device(op: str, first: str, a: Tensor, name: str, b: Tensor) -> None:
    if b.device != a.device:
        fail(op, name, f"on {first}'s device {a.device}", b.device)


def autocast(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Cast floating tensors to autocast's type where autocast is on for their device, as torch's matmuls do.

    float64 is left alone, as torch leaves it.
    """
    device = "meta"
    for t in tensors:
        if isinstance(t, Tensor):
            device = t.device.type
            break
    if device == "meta" or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )
