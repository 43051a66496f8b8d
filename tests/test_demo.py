"""The demo from end to end, with a few steps: its files, its numbers, and that they repeat."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pymm import demo
from pymm.commands import EvalSettings, evaluate
from pymm.demo import DemoSettings
from pymm.training.clip import train_clip
from pymm.training.log import LOG, read_log
from pymm.training.settings import EvaluationSettings

pytest.importorskip("matplotlib")


def _run(out: Path) -> dict[str, Any]:
    assert demo.run(DemoSettings(out=str(out), quick=True, threads=1, max_seconds=1e6)) == 0
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("demo")
    return out, _run(out)


def test_metrics_hold_the_table(ran: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = ran
    for table in (metrics["unseen_style"], metrics["before_training"]):
        assert (table["seen_concepts"]["queries"], table["seen_concepts"]["candidates"]) == (1667, 1852)
        assert (table["unseen_concepts"]["queries"], table["unseen_concepts"]["candidates"]) == (185, 185)
        for part in (table["seen_concepts"], table["unseen_concepts"]):
            assert 0 <= part["r1"] <= part["r5"] <= 1
            assert part["chance_r1"] == pytest.approx(1 / part["candidates"])
    assert metrics["run"]["steps"] == demo.QUICK_STEPS
    assert {"linear", "attention", "info_nce", "cosine_topk"} <= metrics["run"]["kernels"].keys()


def test_files(ran: tuple[Path, dict[str, Any]]) -> None:
    out, _ = ran
    for name in ("settings.json", "tokenizer.json", "log.jsonl", "model.safetensors"):
        assert (out / name).stat().st_size > 0
    for name in ("loss.png", "retrievals.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 500


def test_eval_gives_the_same_numbers(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, metrics = ran
    file = tmp_path / "scores.json"
    assert evaluate(EvalSettings(str(out), threads=1, out=str(file))) == 0
    assert json.loads(file.read_text()) == metrics["unseen_style"]


def test_repeats(ran: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, metrics = ran
    again = _run(tmp_path / "again")
    assert again["unseen_style"] == metrics["unseen_style"]
    weights = (tmp_path / "again" / "model.safetensors").read_bytes()
    assert weights == (out / "model.safetensors").read_bytes()


def test_the_recipe_learns(tmp_path: Path) -> None:
    """Thirty steps with the demo's own settings end below the loss of a guess among the batch."""
    recipe = demo.recipe(DemoSettings(out=str(tmp_path), steps=30, threads=1, max_seconds=1e6))
    train_clip(
        replace(recipe, run=replace(recipe.run, log_every=1), evaluation=EvaluationSettings(source=()))
    )
    losses = [line["loss"] for line in read_log(tmp_path / LOG)]
    assert len(losses) == 30
    assert sum(losses[-5:]) / 5 < math.log(recipe.data.batch_size) - 0.1
