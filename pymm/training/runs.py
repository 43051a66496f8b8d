"""How every run begins, and loading what it left behind."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from pymm.training import distributed
from pymm.training.checkpoint import list_checkpoints, verify
from pymm.training.errors import CheckpointError, SettingsError
from pymm.training.files import write_atomically
from pymm.training.rundir import SETTINGS, WEIGHTS, check_settings, checkpoints_of
from pymm.training.settings_file import load_settings, task_in
from pymm.training.task_settings import TaskSettings
from pymm.training.tasks import find_task, imported
from pymm.training.weights import check_names

Model = TypeVar("Model", bound=nn.Module)
CLASSES = "classes.json"


@contextmanager
def begin_run(settings: TaskSettings) -> Iterator[distributed.World]:
    """The processes of a run, which may continue the one in its directory.

    Raises:
        SettingsError: when the directory's run began with other settings.
    """
    with distributed.process_group(settings.run.device) as world:
        if world.is_main:
            check_settings(Path(settings.run.out), settings)
        yield world


@dataclass(frozen=True)
class Run(ABC):
    """A run as its directory holds it.

    Attributes:
        model: in eval mode, float32.
        settings: those of the run.
        weights: the file that the model's weights are from.
    """

    model: nn.Module
    settings: TaskSettings
    weights: Path

    @classmethod
    @abstractmethod
    def load(cls, home: Path, settings: Any, weights: Path) -> Run:
        """The run of a directory: the model of its settings with these weights (see `load_weights`)."""

    @abstractmethod
    def evaluate(self) -> dict[str, Any]:
        """What the settings' evaluation asks, as the run does at its end; the model is where it is to be.

        Raises:
            SettingsError: when the settings ask for nothing.
        """

    @abstractmethod
    def table(self, scores: dict[str, Any]) -> Table:
        """The scores for a terminal."""

    def draw(self, path: Path) -> None:
        """Write a picture of the answers, where the task has one.

        Raises:
            SettingsError: when it has none.
        """
        raise SettingsError(f"eval: picture must be left out for a run of {self.settings.task}, got {path}")


def load_run(path: Path | str) -> Run:
    """Load a trained model, whatever its task was.

    Args:
        path: a run's directory (its `model.safetensors`, or the newest checkpoint when it has not ended),
            one of its checkpoints (the averaged weights where there are some), or a safetensors file inside
            either.

    Returns:
        The task's kind of run, such as `pymm.training.clip.ClipRun`.

    Raises:
        FileNotFoundError: when there is no such path, no settings beside it, or no weights.
        CheckpointError: when the checkpoint is damaged or the weights do not fit the model.
        SettingsError: when the settings are not readable.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_run: {path} does not exist")
    inside = path.resolve() if path.is_dir() else path.resolve().parent
    home = next((p for p in (inside, *inside.parents[:2]) if (p / SETTINGS).is_file()), None)
    if home is None:
        raise FileNotFoundError(
            f"load_run: {path} must be a run's directory or a part of it: no {SETTINGS} there"
        )
    task = find_task(task_in(home / SETTINGS))
    settings = load_settings(imported(task.settings), home / SETTINGS)
    weights = weights_of(path, home)
    if (weights.parent / "manifest.json").exists():
        verify(weights.parent)
    found: Run = imported(task.run).load(home, settings, weights)
    return found


def write_classes(home: Path, classes: Sequence[str]) -> None:
    """Write the names of a run's classes into its directory."""
    home.mkdir(parents=True, exist_ok=True)
    write_atomically(home / CLASSES, (json.dumps(list(classes)) + "\n").encode())


def read_classes(home: Path) -> tuple[str, ...]:
    """The names of the classes of a run.

    Raises:
        CheckpointError: when they cannot be read.
    """
    try:
        return tuple(str(name) for name in json.loads((home / CLASSES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"load_run: {home / CLASSES} cannot be read: {error}") from error


def load_weights(model: Model, weights: Path, what: str) -> Model:
    """Put a run's weights into a model, which is in eval mode afterwards.

    Raises:
        CheckpointError: when the file is damaged or is not of `what`.
    """
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"load_run: {weights} cannot be read: {error}") from error
    check_names(model.state_dict(), tensors, what)
    model.load_state_dict(tensors)
    return model.eval()


def weights_of(path: Path, home: Path) -> Path:
    """The file with the weights of `path`, which is the run's directory `home` or a part of it.

    Raises:
        FileNotFoundError: when there is none.
    """
    if path.is_file():
        return path
    if path.resolve() == home:
        if (home / WEIGHTS).is_file():
            return home / WEIGHTS
        checkpoints = list_checkpoints(checkpoints_of(home))
        if not checkpoints:
            raise FileNotFoundError(f"load_run: {path} holds neither {WEIGHTS} nor a checkpoint")
        path = checkpoints[0]
    found = [path / name for name in ("average.safetensors", "model.safetensors") if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"load_run: {path} holds no weights")
    return found[0]
