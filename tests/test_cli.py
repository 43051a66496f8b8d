from __future__ import annotations

import dataclasses
import importlib
import os
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest

from pymm import cli
from pymm.training.errors import NonFiniteError
from pymm.training.settings import ClipSettings, ModelSettings, RunSettings
from pymm.training.settings_file import to_json

ROOT = Path(__file__).parents[1]


def run(
    *arguments: str, code: str = "from pymm.cli import main; sys.exit(main(sys.argv[1:]))", **environment: str
) -> Any:
    return subprocess.run(
        [sys.executable, "-c", f"import sys; {code}", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
    )


def test_help_names_the_commands_and_imports_nothing_heavy() -> None:
    code = (
        "from pymm.cli import main; main(['--help']); "
        "heavy = {'torch', 'numpy', 'tokenizers'} & sys.modules.keys(); assert not heavy, heavy"
    )
    done = run(code=code)
    assert done.returncode == 0, done.stderr
    for words in ("train clip", "eval", "detect", "data scenes", "list", "doctor", "bench", "demo"):
        assert words in done.stdout


def test_train_help_shows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "clip", "--help"]) == 0
    shown = capsys.readouterr().out
    for option in ("--model.name", "--data.source", "--out", "--seed", "--resume", "--precision"):
        assert option in shown


@pytest.mark.parametrize(
    "arguments",
    [["trian"], ["train"], ["train", "clip", "--optimizer.learning-rat", "1"], ["list", "a", "b"], ["eval"]],
)
def test_wrong_arguments_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments) == 2
    assert capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from pymm import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"pymm {__version__}\n"


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "clip_tiny*"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["clip_tiny", "clip_tiny_bert", "clip_tiny_sigmoid"]
    assert "1.7 M" in lines[0]
    assert cli.main(["list", "nothing*"]) == 1


def test_an_error_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"pymm: load_run: {tmp_path / 'nothing'} does not exist\n"


def test_an_error_of_settings_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "clip", "--schedule.warmup", "2"]) == 2
    assert "schedule.warmup must be in [0, 1), got 2.0" in " ".join(capsys.readouterr().err.split())


def test_traceback_on_request(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYMM_TRACEBACK", "1")
    assert cli.main(["eval", str(tmp_path / "nothing")]) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "trace"), [(NonFiniteError("nan"), 2, False), (KeyError("bug"), 1, True)]
)
def test_errors_that_are_not_the_users_show_where(
    error: Exception,
    code: int,
    trace: bool,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(settings: object) -> int:
        raise error

    monkeypatch.setattr("pymm.training.clip.train_clip", fail)
    assert cli.main(["train", "clip"]) == code
    assert ("Traceback" in capsys.readouterr().err) == trace


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[ClipSettings]:
    """The settings that training is called with, in place of training."""
    from pymm.training.loop import RunResult

    seen: list[ClipSettings] = []

    def train(settings: ClipSettings) -> RunResult:
        seen.append(settings)
        signal = 15 if settings.run.seed == 15 else None
        return RunResult(Path(settings.run.out), "completed", 1, 0.5, 1.0, None, None, None, signal)

    monkeypatch.setattr("pymm.training.clip.train_clip", train)
    return seen


def test_options_become_settings(called: list[ClipSettings]) -> None:
    arguments = [
        "--data.source",
        "a.tar",
        "b.tar",
        "--out",
        "here",
        "--seed",
        "3",
        "--schedule.steps",
        "None",
    ]
    assert cli.main(["train", "clip", *arguments, "--schedule.max-seconds", "60"]) == 0
    (settings,) = called
    assert settings.data.source == ("a.tar", "b.tar")
    assert (settings.run.out, settings.run.seed) == ("here", 3)
    assert (settings.schedule.steps, settings.schedule.max_seconds) == (None, 60.0)


def test_an_interrupted_run_is_no_success(called: list[ClipSettings]) -> None:
    assert cli.main(["train", "clip", "--seed", "15"]) == 128 + 15


def test_settings_from_a_file_are_defaults(
    tmp_path: Path, called: list[ClipSettings], capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "settings.json"
    path.write_text(
        to_json(ClipSettings(model=ModelSettings("clip_rn50"), run=RunSettings(seed=7, out="there")))
    )
    assert cli.main(["train", "clip", "--settings", str(path), "--out", "here"]) == 0
    assert (called[0].model.name, called[0].run.seed, called[0].run.out) == ("clip_rn50", 7, "here")
    path.write_text('{"model": {"nam": "x"}}')
    assert cli.main(["train", "clip", "--settings", str(path)]) == 2
    assert capsys.readouterr().err == f"pymm: {path}: unknown key model.nam; nearest: model.name\n"


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda c: " ".join(c.words))
def test_commands_take_one_dataclass(command: cli.Command) -> None:
    """The parts that other files hold keep to the contract by which the command line calls them."""
    module, _, name = command.target.partition(":")
    hints = typing.get_type_hints(getattr(importlib.import_module(module), name))
    assert hints.pop("return") is int
    (kind,) = hints.values()
    assert dataclasses.is_dataclass(kind)


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m pymm.cli list | head -1"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    assert len(done.stdout.splitlines()) == 1
