"""Checkpoints that survive SIGKILL, a full disk and a flipped bit.

A checkpoint is a folder `step_XXXXXXXX` of safetensors files, `state.json` and `manifest.json`, which holds
the size and SHA-256 of all others. It is written under another name, synced to the disk and renamed, so a
folder with the right name is complete; the manifest tells when it was damaged afterwards. Nothing is
pickled.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from pymm.training.errors import CheckpointError
from pymm.training.files import digest, sync_file

FORMAT = 1
_NAME = re.compile(r"step_(\d{8,})")
_MANIFEST, _STATE = "manifest.json", "state.json"


@dataclass(frozen=True)
class Snapshot:
    """What a checkpoint holds.

    Args:
        tensors: name of a file (without its ending) -> name -> tensor.
        state: what JSON can hold.
    """

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: dict[str, Any] = field(default_factory=dict)


def checkpoint_path(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def list_checkpoints(directory: Path) -> list[Path]:
    """The finished checkpoints of a folder, newest first; their contents are not looked at."""
    if not directory.is_dir():
        return []
    found = [p for p in directory.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of, reverse=True)


def step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def save_checkpoint(directory: Path, step: int, snapshot: Snapshot, keep: int) -> Path:
    """Write a checkpoint and then delete all but the newest `keep`.

    Args:
        directory: the folder of checkpoints.
        step: names it; one of the same step is replaced.
        snapshot: its contents.
        keep: at least 1.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: when it cannot be written; the earlier ones are untouched then.
    """
    directory.mkdir(parents=True, exist_ok=True)
    remove_leftovers(directory)
    target = checkpoint_path(directory, step)
    temporary = directory / f".writing_{target.name}"
    try:
        temporary.mkdir()
        _write(temporary, snapshot)
        if target.exists():
            target.rename(directory / f".deleting_{target.name}")
        temporary.rename(target)
        sync_file(directory)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"checkpoint: cannot write {target}: {error}") from error
    for old in list_checkpoints(directory)[keep:]:
        old.rename(directory / f".deleting_{old.name}")
    remove_leftovers(directory)
    return target


def _write(folder: Path, snapshot: Snapshot) -> None:
    state = folder / _STATE
    state.write_text(json.dumps(snapshot.state, indent=1), encoding="utf-8")
    for name, tensors in snapshot.tensors.items():
        path = folder / f"{name}.safetensors"
        save_tensors(path, tensors)
        path.chmod(state.stat().st_mode)
    files = sorted(folder.iterdir())
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({"format": FORMAT, "files": entries}, indent=1), encoding="utf-8")
    for path in (*files, manifest, folder):
        sync_file(path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A safetensors file of tensors of any device and layout."""
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path)


def remove_leftovers(directory: Path) -> None:
    """Delete what an interrupted save or deletion left behind.

    A folder that was to be replaced comes back when its replacement did not get its name.
    """
    for path in directory.glob(".deleting_step_*"):
        target = directory / path.name.removeprefix(".deleting_")
        replacement = directory / f".writing_{target.name}"
        if replacement.exists() and not target.exists():
            path.rename(target)
    for pattern in (".writing_step_*", ".deleting_step_*"):
        for path in directory.glob(pattern):
            shutil.rmtree(path)


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Raises:
        CheckpointError: saying which file is missing, cut off or changed.
    """
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], dict(manifest["files"])
        entries = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"checkpoint: {path}: {_MANIFEST} is damaged or missing ({error})") from error
    if version != FORMAT:
        raise CheckpointError(f"checkpoint: {path} must have format {FORMAT}, got {version}")
    for name, (size, sha256) in entries.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint: {path}: {name} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(
                f"checkpoint: {path}: {name} must have {size} bytes, got {file.stat().st_size}"
            )
        if digest(file) != sha256:
            raise CheckpointError(
                f"checkpoint: {path}: {name} was damaged: its SHA-256 is not the manifest's"
            )


def load_checkpoint(path: Path) -> Snapshot:
    """Verify and read a checkpoint.

    Raises:
        CheckpointError: when it is damaged.
    """
    verify(path)
    try:
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        tensors = {p.stem: load_file(p) for p in sorted(path.glob("*.safetensors"))}
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint: {path} cannot be read: {error}") from error
    return Snapshot(tensors, state)


def newest_checkpoint(directory: Path, warn: Callable[[str], None]) -> tuple[Path, Snapshot] | None:
    """The newest checkpoint that is whole.

    Args:
        directory: the folder of checkpoints.
        warn: told about every damaged one that is passed over.

    Returns:
        None when there is no checkpoint.

    Raises:
        CheckpointError: when there are some and all are damaged: starting anew would throw the run away
        unasked.
    """
    found = list_checkpoints(directory)
    for path in found:
        try:
            return path, load_checkpoint(path)
        except CheckpointError as error:
            warn(f"{error}; falling back to the one before")
    if found:
        raise CheckpointError(
            f"checkpoint: all {len(found)} in {directory} are damaged; delete the folder to begin anew"
        )
    return None


def set_aside(directory: Path, newer_than: int) -> None:
    """Rename the checkpoints after a step to `*.damaged`, so that they no longer count as kept."""
    for path in list_checkpoints(directory):
        if step_of(path) > newer_than:
            aside = path.with_name(f"{path.name}.damaged")
            if aside.exists():
                shutil.rmtree(aside)
            path.rename(aside)
    if directory.is_dir():
        sync_file(directory)
