"""Patch and token embedding, and positions at another resolution."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from pymm.layers import Normalize, PatchEmbed, TokenEmbed, resample_position

MEAN, STD = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)


def reference(layer: PatchEmbed, pixels: torch.Tensor) -> torch.Tensor:
    x = F.conv2d(pixels, layer.weight, layer.bias, stride=layer.patch_size).flatten(2).mT
    prefix = layer.prefix.expand(x.shape[0], -1, -1) if layer.prefix is not None else x[:, :0]
    position = layer.position
    if position is None:
        return torch.cat([prefix, x], 1)
    if layer.position_prefix:
        return torch.cat([prefix, x], 1) + position
    return torch.cat([prefix, x + position], 1)


@pytest.mark.parametrize("position", ["all", "patches", None])
@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("bias", [True, False])
def test_patch_embed(position: str | None, prefix: int, bias: bool) -> None:
    layer = PatchEmbed(24, 8, 12, prefix=prefix, bias=bias, position=position)  # type: ignore[arg-type]
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(std=0.2)
    pixels = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(layer(pixels), reference(layer, pixels), rtol=2e-5, atol=2e-5)


def test_patch_embed_starts_as_a_convolution() -> None:
    layer = PatchEmbed(32, 16, 64)
    bound = (3 * 16 * 16) ** -0.5
    assert layer.weight.abs().max() <= bound
    assert abs(layer.weight.std().item() - bound / 3**0.5) < 1e-4
    assert layer.position is not None
    assert abs(layer.position.std().item() - 0.02) < 0.003


def test_bytes_are_normalized_in_the_kernel() -> None:
    layer = PatchEmbed(16, 8, 12, mean=MEAN, std=STD)
    raw = torch.randint(0, 256, (2, 3, 16, 24), dtype=torch.uint8)
    pixels = (raw / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(layer(raw), layer(pixels), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(Normalize(MEAN, STD)(raw, torch.float32), pixels)
    assert Normalize(MEAN, STD)(pixels, torch.bfloat16).dtype == torch.bfloat16


def test_patch_embed_masks() -> None:
    layer, pixels = PatchEmbed(16, 8, 12), torch.randn(2, 3, 16, 16)
    keep = torch.tensor([[3, 1], [0, 2]])
    full = layer(pixels)
    kept = torch.stack([full[i, 1 + keep[i]] for i in range(2)])
    torch.testing.assert_close(layer(pixels, keep=keep)[:, 1:], kept)
    mask = torch.tensor([[True, False, False, True], [False, False, True, False]])
    token = torch.randn(12)
    assert layer.position is not None
    masked = torch.where(mask[..., None], token + layer.position[1:], full[:, 1:])
    torch.testing.assert_close(layer(pixels, mask=mask, mask_token=token)[:, 1:], masked)


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 1, 16, 16), (2, 3, 17, 16), (2, 3, 16, 20)])
def test_patch_embed_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match=r"PatchEmbed: pixels must be \(B, 3, H, W\) with H and W multiples of 8"
    ):
        PatchEmbed(16, 8, 12)(torch.zeros(shape))


def test_patch_embed_sizes() -> None:
    with pytest.raises(
        ValueError, match="PatchEmbed: image_size must be a multiple of the patch size 8, got 20"
    ):
        PatchEmbed(20, 8, 12)


def test_resample() -> None:
    position = torch.randn(1 + 16, 6)
    assert resample_position(position, (4, 4), prefix=1) is position
    got = resample_position(position, (6, 3), prefix=1)
    assert torch.equal(got[0], position[0])
    grid = position[1:].T.reshape(1, 6, 4, 4)
    truth = F.interpolate(grid, (6, 3), mode="bicubic", antialias=True)
    torch.testing.assert_close(got[1:].T.reshape(1, 6, 6, 3), truth)
    constant = torch.ones(9, 2) * torch.tensor([3.0, -1.0])
    torch.testing.assert_close(
        resample_position(constant, (7, 5)), torch.ones(35, 2) * torch.tensor([3.0, -1.0])
    )
    with pytest.raises(ValueError, match="rows of a square grid"):
        resample_position(position, (4, 4))


def test_resampled_positions_have_gradients() -> None:
    layer = PatchEmbed(16, 8, 4)
    layer(torch.randn(1, 3, 32, 24)).square().sum().backward()
    assert layer.position is not None
    assert layer.position.grad is not None
    assert (layer.position.grad.abs().sum(1) > 0).all()


def test_token_embed() -> None:
    layer = TokenEmbed(20, 6, 4)
    tokens = torch.tensor([[1, 19, 0, 3]])
    torch.testing.assert_close(layer(tokens), layer.weight[tokens] + layer.position[:4])
    assert layer(torch.zeros(0, 6, dtype=torch.int64)).shape == (0, 6, 4)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 7, dtype=torch.int64), r"must be \(B, L\) with L <= 6, got \(2, 7\)"),
        (torch.zeros(6, dtype=torch.int64), r"must be \(B, L\) with L <= 6, got \(6,\)"),
        (torch.zeros(2, 6), "must be int64 or int32, got torch.float32"),
        (torch.tensor([[0, 20]]), r"must be ids in \[0, 20\), got 20"),
        (torch.tensor([[-1, 2]]), r"must be ids in \[0, 20\), got -1"),
    ],
)
def test_token_embed_errors(tokens: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"TokenEmbed: tokens {message}"):
        TokenEmbed(20, 6, 4)(tokens)
