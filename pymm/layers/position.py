"""Learned position embeddings of a grid, at another resolution."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import fail


def resample_position(position: Tensor, grid: tuple[int, int], *, prefix: int = 0) -> Tensor:
    """Position embeddings of a square grid, interpolated to another grid.

    Bicubic with antialiasing, in float32, as timm and open_clip do it.

    Args:
        position: `(P + N, C)`; the first P rows belong to prefix tokens, the rest to a square grid of N.
        grid: `(h, w)`, the rows and columns wanted.
        prefix: P, rows that are passed on unchanged.

    Returns:
        `(P + h·w, C)` in the type of `position`; `position` itself when the grid is the same.

    Raises:
        ValueError: when N is no square number.
    """
    n = position.shape[0] - prefix
    side = math.isqrt(n)
    if side * side != n:
        fail("resample_position", "position", "rows of a square grid behind the prefix", n)
    if (side, side) == grid:
        return position
    old = position[prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=grid, mode="bicubic", antialias=True, align_corners=False)
    new = new.flatten(2)[0].mT.to(position.dtype)  # (h*w, C)
    return torch.cat([position[:prefix], new]) if prefix else new
