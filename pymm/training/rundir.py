"""A run's directory: one process at a time, one set of settings."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from pymm.training.checkpoint import list_checkpoints, remove_leftovers, save_tensors
from pymm.training.errors import SettingsError, TrainingError
from pymm.training.files import sync_file, write_atomically
from pymm.training.settings import changed
from pymm.training.settings_file import load_settings, to_json

SETTINGS, WEIGHTS = "settings.json", "model.safetensors"


def checkpoints_of(directory: Path) -> Path:
    return directory / "checkpoints"


def check_settings(directory: Path, settings: Any) -> None:
    """Require that a run which has checkpoints goes on with the settings that it began with.

    Raises:
        SettingsError: naming the setting that differs, or when there are checkpoints and `resume` is "never".
    """
    if not list_checkpoints(checkpoints_of(directory)):
        return
    if settings.run.resume == "never":
        raise SettingsError(
            f"settings: resume must be 'auto' for {directory}, which has checkpoints, got 'never'; "
            "or choose another directory"
        )
    try:
        before = load_settings(type(settings), directory / SETTINGS)
    except FileNotFoundError as error:
        raise SettingsError(f"settings: {directory} has checkpoints and no {SETTINGS}") from error
    differing = changed(before, settings)
    if differing:
        key, old, new = differing[0]
        more = f" ({len(differing) - 1} more differ)" if len(differing) > 1 else ""
        raise SettingsError(
            f"settings: {key} must be {old!r} to continue the run in {directory}, got {new!r}{more}; "
            "or choose another directory"
        )


@contextmanager
def open_run(directory: Path, settings: Any) -> Iterator[None]:
    """Hold the directory: checked, cleaned of interrupted writes, its settings written.

    Raises:
        SettingsError: as `check_settings`.
        TrainingError: when another process trains in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise TrainingError(f"{directory}: another process is training in it") from error
        if checkpoints_of(directory).is_dir():
            remove_leftovers(checkpoints_of(directory))
        check_settings(directory, settings)
        write_atomically(directory / SETTINGS, to_json(settings).encode())
        yield


def export_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_tensors(temporary, tensors)
    sync_file(temporary)
    temporary.replace(path)
    sync_file(path.parent)
