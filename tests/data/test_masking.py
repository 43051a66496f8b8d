"""Random and block-wise masks: numbers, determinism, shape."""

from __future__ import annotations

import pytest
import torch

from pymm.data import block_mask, random_mask


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("patches", "ratio", "kept"), [(196, 0.75, 49), (64, 0.6, 25), (10, 0.0, 10)])
def test_random(patches: int, ratio: float, kept: int) -> None:
    keep, mask = random_mask(5, patches, ratio, generator=seeded(0))
    assert keep.shape == (5, kept)
    assert mask.shape == (5, patches)
    for row, hidden in zip(keep, mask, strict=True):
        assert row.tolist() == (~hidden).nonzero()[:, 0].tolist()
    again, _ = random_mask(5, patches, ratio, generator=seeded(0))
    assert torch.equal(keep, again)
    if ratio:
        assert len({tuple(row) for row in keep.tolist()}) == 5
        assert not torch.equal(keep, random_mask(5, patches, ratio, generator=seeded(1))[0])


def test_random_is_uniform() -> None:
    _, mask = random_mask(4000, 16, generator=seeded(0))
    assert (mask.float().mean(0) - 0.75).abs().max() < 0.04


@pytest.mark.parametrize(
    ("grid", "ratio", "count"), [((14, 14), 0.4, 78), ((8, 8), 0.4, 25), ((4, 6), 1, 24)]
)
def test_block(grid: tuple[int, int], ratio: float, count: int) -> None:
    mask = block_mask(50, grid, ratio, generator=seeded(2))
    assert mask.shape == (50, grid[0] * grid[1])
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [count] * 50
    assert torch.equal(mask, block_mask(50, grid, ratio, generator=seeded(2)))
    if ratio < 1:
        assert len({tuple(row) for row in mask.tolist()}) == 50


def test_block_is_in_blocks() -> None:
    """A hidden patch has far more hidden neighbours than among as many random ones."""

    def neighbours(mask: torch.Tensor) -> float:
        grid = mask.reshape(-1, 14, 14)
        pairs = (grid[:, 1:] & grid[:, :-1]).sum() + (grid[:, :, 1:] & grid[:, :, :-1]).sum()
        return (pairs / mask.sum()).item()

    blocks = block_mask(100, (14, 14), generator=seeded(0))
    scattered = random_mask(100, 196, 1 - 118 / 196, generator=seeded(0))[1]
    assert neighbours(blocks) > 1.5 > 2 * 0.4 + 0.1 > neighbours(scattered)


def test_block_everywhere() -> None:
    """Rectangles that lie inside the picture seldom reach its corners, and hide its middle most."""
    share = block_mask(2000, (8, 8), generator=seeded(0)).float().mean(0).reshape(8, 8)
    assert 0.08 < share.min() < share.max() < 0.7
    assert share[3:5, 3:5].mean() > 2 * share[::7, ::7].mean()
    torch.testing.assert_close(share, share.flip(0), rtol=0, atol=0.06)
    torch.testing.assert_close(share, share.mT, rtol=0, atol=0.06)


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 0.99])
def test_random_ratio(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"random_mask: ratio must be in \[0, 1\) and such that one of 16"):
        random_mask(1, 16, ratio)


def test_block_arguments() -> None:
    with pytest.raises(ValueError, match=r"block_mask: ratio must be in \[0, 1\], got 1.5"):
        block_mask(1, (4, 4), 1.5)
    with pytest.raises(ValueError, match="block_mask: smallest must be at least 1, got 0"):
        block_mask(1, (4, 4), smallest=0)
