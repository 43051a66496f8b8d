"""Position embeddings of a grid: learned ones at another resolution, and fixed ones."""

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
    if is_grid(grid, (side, side)):
        return position
    old = position[prefix:].float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    new = F.interpolate(old, size=grid, mode="bicubic", antialias=True, align_corners=False)
    new = new.flatten(2)[0].mT.to(position.dtype)  # (h*w, C)
    return torch.cat([position[:prefix], new]) if prefix else new


def is_grid(grid: tuple[int, int], known: tuple[int, int]) -> bool:
    """Whether a grid is the known one; not while `torch.export` makes a graph for all of them."""
    return all(isinstance(size, int) for size in grid) and grid == known


def sincos_position(grid: tuple[int, int], width: int, *, prefix: int = 0) -> Tensor:
    r"""Fixed position embeddings of a grid (He et al. 2022, arXiv:2111.06377, app. A.1).

    With :math:`\omega_i = 10000^{-4i/C}` the position (row r, column c) has the four quarters
    :math:`\sin(c\,\omega), \cos(c\,\omega), \sin(r\,\omega), \cos(r\,\omega)`, columns first as in the
    published weights.

    Args:
        grid: `(h, w)`.
        width: C, a multiple of 4.
        prefix: P, rows of zeros in front, for tokens that have no place.

    Returns:
        `(P + h·w, C)`, computed in float64, in the default type.

    Raises:
        ValueError: when `width` is no multiple of 4.
    """
    if width % 4:
        fail("sincos_position", "width", "a multiple of 4", width)
    quarter = width // 4
    omega = 10000.0 ** -(torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
    r, c = rows.reshape(-1, 1) * omega, columns.reshape(-1, 1) * omega
    table = torch.cat([c.sin(), c.cos(), r.sin(), r.cos()], 1)
    return torch.cat([table.new_zeros(prefix, width), table]).to(torch.get_default_dtype())
