"""The README's examples run, and its commands exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from pymm import cli, ops

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", _blocks("python"))
def test_python_example(code: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert ("info_nce: cpu" in done.stdout) == ("ops.explain" in code)


def test_every_command_is_one_of_ours() -> None:
    lines = [line for block in _blocks("sh") for line in block.splitlines() if line.startswith("pymm ")]
    words = {" ".join(command.words) for command in cli.COMMANDS}
    assert lines
    for line in lines:
        assert any(line.removeprefix("pymm ").startswith(w) for w in words), line


def test_training_and_measuring_examples(tmp_path: Path) -> None:
    """The commands of the two sections, at the smallest size."""
    run = str(tmp_path / "run")
    small = ["--model.name", "clip_tiny", "--model.image-size", "16", "--data.batch-size", "16"]
    small += ["--schedule.steps", "2", "--data.source", "emoji:noto", "--evaluation.source", "emoji:noto"]
    assert cli.main(["train", "clip", "--run.out", run, *small]) == 0
    assert cli.main(["eval", run]) == 0
    out = str(tmp_path / "bench.json")
    arguments = ["bench", "info_nce", "--filter", "N=256", "--seconds", "0.01", "--no-compiled", "--out", out]
    assert cli.main(arguments) == 0
    assert cli.main(["bench", "--compare", out, out]) == 0


def test_ops_table_names_every_op() -> None:
    missing = [name for name in ops.REGISTRY if f"`{name}`" not in README]
    assert not missing
