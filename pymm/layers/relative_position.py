"""A learned bias on attention's scores for each relative position of two patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers.position import is_grid
from pymm.ops._checks import fail

# Rows of a table behind those of the patches: from the class token, to it, and its own.
_OTHERS = 3


class RelativePositionBias(nn.Module):
    r"""A bias per head and relative position (Bao et al. 2022, arXiv:2106.08254, sec. 2.5 and app. D).

    The score of the query patch (r, c) and the key patch (r', c') receives the entry for (r − r', c − c');
    three more entries are for pairs with the class token. The bias starts at zero.

    Args:
        grid: side of the square grid of patches that the table is made for.
        heads: H.
    """

    def __init__(self, grid: int, heads: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros((2 * grid - 1) ** 2 + _OTHERS, heads))

    def forward(self, grid: tuple[int, int], index: Tensor) -> Tensor:
        """The bias of a grid.

        Args:
            grid: `(h, w)`; the table is interpolated where it is made for another one.
            index: `relative_position_index(grid)`, on the table's device.

        Returns:
            `(H, 1 + N, 1 + N)`, N = h·w, to be attention's float mask.
        """
        table = resample_relative_position(self.table, grid)
        # A lookup of rows, whose gradient is gathered faster than that of columns.
        return F.embedding(index, table).permute(2, 0, 1).contiguous()


def relative_position_index(grid: tuple[int, int]) -> Tensor:
    """Which row of the table belongs to each pair: `(1 + N, 1 + N)` int64 for a grid `(h, w)`, N = h·w."""
    h, w = grid
    rows, columns = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    r, c = rows.flatten(), columns.flatten()
    pairs = (r[:, None] - r + h - 1) * (2 * w - 1) + (c[:, None] - c + w - 1)
    patches = (2 * h - 1) * (2 * w - 1)
    index = F.pad(pairs, (1, 0, 1, 0))
    index[0], index[:, 0], index[0, 0] = patches, patches + 1, patches + 2
    return index


def resample_relative_position(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """The table of a square grid, interpolated to another grid; bilinear, as transformers does it.

    Args:
        table: `((2g − 1)² + 3, H)`.
        grid: `(h, w)`.

    Returns:
        `((2h − 1)(2w − 1) + 3, H)`; `table` itself when the grid is the same.

    Raises:
        ValueError: when the table is not that of a square grid.
    """
    side = math.isqrt(max(table.shape[0] - _OTHERS, 0))
    if side * side != table.shape[0] - _OTHERS or side % 2 == 0:
        fail("resample_relative_position", "table", "((2g - 1)^2 + 3, H)", tuple(table.shape))
    size = (2 * grid[0] - 1, 2 * grid[1] - 1)
    if is_grid(size, (side, side)):
        return table
    old = table[:-_OTHERS].float().mT.reshape(1, -1, side, side)
    new = F.interpolate(old, size=size, mode="bilinear", align_corners=False)[0].flatten(1).mT
    return torch.cat([new.to(table.dtype), table[-_OTHERS:]])
