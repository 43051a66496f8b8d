from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from pymm.training.errors import CheckpointError
from pymm.training.optimizer import (
    build_optimizer,
    clamp_logit_scale,
    gradient_norm,
    is_decayed,
    load_optimizer_state,
    optimizer_state,
    parameter_groups,
    progress,
    rate_factor,
    share_done,
)
from pymm.training.settings import OptimizerSettings, ScheduleSettings
from pymm.training.weights import Weights
from tests.training.small import SmallClip, fit, model, settings


@pytest.mark.parametrize(
    ("name", "shape", "decayed"),
    [
        ("visual.blocks.0.mlp.fc1.weight", (4, 4), True),
        ("visual.embed.weight", (4, 3, 2, 2), True),
        ("text.embed.weight", (9, 4), True),
        ("visual.blocks.0.mlp.fc1.bias", (4,), False),
        ("visual.norm.weight", (4,), False),
        ("logit_scale", (), False),
        ("visual.class_embedding", (1, 4), False),
        ("cls_token", (1, 1, 4), False),
        ("visual.positional_embedding", (5, 4), False),
        ("pos_embed", (1, 5, 4), False),
        ("embed.position", (5, 4), False),
        ("mask_token", (1, 1, 4), False),
        ("relative_position_bias_table", (9, 4), False),
        ("attn.q_bias", (2, 4), False),
        ("listed", (4, 4), False),
    ],
)
def test_exclusions_from_decay(name: str, shape: tuple[int, ...], decayed: bool) -> None:
    assert is_decayed(name, torch.zeros(shape), {"listed"}) is decayed


def test_groups_hold_every_parameter_once_and_ask_the_parts() -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.weight = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2, 2))

        def no_weight_decay(self) -> set[str]:
            return {"table"}

    whole = nn.Sequential(Part(), nn.Linear(2, 2))
    named = dict(whole.named_parameters())
    decayed, rest = parameter_groups(whole, named, 0.1)
    names = {id(p): name for name, p in named.items()}
    assert [names[id(p)] for p in decayed["params"]] == ["0.weight", "1.weight"]  # type: ignore[attr-defined]
    assert [names[id(p)] for p in rest["params"]] == ["0.table", "1.bias"]  # type: ignore[attr-defined]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_shares_of_the_learning_rate_make_groups() -> None:
    whole = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    named = dict(whole.named_parameters())
    groups = parameter_groups(whole, named, 0.1, {"0.weight": 0.25, "0.bias": 0.25})
    assert [(g["rate"], g["weight_decay"]) for g in groups] == [(1, 0.1), (1, 0), (0.25, 0.1), (0.25, 0)]
    assert sum(len(g["params"]) for g in groups) == 4  # type: ignore[arg-type]


def test_training_follows_the_shares_and_leaves_the_frozen_alone(tmp_path: Path) -> None:
    def moved(directory: str, rates: dict[str, float]) -> tuple[nn.Module, dict[str, float]]:
        small = model(batch_norm=True)
        small.visual.requires_grad_(False)
        before = {name: t.clone() for name, t in small.state_dict().items()}
        given = settings(
            tmp_path / directory,
            schedule={"steps": 1, "warmup": 0.0},
            optimizer={"weight_decay": 0.0, "ema": None},
        )
        fit(given, small=small, rates=rates)
        after = small.state_dict()
        return small, {name: (after[name] - t).abs().max().item() for name, t in before.items()}

    small, whole = moved("a", {})
    _, tenth = moved("b", {"text.0.weight": 0.1})
    assert tenth["text.0.weight"] == pytest.approx(0.1 * whole["text.0.weight"], rel=1e-3)
    assert tenth["text.3.weight"] == pytest.approx(whole["text.3.weight"], rel=1e-3)
    # Frozen: neither weights nor running statistics move, and dropout rests.
    assert all(change == 0 for name, change in whole.items() if name.startswith("visual."))
    assert not any(module.training for module in small.visual.modules())
    assert small.text.training


def test_decay_shrinks_what_it_should_and_nothing_else() -> None:
    whole = SmallClip()
    weights = Weights(whole)
    optimizer = build_optimizer(weights, OptimizerSettings(learning_rate=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in whole.named_parameters()}
    for p in whole.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrunk = {name for name, p in whole.named_parameters() if not torch.equal(p, before[name])}
    assert shrunk == {"visual.1.weight", "visual.5.weight", "embed.weight", "text.0.weight", "text.3.weight"}
    torch.testing.assert_close(whole.embed.weight, before["embed.weight"] * 0.95)


def test_rate_by_steps() -> None:
    schedule = ScheduleSettings(steps=100, warmup=0.1, floor=0.1)
    rates = [rate_factor(progress(step, 0.0, schedule), schedule) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[10] == 1
    assert rates[55] == pytest.approx(0.1 + 0.9 * 0.5)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[99] == pytest.approx(0.1, abs=1e-3)
    assert rate_factor(1.0, schedule) == pytest.approx(0.1)
    flat = replace(schedule, warmup=0.0)
    assert rate_factor(0.0, flat) == 1


def test_progress_by_steps_and_by_time() -> None:
    both = ScheduleSettings(steps=100, max_seconds=10.0)
    assert share_done(10, 5.0, both) == 0.5
    assert share_done(80, 5.0, both) == 0.8
    assert share_done(300, 0.0, both) == share_done(0, 11.0, both) == 1
    assert progress(10, 5.0, both) == 0.1
    assert progress(10, 9.0, both) == pytest.approx(0.8)
    assert progress(10, 10.0, both) == progress(100, 1.0, both) == 1
    by_time = ScheduleSettings(steps=None, max_seconds=10.0)
    assert progress(300, 2.5, by_time) == share_done(300, 2.5, by_time) == 0.25


def test_a_run_ahead_of_its_budget_is_driven_by_steps_alone() -> None:
    both, steps_only = ScheduleSettings(steps=100, max_seconds=10.0), ScheduleSettings(steps=100)
    for step in range(100):
        elapsed = 0.5 + 9.0 * step / 100  # half a second to begin with, and 9.5 of 10 in all
        assert progress(step, elapsed, both) == progress(step, 0.0, steps_only)


def test_time_budget_ends_the_run(tmp_path: Path) -> None:
    given = settings(tmp_path, schedule={"steps": None, "max_seconds": 1.0, "floor": 0.0})
    lines: list[dict[str, float]] = []
    result = fit(given, on_step=lines.append)
    assert result.status == "completed"
    assert 1.0 <= result.elapsed_s < 2.0
    assert result.step == len(lines) > 12
    rates = [line["learning_rate"] for line in lines]
    assert max(rates) <= 3e-3
    assert rates[-1] < 0.1 * max(rates)


def test_a_budget_that_is_too_short_brings_the_rate_down(tmp_path: Path) -> None:
    given = settings(tmp_path, schedule={"steps": 100_000, "max_seconds": 1.0, "warmup": 0.0})
    lines: list[dict[str, float]] = []
    result = fit(given, on_step=lines.append)
    assert result.status == "completed"
    assert 12 < result.step < 100_000
    rates = [line["learning_rate"] for line in lines]
    assert rates[0] == 3e-3
    assert rates[-1] < 3e-4
    assert rates == sorted(rates, reverse=True)


def test_clipping_and_its_norm() -> None:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(2))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 3.0), torch.full((4,), -2.0)
    expected = math.sqrt(3 * 9 + 4 * 4)
    assert gradient_norm(parameters, None).item() == pytest.approx(expected)
    assert gradient_norm(parameters, 1.0).item() == pytest.approx(expected)
    assert gradient_norm(parameters, 10.0).item() == pytest.approx(1.0, rel=1e-4)
    parameters[0].grad[0] = float("nan")
    before = parameters[1].grad.clone()
    assert not gradient_norm(parameters, 1e-3).isfinite()
    assert torch.equal(parameters[1].grad, before)


def test_logit_scale_is_clamped_through_training(tmp_path: Path) -> None:
    lines: list[dict[str, float]] = []
    fit(settings(tmp_path, optimizer={"max_logit_scale": 10.0}), on_step=lines.append)  # it begins at 14.3
    assert lines[0]["logit_scale"] == pytest.approx(10.0, rel=1e-5)
    assert max(line["logit_scale"] for line in lines) <= 10.0001
    p = {"logit_scale": nn.Parameter(torch.tensor(50.0))}
    clamp_logit_scale(p, 100.0)
    assert p["logit_scale"].item() == pytest.approx(math.log(100))


def test_state_round_trip_and_its_errors() -> None:
    first, second = model(), model()
    optimizers = []
    for small in (first, second):
        optimizers.append(build_optimizer(Weights(small), OptimizerSettings()))
    for p in first.parameters():
        p.grad = torch.randn_like(p)
    first.logit_scale.grad = None
    optimizers[0].step()
    state = optimizer_state(optimizers[0], dict(first.named_parameters()))
    assert "exp_avg.logit_scale" not in state
    load_optimizer_state(optimizers[1], dict(second.named_parameters()), state)
    again = optimizer_state(optimizers[1], dict(second.named_parameters()))
    assert state.keys() == again.keys()
    assert all(torch.equal(state[key], again[key]) for key in state)
    with pytest.raises(CheckpointError, match="unknown"):
        load_optimizer_state(optimizers[1], {"logit_scale": second.logit_scale}, state)
