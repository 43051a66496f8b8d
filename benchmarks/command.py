"""`pymm bench`: measure, print, keep, compare."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from pymm import ops
from pymm.benchmarks.measure import measure, overhead
from pymm.ops._machine import machine

FORMAT = 1  # of the JSON file


@dataclass(frozen=True)
class BenchSettings:
    """Measure ops beside eager, torch.compile, the bare GEMM and a copy of the same size."""

    ops: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of ops; all of them by default."""
    out: str | None = None
    """A JSON file for the results."""
    compare: tuple[str, str] | None = None
    """Two such files, before and after: print what moved instead of measuring."""
    seconds: float = 1.0
    """For each contestant of each workload."""
    compiled: bool = True
    """Measure torch.compile of eager too; it takes a minute of compiling."""
    threads: int | None = None
    """CPU threads; torch's own by default."""
    only: str = ""
    """Only workloads whose label or type holds this text."""


def run(settings: BenchSettings) -> int:
    """Print a table; 1 when a result was wrong.

    Raises:
        ValueError: for an unknown op, a text that no workload holds, or files that hold no results.
    """
    if settings.compare is not None:
        return _compare(*map(_load, settings.compare))
    unknown = [name for name in settings.ops if name not in ops.REGISTRY]
    if unknown:
        raise ValueError(
            f"bench: expected ops of {', '.join(sorted(ops.REGISTRY))}, got {', '.join(unknown)}"
        )
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    chosen = [ops.REGISTRY[name] for name in settings.ops or sorted(ops.REGISTRY)]
    work = [(op, w) for op in chosen for w in op.workloads() if settings.only in f"{w.label} {w.dtype}"]
    if not work:
        raise ValueError(f"bench: no workload of {', '.join(o.name for o in chosen)} holds {settings.only!r}")
    console = Console()
    rows = []
    for op, workload in work:
        with console.status(f"{op.name} {workload.label} {workload.dtype}"):
            rows.append(measure(op, workload, settings.seconds, settings.compiled))
    result = {
        "format": FORMAT,
        "machine": {"date": time.strftime("%Y-%m-%d"), **machine()},
        "workloads": rows,
        "overhead": {op.name: overhead(op) for op in chosen},
    }
    _print(console, result)
    if settings.out is not None:
        path = Path(settings.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
    return int(any(row["correct"] is False for row in rows))


def _ratio(row: dict[str, Any], times: dict[str, Any], other: str) -> str:
    """How many times as fast as another; nothing is claimed for a result that is not known to be right."""
    if not row["correct"]:
        return "wrong" if row["correct"] is False else "unchecked"
    return f"{times[other]['p50_ms'] / times['pymm']['p50_ms']:.2f}"


def _print(console: Console, result: dict[str, Any]) -> None:
    title = ", ".join(str(v) for v in result["machine"].values())
    table = Table(title=f"Median milliseconds (20th to 80th percentile); {title}", title_justify="left")
    for heading in ("op", "workload", "pass"):
        table.add_column(heading, overflow="fold")
    contestants = ("pymm", "eager", "compiled", "gemm", "copy")
    for heading in (*contestants, "× eager", "× compiled", "error / allowed"):
        table.add_column(heading, justify="right")
    for row in result["workloads"]:
        for key, word in (("forward", "fwd"), ("forward_backward", "fwd+bwd")):
            times = row.get(key)
            if times is None:
                continue
            cells = [_cell(times.get(name)) for name in contestants]
            cells += [_ratio(row, times, o) if o in times else "" for o in ("eager", "compiled")]
            error = "" if row["error"] is None else f"{row['error']:.1e} / {row['allowed']:.1e}"
            table.add_row(row["op"], f"{row['workload']} {row['dtype']}", word, *cells, error)
    console.print(table)
    calls = ", ".join(
        f"{name} {' / '.join(f'{v:.0f}' for v in times.values())}"
        for name, times in result["overhead"].items()
    )
    console.print(f"One call on the smallest sample, pymm / eager, µs: {calls}")


def _cell(times: dict[str, float] | None) -> str:
    if times is None:
        return ""
    return f"{times['p50_ms']:.3g} ({times['p20_ms']:.3g}–{times['p80_ms']:.3g})"


def _load(path: str) -> dict[str, Any]:
    try:
        result = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: {path} must be a file of pymm bench, got {error}") from error
    if not isinstance(result, dict) or result.get("format") != FORMAT:
        raise ValueError(f"bench: {path} must be a file of pymm bench of format {FORMAT}")
    return result


def _compare(before: dict[str, Any], after: dict[str, Any]) -> int:
    def medians(result: dict[str, Any]) -> dict[tuple[str, ...], float]:
        return {
            (row["op"], f"{row['workload']} {row['dtype']}", key): row[key]["pymm"]["p50_ms"]
            for row in result["workloads"]
            for key in ("forward", "forward_backward")
            if key in row
        }

    old, new = medians(before), medians(after)
    if not old.keys() & new.keys():
        raise ValueError("bench: the two files have no workload in common")
    table = Table("op", "workload", "pass", "before ms", "after ms", "times as fast")
    for key in old.keys() & new.keys():
        table.add_row(*key, f"{old[key]:.3g}", f"{new[key]:.3g}", f"{old[key] / new[key]:.2f}")
    console = Console()
    console.print(table)
    for what in ("processor", "threads", "torch", "instruction_set"):
        if before["machine"][what] != after["machine"][what]:
            console.print(f"{what} differs: {before['machine'][what]}, then {after['machine'][what]}")
    return 0
