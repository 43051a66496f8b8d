"""Which patches of an image are hidden."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from pymm.data._errors import fail


def random_mask(
    batch: int, patches: int, ratio: float = 0.75, *, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """Hide patches at random, each sample its own (He et al. 2022, arXiv:2111.06377, sec. 3).

    Args:
        batch: B.
        patches: N.
        ratio: the share that is hidden, in [0, 1).
        generator: of the choice; torch's own when None.

    Returns:
        The visible patches, `(B, K)` int64 in rising order, K = ⌊N·(1 − ratio)⌋; and `(B, N)` bool, True =
        hidden.

    Raises:
        ValueError: when `ratio` leaves no patch or lies outside [0, 1).
    """
    if not 0 <= ratio < 1 or int(patches * (1 - ratio)) < 1:
        fail("random_mask", "ratio", f"in [0, 1) and such that one of {patches} patches is left", ratio)
    noise = torch.rand((batch, patches), generator=generator)
    keep = noise.argsort(1)[:, : int(patches * (1 - ratio))].sort(1).values
    return keep, torch.ones((batch, patches), dtype=torch.bool).scatter(1, keep, False)


def block_mask(
    batch: int,
    grid: tuple[int, int],
    ratio: float = 0.4,
    *,
    smallest: int | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hide patches in rectangles (Bao et al. 2022, arXiv:2106.08254, alg. 1), the same number in each sample.

    A rectangle's area is uniform from `smallest` to what is still to be hidden, the logarithm of its aspect
    uniform from log 0.3 to log 1/0.3. Where ten of them in a row hide nothing new or too much, single patches
    make up the rest, so that the numbers agree.

    Args:
        batch: B.
        grid: `(h, w)`, N = h·w.
        ratio: the share that is hidden, in [0, 1].
        smallest: area of the smallest rectangle; the paper's 16 of 196, in proportion, when None.
        generator: of the choice; torch's own when None.

    Returns:
        `(B, N)` bool, True = hidden, ⌊N·ratio⌋ in each row.

    Raises:
        ValueError: when `ratio` lies outside [0, 1], or `smallest` is less than 1.
    """
    if not 0 <= ratio <= 1:
        fail("block_mask", "ratio", "in [0, 1]", ratio)
    n = grid[0] * grid[1]
    if smallest is None:
        smallest = max(1, round(n * 16 / 196))
    if smallest < 1:
        fail("block_mask", "smallest", "at least 1", smallest)
    seeds = torch.randint(2**62, (batch,), generator=generator).tolist()
    rows = [_blocks(random.Random(seed), grid, int(n * ratio), smallest) for seed in seeds]
    return torch.tensor(rows, dtype=torch.bool).reshape(batch, n)


def _blocks(draw: random.Random, grid: tuple[int, int], count: int, smallest: int) -> list[bool]:
    (h, w), hidden, left, failures = grid, [False] * (grid[0] * grid[1]), count, 0
    while left and failures < 10:
        area = draw.uniform(min(smallest, left), left)
        aspect = math.exp(draw.uniform(math.log(0.3), -math.log(0.3)))
        a, b = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        failures += 1
        if not (1 <= a <= h and 1 <= b <= w):
            continue
        top, side = draw.randint(0, h - a), draw.randint(0, w - b)
        block = [y * w + x for y in range(top, top + a) for x in range(side, side + b)]
        new = [i for i in block if not hidden[i]]
        if 0 < len(new) <= left:
            for i in new:
                hidden[i] = True
            left -= len(new)
            failures = 0
    for i in draw.sample([i for i, is_hidden in enumerate(hidden) if not is_hidden], left):
        hidden[i] = True
    return hidden
