from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import tyro

from pymm.training.errors import SettingsError
from pymm.training.runs import Run
from pymm.training.settings import AugmentSettings, ClipSettings, DataSettings, changed
from pymm.training.settings_file import from_dict, load_settings, task_in, to_json
from pymm.training.task_settings import AdamWSettings, TaskSettings
from pymm.training.tasks import TASKS, Task, find_task, imported


def parse(*arguments: str) -> ClipSettings:
    return tyro.cli(ClipSettings, args=arguments)


def test_file_and_back(tmp_path: Path) -> None:
    given = parse(
        *("--model.image-size", "48", "--data.source", "a.tar", "b.tar", "--optimizer.betas", "0.8", "0.9"),
        *(
            "--data.augment.random-background",
            "0.5",
            "--schedule.steps",
            "None",
            "--schedule.max-seconds",
            "5",
        ),
        *("--precision", "bf16", "--out", "here", "--objective.no-use-ids"),
    )
    assert given.data.source == ("a.tar", "b.tar")
    assert given.run.out == "here"
    assert given.objective.use_ids is False
    (tmp_path / "settings.json").write_text(to_json(given))
    assert load_settings(ClipSettings, tmp_path / "settings.json") == given
    assert from_dict(ClipSettings, {}) == ClipSettings()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"optimizer": {"learning_rat": 1}},
            "unknown key optimizer.learning_rat; nearest: optimizer.learning_rate",
        ),
        ({"modle": {}}, "unknown key modle; nearest: model"),
        ({"run": {"zzzz": 1}}, "unknown key run.zzzz; valid: run.checkpoint_every, run.device"),
        ({"schedule": {"steps": "many"}}, "schedule.steps must be of type int, got 'many'"),
        ({"schedule": {"steps": True}}, "schedule.steps must be of type int, got True"),
        ({"optimizer": {"learning_rate": "1e-3"}}, "optimizer.learning_rate must be of type float"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas must be a list of 2"),
        ({"data": {"source": "emoji:noto"}}, "data.source must be a list, got 'emoji:noto'"),
        ({"data": {"source": [1]}}, r"data.source\[0\] must be of type str, got 1"),
        ({"precision": "fp8"}, "precision must be one of 'fp32', 'bf16-autocast', 'bf16', got 'fp8'"),
        ({"model": 3}, "model must be an object, got 3"),
        ({"optimizer": {"learning_rate": -1.0}}, "optimizer.learning_rate must be positive, got -1.0"),
        ({"schedule": {"steps": None}}, "schedule.steps must be given where max_seconds is not"),
        ({"data": {"holdout": 1.0}}, r"data.holdout must be in \[0, 1\), got 1.0"),
        ({"run": {"keep": 0}}, "run.keep must be at least 1, got 0"),
        ([], "settings must be an object"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, values: Any, message: str) -> None:
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(values))
    with pytest.raises(SettingsError, match=message):
        load_settings(ClipSettings, path)


def test_no_json_and_no_file(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(SettingsError, match=r"settings\.json: not JSON"):
        load_settings(ClipSettings, tmp_path / "settings.json")
    with pytest.raises(FileNotFoundError):
        load_settings(ClipSettings, tmp_path / "nothing.json")


def test_a_missing_key_without_default_is_named() -> None:
    @dataclasses.dataclass(frozen=True)
    class Needs:
        name: str

    with pytest.raises(SettingsError, match="the key name is missing"):
        from_dict(Needs, {})


def test_changed_names_what_matters() -> None:
    before = parse("--out", "a", "--seed", "1")
    after = parse("--out", "b", "--seed", "2", "--run.log-every", "3", "--data.batch-size", "4")
    assert changed(before, after) == [("data.batch_size", 256, 4), ("run.seed", 1, 2)]
    assert [key for key, _, _ in changed(before, after, ignore_free=False)] == [
        "data.batch_size",
        "run.out",
        "run.seed",
        "run.log_every",
    ]


def test_every_setting_says_what_it_does() -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, tyro; from pymm.training.settings import ClipSettings; "
            "assert 'torch' not in sys.modules; tyro.cli(ClipSettings, args=['--help'])",
        ],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    for section in ("model", "data", "optimizer", "schedule", "run"):
        for f in dataclasses.fields(type(getattr(ClipSettings(), section))):
            assert f"{f.name.replace('_', '-')}" in done.stdout


def test_augmentation_is_what_the_transform_takes() -> None:
    from pymm.data import TrainTransform

    taken = {f.name: f.default for f in dataclasses.fields(TrainTransform)}
    ours = {f.name: f.default for f in dataclasses.fields(AugmentSettings)}
    assert taken.keys() - ours.keys() == {"size", "mean", "std", "output"}
    assert ours == {name: taken[name] for name in ours}


@dataclasses.dataclass(frozen=True)
class OtherSettings(TaskSettings):
    """Of a task that is not CLIP, and has other defaults inside a section."""

    task: ClassVar[str] = "other"
    optimizer: AdamWSettings = dataclasses.field(default_factory=lambda: AdamWSettings(learning_rate=0.5))


def test_a_file_names_its_task(tmp_path: Path) -> None:
    clip, other = tmp_path / "clip.json", tmp_path / "other.json"
    clip.write_text(to_json(ClipSettings()))
    other.write_text(to_json(OtherSettings()))
    assert "task" not in json.loads(clip.read_text())  # as files from before there were tasks
    assert (task_in(clip), task_in(other)) == ("clip", "other")
    assert load_settings(OtherSettings, other) == OtherSettings()
    with pytest.raises(SettingsError, match="settings must be of the task clip, got other"):
        load_settings(ClipSettings, other)
    with pytest.raises(SettingsError, match="task must be one of clip"):
        find_task("other")
    assert (OtherSettings().run.out, ClipSettings().run.out) == ("runs/other", "runs/clip")


def test_a_part_of_a_section_leaves_the_task_its_defaults() -> None:
    given = from_dict(OtherSettings, {"optimizer": {"weight_decay": 0.0}})
    assert given.optimizer == AdamWSettings(learning_rate=0.5, weight_decay=0.0)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_rows_of_tasks_name_what_is_there(task: Task) -> None:
    settings = imported(task.settings)
    assert settings.task == task.name
    assert issubclass(settings, TaskSettings)
    assert issubclass(imported(task.run), Run)
    assert callable(imported(task.train))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"import sys, {task.settings.partition(':')[0]}; assert 'torch' not in sys.modules",
        ],
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataSettings().batch_size = 1  # type: ignore[misc]
