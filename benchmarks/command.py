"""`pymm bench`: choose, measure, print, keep, compare, draw."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from pymm.benchmarks import schema
from pymm.benchmarks.cases import Case, Selection, cases
from pymm.benchmarks.compare import print_moves
from pymm.benchmarks.measure import Options, measure
from pymm.benchmarks.report import console, line, print_result
from pymm.benchmarks.targets import print_targets
from pymm.ops._machine import machine

INTERRUPTED = 130


@dataclass(frozen=True)
class BenchSettings:
    """Measure ops beside eager, torch.compile, other libraries, and the machine's limits."""

    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of ops, or vit_block; all of them by default."""
    filter: tuple[str, ...] = ()
    """Only workloads whose name, op/label/type, holds each of these texts."""
    list: bool = False
    """List the workloads instead of measuring them."""
    seconds: float = 10.0
    """For each workload; the check, compiling and slow contestants come on top."""
    quick: bool = False
    """A second for each workload, nothing compiled."""
    sweep: bool = False
    """Measure the further points of the curves over N too."""
    compiled: bool = True
    """Measure torch.compile too; it takes up to a minute for each workload."""
    memory: bool = True
    """Measure peaks of memory too."""
    threads: int | None = None
    """CPU threads; torch's own by default."""
    device: str = "cpu"
    """Where the tensors are."""
    out: str | None = None
    """A JSON file for the results, written after each workload; those that it holds of others are kept."""
    save: str | None = None
    """A word for the name of such a file, DIRECTORY/<date>_<machine>_<word>.json."""
    directory: str = "benchmarks/results"
    """Where `--save` writes."""
    plots: str | None = None
    """A directory for pictures of the results."""
    show: tuple[str, ...] = ()
    """Files of results to print, and to draw with `--plots`, instead of measuring."""
    targets: tuple[str, ...] = ()
    """Files of results: print what pymm sets out to reach beside what they measured, instead of measuring."""
    compare: tuple[str, str] | None = None
    """Two such files, before and after: print what moved instead of measuring."""


def run(settings: BenchSettings) -> int:
    """0; 1 when a result was wrong, a workload failed or a target was missed; 130 when interrupted.

    Raises:
        ValueError: for an unknown name, a filter that nothing passes, or files that hold no results.
    """
    to = console()
    if settings.compare is not None:
        before, after = (schema.load(Path(p)) for p in settings.compare)
        print_moves(to, before, after)
        return 0
    if settings.targets:
        results = [schema.load(Path(p)) for p in settings.targets]
        missed = [result for result in results if not print_targets(to, result)]
        return int(bool(missed))
    if settings.show:
        results = [schema.load(Path(p)) for p in settings.show]
        for result in results:
            print_result(to, result)
            _draw(to, result, settings.plots)
        return 0
    if settings.seconds <= 0:
        raise ValueError(f"bench: --seconds must be positive, got {settings.seconds}")
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    chosen = cases(Selection(settings.ops, settings.filter, settings.sweep))
    if settings.list:
        for case in chosen:
            to.print(case.key, markup=False)
        return 0
    result = _measure(to, chosen, settings)
    print_result(to, result)
    _draw(to, result, settings.plots)
    if result.interrupted:
        return INTERRUPTED
    return int(any(row.failure is not None or row.correct is False for row in result.rows))


def _measure(to: Console, chosen: list[Case], settings: BenchSettings) -> schema.Result:
    """Measure, and write after each workload; an interruption ends it and keeps what there is."""
    options = Options(
        seconds=min(settings.seconds, 1.0) if settings.quick else settings.seconds,
        compiled=settings.compiled and not settings.quick,
        memory=settings.memory,
        device=_device(settings.device),
    )
    path = _path(settings)
    if path is not None and path.exists():
        schema.load(path).merged(_result([], options, False))  # what cannot be added to is found out first
    rows: list[schema.Row] = []
    try:
        with _progress(to, len(chosen)) as progress:
            for case in chosen:
                progress.begin(case)
                rows.append(measure(case, options))
                progress.end(rows[-1])
                _write(path, _result(rows, options, False))
    except KeyboardInterrupt:
        result = _result(rows, options, True)
        _write(path, result)
        return result
    return _result(rows, options, False)


def _device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"bench: --device must be one that this machine has, got {name!r}: {error}"
        ) from error


def _result(rows: list[schema.Row], options: Options, interrupted: bool) -> schema.Result:
    gpu = torch.cuda.get_device_name(options.device) if options.device.type == "cuda" else None
    return schema.Result(
        format=schema.FORMAT,
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        machine={**machine(), "device": gpu or options.device.type},
        settings={k: v for k, v in asdict(options).items() if k != "device"},
        interrupted=interrupted,
        rows=list(rows),
    )


def _path(settings: BenchSettings) -> Path | None:
    if settings.out is not None:
        return Path(settings.out)
    if settings.save is None:
        return None
    name = re.sub(r"[^a-z0-9]+", "-", machine()["processor"].lower()).strip("-")
    day = time.strftime("%Y-%m-%d", time.gmtime())
    return Path(settings.directory) / f"{day}_{name}_{settings.save}.json"


def _write(path: Path | None, result: schema.Result) -> None:
    if path is not None:
        before = schema.load(path) if path.exists() else None
        schema.save(before.merged(result) if before is not None else result, path)


def _draw(to: Console, result: schema.Result, directory: str | None) -> None:
    if directory is not None:
        from pymm.benchmarks.plots import draw

        for path in draw(result, Path(directory)):
            to.print(str(path), markup=False)


class _Lines:
    """Progress where there is no terminal: a line for each pass of each workload."""

    def __init__(self, to: Console) -> None:
        self.to = to

    def begin(self, case: Case) -> None:
        pass

    def end(self, row: schema.Row) -> None:
        for text in line(row):
            self.to.print(text, markup=False, soft_wrap=True)


class _Bar(_Lines):
    """Progress on a terminal: the same lines above a bar."""

    def __init__(self, bar: Progress, count: int) -> None:
        super().__init__(bar.console)
        self.bar, self.task = bar, bar.add_task("", total=count)

    def begin(self, case: Case) -> None:
        self.bar.update(self.task, description=case.key)
        self.bar.refresh()

    def end(self, row: schema.Row) -> None:
        super().end(row)
        self.bar.advance(self.task)
        self.bar.refresh()


@contextmanager
def _progress(to: Console, count: int) -> Iterator[_Lines]:
    if not to.is_terminal:
        yield _Lines(to)
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # The clock is redrawn when a workload ends: a thread that draws would take time from what is measured.
    with Progress(*columns, console=to, auto_refresh=False, transient=True) as bar:
        yield _Bar(bar, count)
