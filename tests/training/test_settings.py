from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tyro

from pymm.training.errors import SettingsError
from pymm.training.settings import AugmentSettings, ClipSettings, DataSettings, changed
from pymm.training.settings_file import from_dict, load_settings, to_json


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


def test_settings_do_not_change() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataSettings().batch_size = 1  # type: ignore[misc]
