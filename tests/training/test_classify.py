"""From pictures to a classifier that loads again, from scratch and from a checkpoint."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pymm import cli
from pymm.training import (
    CheckpointError,
    ClassifySettings,
    SettingsError,
    classify_data,
    load_run,
    probe,
    train_classify,
)
from pymm.training import clip as clip_training
from pymm.training.classify import ClassifyRun, mixed
from pymm.training.classify_data import pictures_of
from pymm.training.classify_settings import (
    BackboneSettings,
    CrossEntropySettings,
    LayerwiseSettings,
    PictureSettings,
)
from pymm.training.log import read_log
from pymm.training.probe import ProbeSettings
from pymm.training.runs import CLASSES
from pymm.training.settings import ClipSettings, DataSettings, ModelSettings
from pymm.training.task_settings import RunSettings, ScheduleSettings
from tests.data.shards import write

COLOURS = {"blue": (40, 60, 220), "green": (30, 180, 60), "red": (220, 30, 30)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures to train with and 12 to test, in three colours."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for part, n in (("train", 8), ("test", 4)):
        for name, colour in COLOURS.items():
            (root / part / name).mkdir(parents=True)
            for i in range(n):
                pixels = np.full((32, 32, 3), colour) + rng.integers(-20, 20, (32, 32, 3))
                image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
                image.save(root / part / name / f"{i}.png")
    return root


def settings(pictures: Path, out: Path, **sections: Any) -> ClassifySettings:
    base = ClassifySettings(
        model=BackboneSettings("clip_rn_tiny", image_size=32),
        data=PictureSettings(source=str(pictures), batch_size=12),
        objective=CrossEntropySettings(label_smoothing=0.1),
        optimizer=LayerwiseSettings(learning_rate=2e-3),
        schedule=ScheduleSettings(steps=8),
        run=RunSettings(out=str(out), checkpoint_every=4, log_every=1, threads=2),
    )
    changes = {
        name: replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return replace(base, **changes)


@pytest.fixture(scope="module")
def run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassifySettings, Any]:
    given = settings(pictures, tmp_path_factory.mktemp("run") / "a", schedule={"steps": 16})
    return given, train_classify(given)


def test_it_learns_and_leaves_what_it_promises(run: tuple[ClassifySettings, Any]) -> None:
    given, result = run
    out = Path(given.run.out)
    names = {"settings.json", "classes.json", "log.jsonl", "model.safetensors", "checkpoints", ".lock"}
    assert {p.name for p in out.iterdir()} == names
    assert json.loads((out / CLASSES).read_text()) == list(COLOURS)
    assert json.loads((out / "settings.json").read_text())["task"] == "classify"
    assert result.evaluation["top1"] == 1
    assert result.evaluation["pictures"] == 12
    log = read_log(out / "log.jsonl")
    assert log[-2]["loss"] < 0.7 * log[0]["loss"]
    assert "images_per_s" in log[0]
    assert "logit_scale" not in log[0]


def test_it_loads_and_scores_the_same(
    run: tuple[ClassifySettings, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given, result = run
    loaded = load_run(given.run.out)
    assert isinstance(loaded, ClassifyRun)
    assert loaded.classes == tuple(COLOURS)
    assert loaded.settings == given
    assert loaded.evaluate() == result.evaluation
    scores, picture = tmp_path / "scores.json", tmp_path / "confusion.png"
    assert cli.main(["eval", given.run.out, "--out", str(scores), "--picture", str(picture)]) == 0
    assert json.loads(scores.read_text()) == json.loads(json.dumps(result.evaluation))
    assert picture.stat().st_size > 1000
    assert "mean class accuracy" in capsys.readouterr().out
    assert cli.main(["eval", given.run.out, "--templates", "a {object}"]) == 2
    assert "templates must be left out for a run of classify" in capsys.readouterr().err
    with pytest.raises(SettingsError, match="must be a run of CLIP, got classify"):
        clip_training.load_run(given.run.out)


def test_an_interrupted_run_goes_on_to_the_same_bits(
    run: tuple[ClassifySettings, Any], pictures: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {
        "model": {"init": run[0].run.out, "freeze": 2},
        "objective": {"mixup": 0.4, "cutmix": 1.0},
        "optimizer": {"layer_decay": 0.7, "head_rate": 2.0, "ema": 0.9},
    }

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    whole = train_classify(settings(pictures, tmp_path / "a", **sections))
    broken = settings(pictures, tmp_path / "b", **sections)
    assert train_classify(broken, on_step=interrupt).status == "interrupted"
    again = train_classify(broken)
    assert again.weights.read_bytes() == whole.weights.read_bytes()  # type: ignore[union-attr]
    assert again.evaluation == whole.evaluation


def test_a_probe_moves_the_head_only_and_says_what_it_got(
    run: tuple[ClassifySettings, Any], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = settings(pictures, tmp_path, model={"init": str(run[1].weights), "freeze": "all"})
    result = train_classify(given)
    shown = capsys.readouterr().out.splitlines()[0]
    assert shown.startswith("init: ")
    assert "model.safetensors (pymm); head kept" in shown
    before, after = load_file(run[1].weights), load_file(result.weights)  # type: ignore[arg-type]
    moved = {name for name, t in after.items() if not torch.equal(t, before[name])}
    assert moved == {"head.weight", "head.bias"}  # not even the statistics of a batch norm


def test_a_run_of_clip_becomes_a_classifier(pictures: Path, tmp_path: Path) -> None:
    clip = ClipSettings(
        model=ModelSettings("clip_rn_tiny", image_size=32),
        data=DataSettings(source=("emoji:fluent",), batch_size=8, vocab_size=300, context_length=8),
        schedule=ScheduleSettings(steps=1),
        run=RunSettings(out=str(tmp_path / "clip")),
    )
    trained = clip_training.train_clip(clip)
    given = settings(pictures, tmp_path / "b", model={"init": clip.run.out, "freeze": "all"})
    tuned = load_file(train_classify(given).weights)  # type: ignore[arg-type]
    tower = load_file(trained.weights)  # type: ignore[arg-type]
    assert all(torch.equal(t, tower[f"visual.{n}"]) for n, t in tuned.items() if not n.startswith("head."))


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16"])
def test_low_precision_and_micro_batches(
    precision: str, run: tuple[ClassifySettings, Any], pictures: Path, tmp_path: Path
) -> None:
    sections: dict[str, Any] = {"data": {"micro_batch_size": 5}, "schedule": {"steps": 2}}
    given = settings(pictures, tmp_path, precision=precision, **sections)
    result = train_classify(given)
    assert {t.dtype for t in load_file(result.weights).values() if t.is_floating_point()} == {torch.float32}  # type: ignore[arg-type]
    assert load_run(result.directory).evaluate() == result.evaluation
    low, full = (read_log(Path(d) / "log.jsonl")[0]["loss"] for d in (tmp_path, run[0].run.out))
    assert low == pytest.approx(full, rel=0.1)  # a batch norm sees micro-batches


def test_the_loss_is_the_mean_over_micro_batches(pictures: Path, tmp_path: Path) -> None:
    """LeNet has no batch norm: five at a time give the gradient of all twelve."""
    losses = []
    for micro in (None, 5):
        given = settings(
            pictures,
            tmp_path / str(micro),
            model=BackboneSettings("lenet5"),
            data={"micro_batch_size": micro},
        )
        train_classify(given)
        losses.append(
            [line["loss"] for line in read_log(Path(given.run.out) / "log.jsonl") if "loss" in line]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_mixing_keeps_shares() -> None:
    torch.manual_seed(0)
    n = 6
    pixels = (torch.arange(n, dtype=torch.uint8) * 40)[:, None, None, None].expand(n, 3, 16, 16)
    targets = torch.eye(n)
    for mixup, cutmix in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        for _ in range(10):
            x, y = mixed(pixels, targets, mixup, cutmix)
            assert x.dtype == torch.uint8
            torch.testing.assert_close(y.sum(1), torch.ones(n))
            # The mean brightness says in which shares the two pictures are there.
            expected = y @ (torch.arange(n) * 40.0)
            torch.testing.assert_close(x.float().mean((1, 2, 3)), expected, atol=0.51, rtol=0)
    assert torch.equal(pixels[:, 0, 0, 0], torch.arange(n, dtype=torch.uint8) * 40)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"backbone": "resnet19"}}, "name must be one of"),
        ({"model": {"freeze": 99}}, "model.freeze must be below 6"),
        (
            {"model": {"drop_path": 0.1}},
            "model.drop_path must be 0 for clip_rn_tiny, which is no transformer",
        ),
        ({"model": {"init": "/nowhere"}}, "/nowhere does not exist"),
        ({"data": {"source": "/nowhere"}}, "/nowhere"),
        ({"data": {"batch_size": 25}}, "at least 25 per process"),
        (
            {"evaluation": {"source": ("emoji:noto",)}},
            "class of a picture must be one of the 3",
        ),
    ],
)
def test_what_does_not_fit_is_named(
    sections: dict[str, Any], message: str, pictures: Path, tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_classify(settings(pictures, tmp_path / "f", **sections))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--freeze", "-1"], 'model.freeze must be at least 0, or "all", got -1'),
        (["--model.drop-path", "1"], "model.drop_path must be in [0, 1), got 1.0"),
        (["--optimizer.layer-decay", "0"], "optimizer.layer_decay must be in (0, 1], got 0.0"),
        (["--optimizer.head-rate", "0"], "optimizer.head_rate must be positive"),
        (["--objective.mixup", "-1"], "objective.mixup must be at least 0"),
        (["--data.test-share", "1"], "data.test_share must be in (0, 1)"),
        (["--backbone", "lenet5", "--init", "/nowhere"], "/nowhere does not exist"),
    ],
)
def test_the_command_line_names_what_is_wrong(
    arguments: list[str], message: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["train", "classify", "--data.source", str(pictures), "--out", str(tmp_path / "x")]
    assert cli.main([*base, *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_classes_that_cannot_be_read(run: tuple[ClassifySettings, Any], tmp_path: Path) -> None:
    for name in ("settings.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(run[0].run.out) / name).read_bytes())
    with pytest.raises(CheckpointError, match=r"classes\.json cannot be read"):
        load_run(tmp_path)


def test_probes_of_frozen_features(
    run: tuple[ClassifySettings, Any], pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["probe", "--data.source", str(pictures), "--backbone", "clip_rn_tiny", "--model.image-size", "32"]
    out = tmp_path / "scores.json"
    assert cli.main([*base, "--init", run[0].run.out, "--out", str(out)]) == 0
    scores = json.loads(out.read_text())
    assert scores.keys() == {"knn", "ridge"}
    assert all(one["top1"] == 1 for one in scores.values())
    assert "init: " in capsys.readouterr().out
    assert cli.main([*base, "--init", "/nowhere"]) == 2


def test_a_stream_of_shards(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on to the same bits after a kill, from the classes that its directory names."""
    shards = tmp_path / "shards"
    shards.mkdir()
    files = sorted((pictures / "train").rglob("*.png"))
    for i in range(3):
        members: list[tuple[str, bytes]] = []
        for n, file in enumerate(files[i::3]):
            key = f"{i}{n:03}"
            members += [(f"{key}.png", file.read_bytes()), (f"{key}.cls", file.parent.name.encode())]
        write(shards / f"{i}.tar", members)
    data = {"source": str(shards), "batch_size": 6, "stream": "yes", "shuffle_buffer": 5, "test_share": 0.3}
    given = settings(pictures, tmp_path / "a", data=data)
    result = train_classify(given)
    assert json.loads((tmp_path / "a" / CLASSES).read_text()) == list(COLOURS)
    held = replace(given, data=replace(given.data, stream="no"))
    tested = len(pictures_of(held.data, "test"))
    assert result.evaluation["pictures"] == tested > 3
    assert load_run(tmp_path / "a").evaluate() == result.evaluation

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 6:
            raise KeyboardInterrupt

    other = replace(given, run=replace(given.run, out=str(tmp_path / "b")))
    with pytest.raises(KeyboardInterrupt):
        train_classify(other, on_step=interrupt)
    monkeypatch.setattr(classify_data, "classes_of", None)  # is not asked again
    train_classify(other)
    first, second = load_file(result.weights), load_file(tmp_path / "b" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_stream_where_pictures_are_held(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"data.shuffle_buffer must be at least 1, got 0"):
        settings(pictures, tmp_path, data={"shuffle_buffer": 0})
    probed = ProbeSettings(data=PictureSettings(source=str(pictures), stream="yes"))
    with pytest.raises(SettingsError, match=r'data.stream must be "auto" or "no" for a probe'):
        probe.run(probed)
