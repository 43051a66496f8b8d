"""The codebook against its definition, and pictures to tokens and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

import pymm
from pymm.models import ImageTokenizer
from pymm.models.image_tokenizer import Codebook, ImageTokenizerSpec, build
from pymm.objectives import TokenizerObjective

ROW = ImageTokenizerSpec("test", 40, 8, 32, 1, 0, "", image_size=32, decay=0.9)


def test_nearest_code() -> None:
    book = Codebook(30, 6).eval()
    z = 5 * torch.randn(4, 3, 6)
    codes, chosen, distance = book(z)
    unit = F.normalize(z, dim=-1)
    distances = (unit[..., None, :] - book.weight).square().sum(-1)  # (4, 3, 30)
    assert torch.equal(chosen, distances.argmin(-1))
    torch.testing.assert_close(distance, distances.min(-1).values)
    torch.testing.assert_close(codes, book.weight[chosen])
    torch.testing.assert_close(book.weight.norm(dim=1), torch.ones(30))


def test_gradient_passes_straight_through() -> None:
    book, z, g = Codebook(30, 6).eval(), torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    (got,) = torch.autograd.grad((book(z)[0] * g).sum(), z)
    (truth,) = torch.autograd.grad((F.normalize(z, dim=-1) * g).sum(), z)
    torch.testing.assert_close(got, truth)


def test_codes_follow_the_mean_of_their_vectors() -> None:
    book = Codebook(3, 4, decay=0.5, revive_below=0.0)
    book.count.fill_(1)  # as if begun
    start, z = book.weight.clone(), torch.randn(40, 4)
    _, chosen, _ = book(z)
    for k in range(3):
        mine = F.normalize(z, dim=-1)[chosen == k]
        torch.testing.assert_close(book.count[k], torch.tensor(0.5 + 0.5 * len(mine)))
        torch.testing.assert_close(book.weight[k], F.normalize(0.5 * start[k] + 0.5 * mine.sum(0), dim=0))
    before = book.weight.clone()
    book.eval()(z)
    assert torch.equal(book.weight, before)


def test_unused_codes_start_anew() -> None:
    """Vectors of eight clusters end with a code for each, though at first all codes lie elsewhere."""
    torch.manual_seed(0)
    book, centres = Codebook(32, 8, decay=0.8), torch.eye(8)
    with torch.no_grad():
        book.weight.copy_(F.normalize(-torch.rand(32, 8), dim=1))
        book.total.copy_(book.weight)
        book.count.fill_(1)
    for _ in range(40):
        z = centres[torch.randint(8, (256,))] + 0.05 * torch.randn(256, 8)
        book(z)
    _, chosen, distance = book.eval()(centres)
    assert len(set(chosen.tolist())) == 8
    assert distance.max() < 0.02


def test_codes_start_at_vectors_of_the_first_batch() -> None:
    book, z = Codebook(16, 4), F.normalize(torch.randn(64, 4), dim=1)
    book(z)
    assert (book.weight @ z.T).max(1).values.min() > 0.9


def test_codes_stay_float32() -> None:
    model = build(ROW).bfloat16()
    before = model.codebook.weight.clone()
    assert {b.dtype for b in model.codebook.buffers()} == {torch.float32}
    assert build(ROW).to("meta").codebook.weight.is_meta
    assert model(torch.randn(2, 3, 32, 32)).pixels.dtype == torch.bfloat16
    assert not torch.equal(model.codebook.weight, before)


def test_tokens_and_back() -> None:
    model, pixels = build(ROW).eval(), torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8)
    result = model(pixels)
    assert result.pixels.shape == (2, 3, 32, 48)
    assert result.tokens.shape == (2, 4 * 6)
    assert torch.equal(result.tokens, model.tokenize(pixels))
    torch.testing.assert_close(model.decode(result.tokens, (4, 6)), result.pixels)
    with pytest.raises(
        ValueError, match=r"ImageTokenizer: pixels must be \(B, 3, H, W\) with H and W multiples of 8"
    ):
        model.tokenize(torch.zeros(1, 3, 30, 32))


def test_learns_colours() -> None:
    """Pictures of a few colours come back, and use more than one token."""
    torch.manual_seed(0)
    model, objective = build(ROW), TokenizerObjective()
    assert isinstance(model, ImageTokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    colours = torch.rand(6, 3) * 2 - 1
    losses = []
    for _ in range(100):
        picked = colours[torch.randint(6, (16, 4, 4))].permute(0, 3, 1, 2)
        pixels = F.interpolate(picked, scale_factor=8, mode="nearest")
        result = model(pixels)
        loss = objective(result.pixels, pixels, result.commitment).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append((result.pixels - pixels).square().mean().item())
    variance = colours.var(0, correction=0).mean().item()
    assert sum(losses[-5:]) / 5 < 0.5 * variance
    assert len(set(result.tokens.flatten().tolist())) >= 6


def test_objective() -> None:
    decoded, pixels, distance = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2)
    got = TokenizerObjective(0.5)(decoded, pixels, distance)
    for b in range(2):
        torch.testing.assert_close(got[b], F.mse_loss(decoded[b], pixels[b]) + 0.5 * distance[b])
    with pytest.raises(
        ValueError, match=r"TokenizerObjective: decoded must be \(2, 3, 4, 4\), got \(2, 3, 4, 5\)"
    ):
        TokenizerObjective()(torch.zeros(2, 3, 4, 5), pixels, distance)


def test_rows() -> None:
    model: Any = pymm.create_model("vq_tokenizer_mini")
    assert (model.vocab_size, model.stride, model.image_size) == (512, 8, 64)
