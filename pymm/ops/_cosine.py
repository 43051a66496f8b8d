"""Cosine similarity of rows in plain torch: what the references of several ops share."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12  # the smallest norm divided by, torch.nn.functional.normalize's


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The type in which the products and the statistics of a tensor of `dtype` are kept."""
    return torch.promote_types(dtype, torch.float32)


def inverse_norms(x: Tensor, eps: float = EPS) -> Tensor:
    """`1 / max(||x||, eps)` of every row, in the accumulator's type."""
    return x.to(accumulator(x.dtype)).norm(dim=-1).clamp_min(eps).reciprocal()


def free_norms(inv: Tensor, eps: float = EPS) -> Tensor:
    """Where `max(||x||, eps)` is the norm and not eps: there the norm takes part in the gradient."""
    return inv < (1 - 1e-6) / eps


def row_gradient(g: Tensor, x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor, eps: float = EPS) -> Tensor:
    """Gradient of the rows of `x`, for the gradient `g` `(..., N, M)` of their cosines with those of `y`."""
    unit = x * inv_x[..., None]
    t = g @ (y * inv_y[..., None])  # (..., N, D)
    radial = (t * unit).sum(-1, keepdim=True) * unit
    return inv_x[..., None] * (t - free_norms(inv_x, eps)[..., None] * radial)
