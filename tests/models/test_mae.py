"""What the masked autoencoder promises without a donor."""

from __future__ import annotations

import pytest
import torch

from pymm.data import random_mask
from pymm.layers import from_patches, sincos_position, to_patches
from pymm.models.mae import MAE, MAESpec, build
from pymm.objectives import MaskedPixels

ROW = MAESpec("test", 8, 48, 2, 3, 0, "", 32, decoder_width=32, decoder_depth=1, decoder_heads=2)


def test_hidden_pixels_are_not_seen() -> None:
    model, pixels = build(ROW).eval(), torch.randn(2, 3, 32, 32)
    keep, mask = random_mask(2, 16, generator=torch.Generator().manual_seed(3))
    patches = to_patches(pixels, 8)
    patches[mask] = 9
    named: dict[str, torch.Tensor] = {}
    first = model(pixels, keep, intermediates=named)
    assert torch.equal(first, model(from_patches(patches, (4, 4), 8), keep))
    assert named["encoder.norm"].shape == (2, 1 + 4, 48)
    patches[~mask] += 1
    assert not torch.equal(first, model(from_patches(patches, (4, 4), 8), keep))


def test_order_of_the_visible_does_not_matter() -> None:
    model, pixels = build(ROW).eval(), torch.randn(2, 3, 32, 32)
    keep = torch.tensor([[1, 5, 9, 14], [0, 2, 3, 15]])
    torch.testing.assert_close(model(pixels, keep), model(pixels, keep.flip(1)))


def test_other_resolution() -> None:
    model = build(ROW)
    assert model(torch.randn(2, 3, 48, 16), torch.tensor([[0, 11], [3, 4]])).shape == (2, 12, 192)


def test_positions_stay_fixed() -> None:
    model = build(ROW)
    fixed = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert fixed == {"encoder.embed.position", "decoder.position"}
    assert torch.equal(model.decoder.position, sincos_position((4, 4), 32, prefix=1))


def test_starts_near_the_mean_of_the_targets() -> None:
    """A normalized target has variance 1, so a model that knows nothing has a loss of about 1."""
    model, pixels = build(ROW), torch.randn(8, 3, 32, 32)
    keep, mask = random_mask(8, 16)
    loss = MaskedPixels()(model(pixels, keep), pixels, mask)
    assert loss.shape == (8,)
    assert 0.8 < loss.mean().item() < 3


def test_learns_one_picture() -> None:
    torch.manual_seed(0)
    model: MAE = build(ROW)
    y, x = torch.meshgrid(torch.linspace(0, 3, 32), torch.linspace(0, 3, 32), indexing="ij")
    pixels = torch.stack([(x * y).sin(), (x + y).cos(), x - y])[None]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    objective, generator = MaskedPixels(), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(60):
        keep, mask = random_mask(1, 16, 0.5, generator=generator)
        loss = objective(model(pixels, keep), pixels, mask).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])


@pytest.mark.parametrize("keep", [torch.zeros(3, 2, dtype=torch.int64), torch.zeros(2, 2)])
def test_keep_must_fit(keep: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"MAE: keep must be \(2, K\) of type torch.int64, got"):
        build(ROW)(torch.randn(2, 3, 32, 32), keep)


def test_sincos_width() -> None:
    with pytest.raises(ValueError, match="sincos_position: width must be a multiple of 4, got 6"):
        sincos_position((2, 2), 6)
