"""Objectives over hidden patches against their definitions, patch by patch."""

from __future__ import annotations

import pytest
import torch

from pymm.data import random_mask
from pymm.objectives import MaskedPixels, MaskedTokens


def test_masked_pixels() -> None:
    pixels, predicted = torch.randn(2, 3, 8, 12), torch.randn(2, 6, 48)
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]]).bool()
    for normalize in (True, False):
        got = MaskedPixels(normalize)(predicted, pixels, mask)
        for b in range(2):
            losses = []
            for i in mask[b].nonzero()[:, 0].tolist():
                top, left = 4 * (i // 3), 4 * (i % 3)
                patch = pixels[b, :, top : top + 4, left : left + 4].permute(1, 2, 0).reshape(-1)
                if normalize:
                    patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                losses.append((predicted[b, i] - patch).square().mean())
            torch.testing.assert_close(got[b], torch.stack(losses).mean())


def test_visible_patches_have_no_gradient() -> None:
    predicted = torch.randn(2, 16, 192, requires_grad=True)
    _, mask = random_mask(2, 16)
    MaskedPixels()(predicted, torch.randn(2, 3, 32, 32), mask).mean().backward()
    assert predicted.grad is not None
    assert (predicted.grad.abs().sum(2) > 0).equal(mask)


def test_half_precision_is_compared_in_float32() -> None:
    predicted, pixels = torch.randn(2, 4, 48).bfloat16(), torch.randn(2, 3, 8, 8).bfloat16()
    mask = torch.ones(2, 4, dtype=torch.bool)
    loss = MaskedPixels()(predicted, pixels, mask)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, MaskedPixels()(predicted.float(), pixels.float(), mask))


@pytest.mark.parametrize(
    ("predicted", "mask", "message"),
    [
        (
            torch.zeros(2, 4, 50),
            torch.ones(2, 4).bool(),
            r"predicted must be the patches of pixels \(2, 3, 8, 8\)",
        ),
        (torch.zeros(2, 4, 48), torch.ones(2, 4), r"mask must be \(2, 4\) of type torch.bool"),
        (
            torch.zeros(2, 4, 48),
            torch.eye(4).bool().cumsum(0)[:2].bool(),
            "mask must be of equally many hidden",
        ),
    ],
)
def test_errors(predicted: torch.Tensor, mask: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"MaskedPixels: {message}"):
        MaskedPixels()(predicted, torch.zeros(2, 3, 8, 8), mask)


def test_masked_tokens() -> None:
    objective = MaskedTokens(12, 20)
    features, tokens = torch.randn(2, 7, 12), torch.randint(20, (2, 6))
    mask = torch.tensor([[1, 0, 0, 1, 1, 0], [0, 1, 0, 1, 0, 1]]).bool()
    losses, right = objective(features, tokens, mask)
    for b in range(2):
        log = objective.head(features[b, 1:]).log_softmax(1)
        hidden = mask[b].nonzero()[:, 0]
        torch.testing.assert_close(losses[b], -log[hidden, tokens[b, hidden]].mean())
        assert right[b] == (log[hidden].argmax(1) == tokens[b, hidden]).float().mean()
    with pytest.raises(ValueError, match=r"MaskedTokens: tokens must be \(2, 6\), got \(2, 5\)"):
        objective(features, tokens[:, :5], mask)
