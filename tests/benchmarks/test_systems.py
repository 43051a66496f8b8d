"""The results table: its rows are commands that parse, the committed table is that of the scores there."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image

from pymm import cli
from pymm.benchmarks import systems_command
from pymm.benchmarks.systems import ROWS, Baseline, System
from pymm.benchmarks.systems_baselines import logistic_on_pixels, neighbours_on_pixels
from pymm.benchmarks.systems_command import Judged, Result, ResultsSettings, load, render, run, save
from pymm.benchmarks.systems_detection import ap50_of_one_name
from pymm.training.detect_settings import BoxedPictureSettings, DetectionEvaluationSettings, DetectSettings
from pymm.training.rundir import SETTINGS
from pymm.training.settings_file import to_json
from pymm.training.tasks import find_task, imported

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_rows_are_commands_that_parse(row: System) -> None:
    assert (row.baseline.score is None) != (not row.baseline.train)
    for words in filter(None, (row.train, row.baseline.train)):
        settings = imported(find_task(words[0]).settings)
        tyro.cli(settings, args=[*words[1:], "--schedule.max-seconds", "9", "--out", "x"])


def test_names_are_different_and_what_is_needed_is_there() -> None:
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    for row in ROWS:
        if row.needs is not None:
            assert names.index(row.needs) < names.index(row.name)
            assert any(f"{{runs}}/{row.needs}" in word for word in row.train)


def test_the_committed_table_is_that_of_the_committed_scores() -> None:
    results = load(ROOT / "benchmarks/results/systems.json")
    assert results
    assert (ROOT / "benchmarks/systems.md").read_text(encoding="utf-8") == render(results)
    assert {one.name for one in results} <= {row.name for row in ROWS}


def result(name: str = "a", ours: float = 0.9, other: float = 0.8, steps: int = 10) -> Result:
    machine = {"processor": "P", "cores": 2, "threads": 1, "instruction_set": "avx2", "torch": "2"}
    judged = Judged(ours, 12.0, steps, 10, 1_500_000)
    return Result(
        name, "S", "D", "top1", "pymm train x", "B", judged, Judged(other, 1.0), "2026-11-25", machine
    )


def test_a_table_prints_losses_as_they_are() -> None:
    text = render([result(), result("b", 0.7), result("c", steps=4)])
    assert "| S | D | top1 | **0.900** | 0.800 | B | 1.50 M | 12 s |" in text
    assert "| S | D | top1 | 0.700 | **0.800** | B | 1.50 M | 12 s |" in text
    assert "12 s, cut at step 4 of 10" in text
    disturbed = replace(result(), pymm=replace(result().pymm, others=0.4))
    assert "12 s, 40% of the processor taken by others" in render([disturbed])
    assert "Measured on P, 2 cores, 1 threads, avx2, torch 2, 2026-11-25: a, b, c." in text


def test_files_of_results(tmp_path: Path) -> None:
    path = tmp_path / "new" / "r.json"
    save(path, [result(), result("b")])
    assert load(path) == [result(), result("b")]
    assert load(tmp_path / "nothing") == []
    for text, message in (
        ('{"format": 99, "rows": []}', "of format 1, got 99"),
        ("[]", "must be a file of results"),
        ('{"format": 1, "rows": [{"name": "x"}]}', "must be a file of results"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Pictures that are light on one side."""
    root, rng = tmp_path / "pictures", np.random.default_rng(0)
    for kind, side in (("left", slice(16)), ("right", slice(16, 32))):
        (root / kind).mkdir(parents=True)
        for i in range(24):
            grey = rng.integers(0, 40, (32, 32, 1))
            grey[:, side] += 150
            Image.fromarray(np.repeat(grey, 3, 2).astype(np.uint8)).save(root / kind / f"{i}.png")
    return root


def test_commands_run_in_a_process_of_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    systems_command._pymm("list", "lenet5")
    assert "lenet5" in capfd.readouterr().out
    with pytest.raises(subprocess.CalledProcessError):
        systems_command._pymm("list", "nothing*")


def test_rows_are_trained_judged_and_kept(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    words = f"classify --backbone lenet5 --data.source {pictures} --data.batch-size 8".split()
    steps = ["--schedule.steps", "20", "--optimizer.learning-rate", "0.01"]
    first = System("one", "LeNet-5", "halves", (*words, *steps), Baseline("logistic", logistic_on_pixels))
    second = replace(
        first,
        name="two",
        train=(*words, *steps, "--init", "{runs}/one"),
        baseline=Baseline("from scratch", train=(*words, "--schedule.steps", "1")),
        metric="per_class.left.accuracy",
        needs="one",
    )
    judged = replace(first, name="judged", metric="letters", judge=lambda run: float(len(run.name)))
    broken = replace(first, name="broken", train=(*words, "--backbone", "nothing"))
    absent = replace(first, name="absent", train=(*words[:4], "fashion-mnist:{fashion}"))

    def in_this_process(*arguments: str) -> None:  # a new one spends its time on importing
        if code := cli.main(arguments):
            raise subprocess.CalledProcessError(code, [sys.executable, "-m", "pymm.cli", *arguments])

    monkeypatch.setattr(systems_command, "_pymm", in_this_process)
    monkeypatch.setattr(systems_command, "ROWS", (first, second, judged, broken, absent))
    settings = ResultsSettings(
        runs=str(tmp_path / "runs"),
        out=str(tmp_path / "r.json"),
        table=str(tmp_path / "r.md"),
        fashion_mnist=str(tmp_path / "nowhere"),
        threads=1,
    )
    assert run(replace(settings, names=("two", "absent"))) == 0  # trains what it needs
    assert run(replace(settings, names=("one", "judged", "broken"))) == 1
    shown = capfd.readouterr().out
    assert "absent: left out" in shown
    assert "broken: pymm.cli train classify" in shown
    kept: Any = {one.name: one for one in load(tmp_path / "r.json")}
    assert list(kept) == ["one", "two", "judged"]
    assert kept["judged"].pymm.score == len("judged")
    assert kept["one"].pymm.score == kept["one"].other.score == 1
    assert (kept["one"].pymm.steps, kept["one"].pymm.parameters) == (20, 61_026)
    assert kept["two"].other.steps == 1
    assert (tmp_path / "r.md").read_text(encoding="utf-8") == render(list(kept.values()))
    assert neighbours_on_pixels(tmp_path / "runs" / "one") == 1
    with pytest.raises(ValueError, match="names must be among one, two, judged, broken, absent, got 'three'"):
        run(replace(settings, names=("three",)))
    assert run(replace(settings, list=True)) == 0


@pytest.mark.parametrize("classes", [1, 4])
def test_one_name_for_all_boxes_is_right_where_there_is_one(tmp_path: Path, classes: int) -> None:
    pytest.importorskip("pycocotools")
    settings = DetectSettings(
        data=BoxedPictureSettings(source=f"scenes:count=30,classes={classes},size=64"),
        evaluation=DetectionEvaluationSettings(count=10),
    )
    (tmp_path / SETTINGS).write_text(to_json(settings))
    score = ap50_of_one_name(tmp_path)
    assert score == pytest.approx(1) if classes == 1 else 0 < score < 0.5
