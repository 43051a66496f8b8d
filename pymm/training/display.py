"""What a run shows: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from pymm.training.log import numbers


class Display(Protocol):
    """Where a run reports to."""

    def update(self, share: float, line: dict[str, Any], *, logged: bool) -> None:
        """Show a step: the share of the run that is over, and what the log would say of it."""

    def message(self, text: str) -> None:
        """Show a sentence."""


class Silent:
    """Shows nothing."""

    def update(self, share: float, line: dict[str, Any], *, logged: bool) -> None:
        pass

    def message(self, text: str) -> None:
        pass


class Lines:
    """A plain line per logged step, for files and pipes."""

    def update(self, share: float, line: dict[str, Any], *, logged: bool) -> None:
        if logged:
            print(_describe(share, line), flush=True)

    def message(self, text: str) -> None:
        print(text, flush=True)


class Bar:
    """A progress bar with loss, samples per second and the time left."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._task: TaskID = progress.add_task("train", total=1.0, text="")

    def update(self, share: float, line: dict[str, Any], *, logged: bool) -> None:
        self._progress.update(self._task, completed=share, text=_describe(share, line))

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False)


@contextmanager
def display(shown: bool = True) -> Iterator[Display]:
    """The display that suits standard output."""
    if not shown:
        yield Silent()
    elif sys.stdout.isatty():
        columns = (
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=Console(file=sys.stdout), transient=False) as progress:
            yield Bar(progress)
    else:
        yield Lines()


class Rate:
    """Samples per second over the last twenty steps, from the time at which a run begins or continues."""

    def __init__(self, elapsed_s: float) -> None:
        self._samples = 0
        self._marks = [(elapsed_s, 0)]

    def __call__(self, elapsed_s: float, samples: int) -> float:
        self._samples += samples
        self._marks = [*self._marks[-20:], (elapsed_s, self._samples)]
        start, before = self._marks[0]
        return (self._samples - before) / max(elapsed_s - start, 1e-9)


def _describe(share: float, line: dict[str, Any]) -> str:
    elapsed = line["elapsed_s"]
    left = f"  {clock(elapsed * (1 - share) / share)} left" if share > 0 else ""
    rate = next(key for key in line if key.endswith("_per_s"))
    return (
        f"step {line['step']}  loss {line['loss']:.4f}  rate {line['learning_rate']:.2e}  "
        f"{line[rate]:.0f} {rate.removesuffix('_per_s')}/s  {clock(elapsed)}{left}"
    )


def headline(scores: dict[str, Any]) -> str:
    """The scores of an evaluation in a line: fractions of the first two levels, without chance beside
    them."""
    shown = {k: v for k, v in numbers(scores).items() if isinstance(v, float) and k.count(".") < 2}
    return "  ".join(f"{k} {v:.4g}" for k, v in shown.items() if "chance" not in k)


def clock(seconds: float) -> str:
    """90061 -> "25:01:01", 61 -> "1:01"."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
