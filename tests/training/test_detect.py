"""From scenes to a detector that loads again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pymm import cli
from pymm.data import DetectionLoader, SceneSettings
from pymm.data.scenes_shards import WriteSettings, write_scenes
from pymm.training import DetectSettings, SettingsError, load_run, train_detect
from pymm.training.detect import DetectRun, flipped, held_out_scenes
from pymm.training.detect_settings import (
    BoxedPictureSettings,
    DetectionEvaluationSettings,
    DetectorSettings,
    RegionSampleSettings,
)
from pymm.training.task_settings import RunSettings, ScheduleSettings
from tests.data.coco import write_parts

pytest.importorskip("pycocotools")


def settings(out: Path, steps: int = 6, **run: Any) -> DetectSettings:
    return DetectSettings(
        model=DetectorSettings(image_size=64),
        data=BoxedPictureSettings(source="scenes:count=8,classes=3,size=64", batch_size=4),
        objective=RegionSampleSettings(anchors=32, regions=32),
        schedule=ScheduleSettings(steps=steps),
        evaluation=DetectionEvaluationSettings(count=4),
        run=RunSettings(out=str(out), checkpoint_every=3, log_every=1, threads=2, **run),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[DetectSettings, Any]:
    given = settings(tmp_path_factory.mktemp("detect") / "a")
    return given, train_detect(given)


def test_a_run(run: tuple[DetectSettings, Any], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given, result = run
    assert result.step == 6
    assert result.evaluation["pictures"] == 4
    lines = [json.loads(line) for line in (Path(given.run.out) / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0]
    loaded = load_run(given.run.out)
    assert isinstance(loaded, DetectRun)
    assert loaded.evaluate() == result.evaluation
    scores, picture = tmp_path / "scores.json", tmp_path / "found.png"
    assert cli.main(["eval", given.run.out, "--out", str(scores), "--picture", str(picture)]) == 0
    assert json.loads(scores.read_text()) == result.evaluation
    assert Image.open(picture).size == (4 * 128, 128)
    assert "average precision" in capsys.readouterr().out


def check_continued(given: DetectSettings, result: Any, tmp_path: Path) -> None:
    """A run that was interrupted ends in the bits of one that was not."""
    other = replace(given, run=replace(given.run, out=str(tmp_path / "again")))

    def interrupt(line: dict[str, Any]) -> None:
        if line["step"] == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_detect(other, on_step=interrupt)
    train_detect(other)
    first, second = load_file(result.weights), load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_continued_run_ends_in_the_same_bits(run: tuple[DetectSettings, Any], tmp_path: Path) -> None:
    check_continued(*run, tmp_path)


def test_shards_of_scenes(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_scenes(WriteSettings(str(shards), count=14, per_shard=5, scenes=SceneSettings(size=64, classes=3)))
    given = settings(tmp_path / "run")
    given = replace(given, data=replace(given.data, source=str(shards), workers=1))
    result = train_detect(given)
    check_continued(given, result, tmp_path)
    assert 0 < result.evaluation["pictures"] < 14
    names = json.loads((tmp_path / "run" / "classes.json").read_text())
    assert names[0] == "background"
    assert set(result.evaluation["per_class"]) <= set(names[1:])


def test_a_folder_in_coco_s_format(tmp_path: Path) -> None:
    """Pictures of different sizes, in micro-batches, tested on a part of their own."""
    data = tmp_path / "coco"
    _, tested = write_parts(data, (8, 3))
    given = settings(tmp_path / "run")
    given = replace(given, data=replace(given.data, source=str(data), micro_batch_size=3))
    result = train_detect(given)
    check_continued(given, result, tmp_path)
    assert result.evaluation["pictures"] == 3
    objects = sum(not one["iscrowd"] for one in tested["annotations"])
    assert result.evaluation["objects"] == objects
    picture = tmp_path / "found.png"
    assert cli.main(["eval", str(tmp_path / "run"), "--picture", str(picture)]) == 0
    assert Image.open(picture).size[0] % 4 == 0
    other = replace(given.evaluation, source=str(data / "annotations" / "instances_train2017.json"))
    loaded = load_run(tmp_path / "run")
    assert isinstance(loaded, DetectRun)
    assert replace(loaded, settings=replace(given, evaluation=other)).evaluate()["pictures"] == 8
    data.rename(tmp_path / "away")  # the model needs no data
    assert load_run(tmp_path / "run").classes == ("background", "cat", "dog", "bird")


def test_tested_scenes_are_other_scenes() -> None:
    given = settings(Path("x"))
    assert held_out_scenes(given).start >= 8
    overlapping = replace(given, evaluation=DetectionEvaluationSettings(start=4))
    with pytest.raises(SettingsError, match=r"evaluation.start must be beyond the 8 scenes"):
        held_out_scenes(overlapping)


def test_batches_are_a_function_of_seed_and_epoch() -> None:
    scenes = held_out_scenes(settings(Path("x")))
    loader = DetectionLoader(scenes, 2, range(2), seed=3)
    ids = [b.ids.tolist() for b in loader.epoch(0)]
    assert sorted(i for part in ids for i in part) == [0, 1, 2, 3]
    assert [b.ids.tolist() for b in loader.epoch(0, skip=1)] == ids[1:]
    halves = [DetectionLoader(scenes, 2, range(i, i + 1), seed=3) for i in range(2)]
    shares = [[b.ids.tolist() for b in half.epoch(0)] for half in halves]
    assert [a + b for a, b in zip(*shares, strict=True)] == ids
    with pytest.raises(ValueError, match="at least 5 pictures, one batch, got 4"):
        DetectionLoader(scenes, 5, range(5), seed=0)


def test_flipped() -> None:
    boxes = torch.tensor([[1.0, 2, 5, 6]])
    assert flipped(boxes, 20).tolist() == [[15, 2, 19, 6]]
    assert torch.equal(flipped(flipped(boxes, 20), 20), boxes)


def test_a_model_that_is_no_detector(tmp_path: Path) -> None:
    given = replace(settings(tmp_path), model=DetectorSettings("resnet18"))
    with pytest.raises(SettingsError, match=r"model.name must be a detector that proposes regions"):
        train_detect(given)
