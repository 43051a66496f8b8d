"""Regions as grids of numbers, each from the map that suits its size."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from pymm.ops._checks import fail

# A box of 224 pixels is pooled from the map of stride 16 = 2**4 (Lin et al. 2017, arXiv:1612.03144, eq. 1).
CANONICAL_SIDE, CANONICAL_LEVEL = 224, 4
# Features, boxes (K, 5), bins, what coordinates are multiplied by -> (K, C, bins, bins).
Pool = Callable[[Tensor, Tensor, int, float], Tensor]


class RegionPool(nn.Module):
    """Pools regions from one map, or each from the one of several whose stride suits its size.

    Args:
        pool: `pymm.ops.roi_align`, or `pymm.ops.roi_pool` (Girshick 2015, arXiv:1504.08083).
        bins: of a region along each axis.
        strides: of the maps, in pixels, each twice the one before; further maps are not pooled from.

    Raises:
        ValueError: for other strides.
    """

    def __init__(self, pool: Pool, bins: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        if not strides or any(b != 2 * a for a, b in pairwise(strides)):
            fail("RegionPool", "strides", "at least one, each twice the one before", strides)
        self.pool, self.bins, self.strides = pool, bins, strides

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Pool.

        Args:
            maps: `(B, C, Hi, Wi)`, of the strides.
            boxes: for each picture `(L, 4)`, `x1, y1, x2, y2` in pixels.

        Returns:
            `(K, C, bins, bins)`, picture by picture.
        """
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rows = torch.cat([image, torch.cat(list(boxes))], 1)
        if len(self.strides) == 1:
            return self._pooled(maps[0], rows, self.strides[0])
        side = (rows[:, 3:] - rows[:, 1:3]).prod(1).sqrt()
        finest = math.log2(self.strides[0])
        level = (CANONICAL_LEVEL + (side / CANONICAL_SIDE).log2() + 1e-6).floor()
        level = level.clamp(finest, finest + len(self.strides) - 1)
        parts, places = [], []
        for i, stride in enumerate(self.strides):
            at = (level == finest + i).nonzero()[:, 0]
            places.append(at)
            parts.append(self._pooled(maps[i], rows[at], stride))
        return torch.cat(parts)[torch.cat(places).argsort()]

    def _pooled(self, x: Tensor, rows: Tensor, stride: int) -> Tensor:
        if rows.dtype != torch.float32 or x.dtype.itemsize != 2:
            rows = rows.to(x.dtype)
        return self.pool(x, rows, self.bins, 1 / stride)
