from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymm.training import checkpoint
from pymm.training.checkpoint import (
    Snapshot,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    remove_leftovers,
    save_checkpoint,
    set_aside,
)
from pymm.training.errors import CheckpointError


def snapshot(value: float) -> Snapshot:
    return Snapshot(
        {"model": {"w": torch.full((4, 3), value).t()}, "empty": {}}, {"value": value, "list": [1, None]}
    )


def refuse(text: str) -> None:
    raise AssertionError(f"warned: {text}")


def test_round_trip_and_rotation(tmp_path: Path) -> None:
    for step in (3, 10, 100, 123456789):
        path = save_checkpoint(tmp_path, step, snapshot(step), keep=2)
        assert path.name == f"step_{step:08d}"
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_123456789", "step_00000100"]
    loaded = load_checkpoint(path)
    assert torch.equal(loaded.tensors["model"]["w"], snapshot(123456789).tensors["model"]["w"])
    assert loaded.tensors["empty"] == {}
    assert loaded.state == snapshot(123456789).state
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000100", "step_123456789"]
    modes = {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()}
    assert len(modes) == 1  # safetensors alone would write files that only their owner reads


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, snapshot(1.0), keep=1)
    assert {p.suffix for p in path.iterdir()} == {".json", ".safetensors"}


def counted(function: Callable[..., Any], die: Callable[[], None]) -> Callable[..., Any]:
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        die()
        result = function(*args, **kwargs)
        die()
        return result

    return wrapped


def save_and_die(directory: Path, step: int, value: float, keep: int, at: int) -> bool:
    """Save in a child that dies without any clean-up at the given touch of the disk; whether it got
    through."""
    pid = os.fork()
    if pid == 0:
        left = at

        def die() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os._exit(1)

        for owner, name in (
            (checkpoint, "sync_file"),
            (checkpoint, "save_tensors"),
            (Path, "rename"),
            (Path, "mkdir"),
            (Path, "write_text"),
            (checkpoint.shutil, "rmtree"),
            (os, "unlink"),
            (os, "rmdir"),
        ):
            setattr(owner, name, counted(getattr(owner, name), die))
        try:
            save_checkpoint(directory, step, snapshot(value), keep)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_death_at_every_touch_of_the_disk(tmp_path: Path) -> None:
    for at in range(1000):
        directory = tmp_path / str(at)
        save_checkpoint(directory, 1, snapshot(1.0), keep=1)
        through = save_and_die(directory, 2, 2.0, keep=1, at=at)
        found = newest_checkpoint(directory, refuse)
        assert found is not None
        path, loaded = found
        assert loaded.state["value"] == {"step_00000001": 1.0, "step_00000002": 2.0}[path.name]
        save_checkpoint(directory, 3, snapshot(3.0), keep=1)
        assert [p.name for p in directory.iterdir()] == ["step_00000003"]
        if through:
            assert path.name == "step_00000002"
            break
    assert 20 < at < 999


def test_death_while_a_checkpoint_of_the_same_step_is_replaced(tmp_path: Path) -> None:
    for at in range(1000):
        directory = tmp_path / str(at)
        save_checkpoint(directory, 1, snapshot(1.0), keep=1)
        through = save_and_die(directory, 1, 2.0, keep=1, at=at)
        remove_leftovers(directory)
        found = newest_checkpoint(directory, refuse)
        assert found is not None
        assert found[1].state["value"] in (1.0, 2.0)
        assert [p.name for p in directory.iterdir()] == ["step_00000001"]
        if through:
            assert found[1].state["value"] == 2.0
            break
    assert 20 < at < 999


def test_a_full_disk_leaves_the_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_checkpoint(tmp_path, 1, snapshot(1.0), keep=1)

    def full(path: Path, tensors: object) -> None:
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_tensors", full)
    with pytest.raises(CheckpointError, match=r"cannot write .*step_00000002: .*No space left"):
        save_checkpoint(tmp_path, 2, snapshot(2.0), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    found = newest_checkpoint(tmp_path, refuse)
    assert found is not None
    assert found[1].state["value"] == 1.0


def test_every_flipped_byte_is_noticed(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, snapshot(1.0), keep=1)
    for file in ("model.safetensors", "state.json"):
        data = (path / file).read_bytes()
        for at in range(0, len(data), 7):
            (path / file).write_bytes(data[:at] + bytes([data[at] ^ 16]) + data[at + 1 :])
            with pytest.raises(CheckpointError, match=f"{file} was damaged"):
                load_checkpoint(path)
        (path / file).write_bytes(data)
    load_checkpoint(path)


def test_newest_passes_over_the_damaged_and_says_so(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, snapshot(step), keep=3)
    (tmp_path / "step_00000003/model.safetensors").write_bytes(b"")
    (tmp_path / "step_00000002/manifest.json").unlink()
    said: list[str] = []
    found = newest_checkpoint(tmp_path, said.append)
    assert found is not None
    assert found[0].name == "step_00000001"
    assert [text.split(":")[1].strip()[-13:] for text in said] == ["step_00000003", "step_00000002"]
    set_aside(tmp_path, newer_than=1)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001"]
    assert (tmp_path / "step_00000003.damaged").is_dir()


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "nowhere", refuse) is None
    (tmp_path / "step_1").mkdir()
    (tmp_path / ".writing_step_00000001").mkdir()
    (tmp_path / "step_00000002").write_text("a file")
    assert newest_checkpoint(tmp_path, refuse) is None


def test_another_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_checkpoint(tmp_path, 1, snapshot(1.0), keep=1)
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.raises(CheckpointError, match="must have format 2, got 1"):
        load_checkpoint(path)
