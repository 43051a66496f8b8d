"""What a run writes down: `log.jsonl`, and TensorBoard when asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from pymm.training.files import write_atomically

LOG = "log.jsonl"


class Log:
    """Lines of JSON, one per logged step or evaluation, each with its `step`.

    A run that is continued from step n drops the lines after n, which the killed run wrote and the
    continued one writes again: the file reads as if nothing had happened.

    Args:
        directory: of the run.
        step: the step that the run continues from; 0 starts the log anew.
        tensorboard: write TensorBoard events to `directory/tensorboard` as well.

    Raises:
        ImportError: when TensorBoard is asked for and not installed.
    """

    def __init__(self, directory: Path, step: int, tensorboard: bool = False) -> None:
        self._tensorboard = _writer(directory / "tensorboard", step) if tensorboard else None
        self.path = directory / LOG
        kept = [line for line in read_log(self.path) if line["step"] <= step] if step else []
        write_atomically(self.path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; its numbers also go to TensorBoard, as `train/loss` or
        `evaluation/seen_concepts.r1`."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._tensorboard is None:
            return
        for name, value in line.items():
            if name != "step":
                for tag, number in numbers(
                    {name: value} if isinstance(value, dict) else {"train": {name: value}}
                ).items():
                    self._tensorboard.add_scalar(tag.replace(".", "/", 1), number, line["step"])

    def sync(self) -> None:
        """Wait until the lines are on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()


def numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of nested dictionaries under dotted names."""
    found: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            found[prefix + key] = value
    return found


def read_log(path: Path) -> list[dict[str, Any]]:
    """The lines of a log; a last line that was cut off is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict) or "step" not in line:
            break
        lines.append(line)
    return lines


def _writer(directory: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("run.tensorboard needs TensorBoard: pip install 'pymm[log]'") from error
    return SummaryWriter(str(directory), purge_step=step + 1)
