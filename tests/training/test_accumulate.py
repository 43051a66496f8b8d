from __future__ import annotations

import pytest
import torch

from pymm.objectives import ContrastiveObjective
from pymm.training.accumulate import Accumulator, seed_step, split
from pymm.training.loop import call_model
from tests.training.small import PairLoader, SmallClip, model

BATCH = PairLoader(batch_size=12).batch(0, 0)


def gradients(
    small: SmallClip, micro: int | None, mode: str = "cached", kind: str = "infonce", step: int = 3
):
    small.zero_grad(set_to_none=True)
    accumulate = Accumulator(small, ContrastiveObjective(kind), call_model, mode)  # type: ignore[arg-type]
    loss = accumulate(split(BATCH, micro), step)
    return loss, {name: p.grad for name, p in small.named_parameters()}


@pytest.mark.parametrize("kind", ["infonce", "sigmoid"])
@pytest.mark.parametrize("micro", [1, 4, 5])
def test_cached_is_the_whole_batch(micro: int, kind: str) -> None:
    small = model(dropout=0.0, bias=kind == "sigmoid").double()
    BATCH.pixels = BATCH.pixels.double()
    try:
        loss, whole = gradients(small, None, kind=kind)
        cached_loss, cached = gradients(small, micro, kind=kind)
    finally:
        BATCH.pixels = BATCH.pixels.float()
    torch.testing.assert_close(cached_loss, loss)
    for name, gradient in whole.items():
        torch.testing.assert_close(cached[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_cached_drops_the_same_units_in_both_passes() -> None:
    """With dropout, the gradient is that of one graph over micro-batches that are seeded alike."""
    small = model(dropout=0.5).train()
    loss, cached = gradients(small, 4)
    small.zero_grad(set_to_none=True)
    parts = split(BATCH, 4)
    outputs = []
    for number, part in enumerate(parts):
        seed_step(0, 3, number, 0)
        outputs.append(small(part.pixels, part.tokens))
    image, text, scale = zip(*outputs, strict=True)
    expected = ContrastiveObjective()((torch.cat(image), torch.cat(text), scale[0]), BATCH.ids)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in small.named_parameters():
        torch.testing.assert_close(cached[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    _, other = gradients(small, 4, step=4)
    assert not torch.allclose(other["embed.weight"], cached["embed.weight"])


def test_cached_runs_batch_norm_statistics_once() -> None:
    once, twice = model(batch_norm=True).train(), model(batch_norm=True).train()
    for part in split(BATCH, 4):
        once(part.pixels, part.tokens)
    gradients(twice, 4)
    for name, b in once.named_buffers():
        torch.testing.assert_close(dict(twice.named_buffers())[name], b, msg=name)


def test_plain_is_the_mean_of_the_micro_batches() -> None:
    small = model(dropout=0.0)
    loss, plain = gradients(small, 5, mode="plain")  # 5 + 5 + 2
    small.zero_grad(set_to_none=True)
    expected = torch.zeros(())
    for part in split(BATCH, 5):
        expected = (
            expected + ContrastiveObjective()(small(part.pixels, part.tokens), part.ids) * len(part.ids) / 12
        )
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for name, p in small.named_parameters():
        torch.testing.assert_close(plain[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert loss < gradients(small, 5)[0] - 0.3  # fewer candidates: an easier question


def test_split_keeps_every_row() -> None:
    parts = split(BATCH, 5)
    assert [len(part.keys) for part in parts] == [5, 5, 2]
    assert torch.equal(torch.cat([part.pixels for part in parts]), BATCH.pixels)
    assert split(BATCH, 12)[0] is BATCH
