from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pymm.training.checkpoint import load_checkpoint
from pymm.training.errors import CheckpointError
from pymm.training.optimizer import build_optimizer
from pymm.training.settings import OptimizerSettings
from pymm.training.weights import Average, Weights, evaluating
from tests.training.small import PairLoader, fit, model, settings


def test_small_updates_are_not_lost_in_bfloat16() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4, 4))

    whole = One()
    weights = Weights(whole, low_precision=True)
    optimizer = build_optimizer(weights, OptimizerSettings(learning_rate=1e-4, weight_decay=0.0))
    assert whole.weight.dtype == torch.bfloat16
    for _ in range(100):  # each moves the weight by 1e-4; bfloat16's step below 1 is 4e-3
        weights.zero_grad()
        whole.weight.float().sum().backward()
        weights.collect_gradients()
        assert whole.weight.grad is None
        optimizer.step()
        weights.publish()
    assert weights.masters["weight"].dtype == torch.float32
    torch.testing.assert_close(weights.masters["weight"], torch.full((4, 4), 0.99), rtol=1e-4, atol=0)
    torch.testing.assert_close(whole.weight.float(), torch.full((4, 4), 0.99), rtol=4e-3, atol=0)
    assert not torch.equal(whole.weight, torch.ones(4, 4, dtype=torch.bfloat16))


def test_gradients_of_micro_batches_add_up_in_float32() -> None:
    whole = nn.Linear(1, 1, bias=False)
    weights = Weights(whole, low_precision=True)
    for gradient in [1.0] + [1e-3] * 10:
        whole.weight.grad = torch.full((1, 1), gradient, dtype=torch.bfloat16)
        weights.collect_gradients()
    assert weights.masters["weight"].grad is not None
    assert weights.masters["weight"].grad.item() == pytest.approx(1.01, rel=1e-3)


def test_scalars_and_batch_norms_stay_in_float32() -> None:
    small = model(batch_norm=True)
    Weights(small, low_precision=True)
    kinds = {name: t.dtype for name, t in small.state_dict().items() if t.is_floating_point()}
    full = {name for name, kind in kinds.items() if kind == torch.float32}
    assert full == {
        "logit_scale",
        "visual.2.weight",
        "visual.2.bias",
        "visual.2.running_mean",
        "visual.2.running_var",
    }
    assert (
        small(torch.randn(4, 3, 8, 8).bfloat16(), torch.zeros(4, 6, dtype=torch.int64))[0].dtype
        == torch.bfloat16
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16"])
def test_every_precision_learns_and_saves_float32(tmp_path: Path, precision: str) -> None:
    lines = []
    given = settings(tmp_path, precision=precision, schedule={"steps": 60}, optimizer={"learning_rate": 0.01})
    small = model(dropout=0.0)
    result = fit(given, PairLoader(batch_size=16, concepts=16), small, on_step=lines.append)
    first, last = (sum(line["loss"] for line in part) / 5 for part in (lines[:5], lines[-5:]))
    assert last < 0.8 * first
    assert result.weights is not None
    assert {t.dtype for t in load_file(result.weights).values()} == {torch.float32}
    if precision == "bf16":
        assert result.checkpoint is not None
        saved = load_checkpoint(result.checkpoint).tensors["model"]
        assert torch.equal(saved["embed.weight"].bfloat16(), small.embed.weight)
        assert not torch.equal(saved["embed.weight"].bfloat16().float(), saved["embed.weight"])


def test_precisions_agree_at_the_start(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16-autocast", "bf16"):
        lines = []
        given = settings(tmp_path / precision, precision=precision, schedule={"steps": 1})
        fit(given, small=model(dropout=0.0), on_step=lines.append)
        losses[precision] = lines[0]["loss"]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16-autocast"] == pytest.approx(losses["fp32"], rel=0.03)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("low_precision", [False, True])
def test_average_warms_up(low_precision: bool) -> None:
    small = model(batch_norm=True)
    weights = Weights(small, low_precision)
    average = Average(weights, 0.9)
    value = weights.masters["embed.weight"].detach().clone().double()
    expected, statistic = value.clone(), 0.0
    for t in range(1, 200):
        with torch.no_grad():
            weights.masters["embed.weight"].add_(0.01)
            small.visual[2].running_mean.fill_(t)
            small.visual[2].num_batches_tracked.fill_(t)
        value += 0.01
        decay = min(0.9, (1 + t) / (10 + t))
        expected = decay * expected + (1 - decay) * value
        statistic = decay * statistic + (1 - decay) * t
        average.update()
    torch.testing.assert_close(average.state["embed.weight"].double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(average.state["visual.2.running_mean"], torch.full((32,), statistic))
    assert average.state["visual.2.num_batches_tracked"] == 199


@pytest.mark.parametrize("low_precision", [False, True])
@pytest.mark.parametrize("with_average", [False, True])
def test_evaluation_sees_what_would_be_loaded_and_leaves_no_trace(
    low_precision: bool, with_average: bool
) -> None:
    small = model(batch_norm=True).train()
    small.visual[4].eval()
    weights = Weights(small, low_precision)
    average = Average(weights, 0.5) if with_average else None
    with torch.no_grad():
        for p in weights.masters.values():
            p.add_(torch.randn_like(p))
    weights.publish()
    if average is not None:
        average.update()
    before = {key: t.clone() for key, t in small.state_dict().items()}
    masters = {key: t.clone() for key, t in weights.state_dict().items()}
    loaded = model(batch_norm=True).eval()
    loaded.load_state_dict(average.state if average is not None else masters)
    pixels, tokens = torch.randn(5, 3, 8, 8), torch.zeros(5, 6, dtype=torch.int64)
    with evaluating(weights, average) as evaluated, torch.no_grad():
        assert not any(m.training for m in evaluated.modules())
        for got, wanted in zip(evaluated(pixels, tokens), loaded(pixels, tokens), strict=True):
            assert torch.equal(got, wanted)
    after = small.state_dict()
    assert all(t.dtype == after[key].dtype and torch.equal(t, after[key]) for key, t in before.items())
    assert all(torch.equal(t, masters[key]) for key, t in weights.state_dict().items())
    assert small.training
    assert not small.visual[4].training


def test_tied_parameters_are_saved_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight

    assert list(Weights(Tied()).state_dict()) == ["a.weight", "a.bias", "b.bias"]


def test_wrong_names_and_shapes_are_named() -> None:
    weights = Weights(nn.Linear(2, 3))
    with pytest.raises(CheckpointError, match=r"1 missing \(bias"):
        weights.load_state_dict({"weight": torch.zeros(3, 2)})
    with pytest.raises(CheckpointError, match=r"weight must be \(3, 2\) for the model, got \(2, 2\)"):
        weights.load_state_dict({"weight": torch.zeros(2, 2), "bias": torch.zeros(3)})
    with pytest.raises(ValueError, match="weight must be float32"):
        Weights(nn.Linear(2, 3).half())
