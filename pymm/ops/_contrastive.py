"""What the contrastive losses share: their numbers as tensors, and rows divided by their norms."""

from __future__ import annotations

import torch
from torch import Tensor

from pymm.ops._checks import check_device, fail, shape

EPS = 1e-12  # the smallest norm divided by, as in F.normalize


def as_scalar(op: str, name: str, value: Tensor | float, like: Tensor) -> Tensor:
    """`value` as a tensor without dimensions, on the device and in the accumulator's type of `like`."""
    acc = torch.promote_types(like.dtype, torch.float32)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            fail(op, name, "a number or a tensor of one element", shape(value))
        if not value.is_floating_point():
            fail(op, name, "a number or a floating tensor", value.dtype)
        check_device(op, "x", like, name, value)
        return value.to(acc) if value.ndim == 0 else value.reshape(()).to(acc)
    if isinstance(value, bool) or not isinstance(value, (int, float, torch.SymFloat, torch.SymInt)):
        fail(op, name, "a number or a tensor of one element", type(value).__name__)
    return torch.full((), value, dtype=acc, device=like.device)


def unit(t: Tensor, normalize: bool = True) -> tuple[Tensor, Tensor]:
    """The rows of `t` as the loss multiplies them, in the accumulator's type, and the factor of each."""
    ta = t.to(torch.promote_types(t.dtype, torch.float32))
    inverse = ta.norm(dim=-1).clamp_min(EPS).reciprocal() if normalize else ta.new_ones(ta.shape[:-1])
    return ta * inverse[:, None], inverse


def through_unit(du: Tensor, t: Tensor, normalize: bool = True) -> Tensor:
    """The gradient of the rows of `t`, given that of `unit(t)`."""
    if not normalize:
        return du.to(t.dtype)
    u, inverse = unit(t)
    free = (inverse < (1 - 1e-6) / EPS)[:, None]  # where the norm is divided by, and not eps
    return (inverse[:, None] * (du - free * (du * u).sum(-1, keepdim=True) * u)).to(t.dtype)
