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
from pymm.training.settings_file import load_settings, to_json
from pymm.training.task_settings import changed

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
        TrainingError: when another process, or this one, trains in it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _held(directory):
        if checkpoints_of(directory).is_dir():
            remove_leftovers(checkpoints_of(directory))
        check_settings(directory, settings)
        write_atomically(directory / SETTINGS, to_json(settings).encode())
        yield


_HELD: set[Path] = set()


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """A lock that ends with this process.

    A POSIX lock, as the loader's workers must not inherit it: they outlive a killed run for seconds, in
    which it could not be started again. Such a lock does not hold off its own process, and ends when that
    closes the file.
    """
    key, taken = directory.resolve(), TrainingError(f"{directory}: another process is training in it")
    if key in _HELD:
        raise taken
    with (directory / ".lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise taken from error
        _HELD.add(key)
        try:
            yield
        finally:
            _HELD.remove(key)


def export_weights(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file atomically."""
    temporary = path.with_name(f".{path.name}.tmp")
    save_tensors(temporary, tensors)
    sync_file(temporary)
    temporary.replace(path)
    sync_file(path.parent)
