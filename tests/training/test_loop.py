from __future__ import annotations

import builtins
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pymm.training import display as shown
from pymm.training.checkpoint import list_checkpoints
from pymm.training.errors import NonFiniteError, TrainingError
from pymm.training.log import Log, read_log
from tests.training.small import PairLoader, Pairs, fit, model, settings


class Poisoned(PairLoader):
    """Holds a NaN in one batch."""

    def batch(self, epoch: int, number: int) -> Pairs:
        pairs = super().batch(epoch, number)
        if (epoch, number) == (1, 2):
            pairs.pixels[3, 0, 0, 0] = float("nan")
        return pairs


def test_a_loss_that_is_not_finite_stops_and_leaves_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match="training: step 8: the loss is nan") as error:
        fit(settings(tmp_path), Poisoned())
    text = str(error.value)
    assert "learning rate" in text
    assert str(tmp_path / "checkpoints/step_00000005") in text
    assert [p.name for p in list_checkpoints(tmp_path / "checkpoints")] == ["step_00000005"]
    assert not (tmp_path / "model.safetensors").exists()
    assert read_log(tmp_path / "log.jsonl")[-1]["step"] == 7
    fit(settings(tmp_path))  # and the data mended, it goes on
    fit(settings(tmp_path / "whole"))
    assert (tmp_path / "model.safetensors").read_bytes() == (
        tmp_path / "whole/model.safetensors"
    ).read_bytes()


def test_a_gradient_that_is_not_finite_stops_too(tmp_path: Path) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g * float("inf")

    def forward(small: Any, batch: Pairs) -> Any:
        image, text, scale = small(batch.pixels, batch.tokens)
        return image, Bad.apply(text), scale

    small = model()
    before = {key: t.clone() for key, t in small.state_dict().items()}
    with pytest.raises(
        NonFiniteError, match=r"step 1: the loss is \d.*gradient is not finite \(.*there is no checkpoint"
    ):
        fit(settings(tmp_path), small=small, forward=forward)
    assert all(torch.equal(t, before[key]) for key, t in small.state_dict().items())


def test_a_loader_without_batches_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="at least one batch per epoch, got none"):
        fit(settings(tmp_path), PairLoader(batches=0))


def test_the_log_holds_what_was_done(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    fit(settings(tmp_path, run={"log_every": 5}), on_step=seen.append)
    lines = read_log(tmp_path / "log.jsonl")
    assert [line["step"] for line in lines] == [1, 5, 10, 12]
    assert lines == [seen[i] for i in (0, 4, 9, 11)]
    names = {"step", "epoch", "loss", "learning_rate", "grad_norm", "logit_scale", "pairs_per_s", "elapsed_s"}
    assert set(lines[0]) == names
    assert [line["epoch"] for line in seen] == [0] * 5 + [1] * 5 + [2] * 2


def test_the_loader_is_closed_when_the_run_ends(tmp_path: Path) -> None:
    closed = []

    class Closing(PairLoader):
        def epoch(self, epoch: int, skip: int = 0) -> Iterator[Pairs]:
            try:
                yield from super().epoch(epoch, skip)
            finally:
                closed.append(epoch)

    fit(settings(tmp_path), Closing())
    assert closed == [0, 1, 2]


def test_a_log_that_was_cut_off_is_mended(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    for step in range(1, 6):
        log.write({"step": step})
    log.close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1, 2, 3, 4, 5]
    log = Log(tmp_path, 3)
    log.write({"step": 4, "again": True})
    log.close()
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3},
        {"step": 4, "again": True},
    ]


def test_tensorboard_gets_the_numbers(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = settings(tmp_path, run={"tensorboard": True, "evaluate_every": 6})
    fit(given, evaluate=lambda small, step: {"r1": step / 100})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    losses = [line["loss"] for line in read_log(tmp_path / "log.jsonl") if "loss" in line]
    assert [e.value for e in events.Scalars("train/loss")] == pytest.approx(losses)
    assert [(e.step, e.value) for e in events.Scalars("evaluation/r1")] == [
        (6, pytest.approx(0.06)),
        (12, pytest.approx(0.12)),
    ]


def test_tensorboard_missing_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("tensorboard", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("tensorboard"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"needs TensorBoard: pip install 'pymm\[log\]'"):
        fit(settings(tmp_path, run={"tensorboard": True}))


def test_plain_lines_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(settings(tmp_path, run={"log_every": 6}))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["1", "6", "12"]
    for part in ("loss ", "pairs/s", "left"):
        assert all(part in line for line in lines)
    assert "\x1b" not in "".join(lines)


def test_a_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    fit(settings(tmp_path, run={"evaluate_every": 6}), evaluate=lambda small, step: {"r1": 0.5})
    text = capsys.readouterr().out
    assert "100%" in text
    assert "step 12" in text
    assert "r1 0.5" in text
    assert "\x1b[" in text


def test_rate_and_clock() -> None:
    rate = shown.Rate(100.0)
    assert rate(101.0, 50) == pytest.approx(50)
    for second in range(102, 200):
        pace = rate(float(second), 10)
    assert pace == pytest.approx(10)
    assert [shown.clock(s) for s in (0, 61, 3599.6, 90061)] == ["0:00", "1:01", "1:00:00", "25:01:01"]


def test_micro_batches_train_like_the_whole_batch(tmp_path: Path) -> None:
    weights = []
    for name, micro in (("whole", None), ("micro", 3)):
        small = model(dropout=0.0)
        fit(settings(tmp_path / name, data={"micro_batch_size": micro}), small=small)
        weights.append(small.state_dict())
    for key, t in weights[0].items():
        torch.testing.assert_close(weights[1][key], t, rtol=1e-3, atol=1e-4, msg=key)


def test_a_run_leaves_torch_as_it_was(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert not torch.are_deterministic_algorithms_enabled()
    inside = []
    given = settings(tmp_path)
    fit(
        replace(given, run=replace(given.run, threads=1)),
        on_step=lambda line: inside.append(torch.get_num_threads()),
    )
    assert set(inside) == {1}
    assert torch.get_num_threads() == threads
    assert not torch.are_deterministic_algorithms_enabled()
