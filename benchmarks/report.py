"""Tables for people. A ratio is printed only where the result is known to be right."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pymm.benchmarks.load import DISTURBED
from pymm.benchmarks.schema import Contestant, Pass, Result, Row, Times

WORDS = {"forward": "fwd", "forward_backward": "fwd+bwd"}
PLAIN_WIDTH = 240  # of a table that goes to a file or a pipe


def console() -> Console:
    """Of the terminal's width, or wide enough for a whole table where there is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=max(PLAIN_WIDTH, found.width), highlight=False)


def best_peer(measured: Pass) -> tuple[str, Contestant] | None:
    """The fastest contestant beside pymm that computes the same."""
    others = {k: c for k, c in measured.contestants.items() if k != "pymm" and c.same}
    if not others:
        return None
    name = min(others, key=lambda k: others[k].times.p50_ms)
    return name, others[name]


def ratio(row: Row, measured: Pass, other: str) -> float | None:
    """How many times as fast as another; None when pymm's result is not known to be right."""
    if row.correct is not True or other not in measured.contestants:
        return None
    return measured.contestants[other].times.p50_ms / measured.contestants["pymm"].times.p50_ms


def share(measured: Pass, limit: str) -> float | None:
    """A limit's time as a share of pymm's: 1 is at the limit, above 1 is better than it."""
    bound = measured.limits.get(limit)
    return None if bound is None else limit_ms(bound, limit) / measured.contestants["pymm"].times.p50_ms


def limit_ms(bound: Times, limit: str) -> float:
    """The median, but the peak is what the machine can do: a loop that was interrupted says nothing of it."""
    return bound.p20_ms if limit == "peak" else bound.p50_ms


def verdict(row: Row) -> str:
    """Why there is no ratio, or nothing."""
    if row.failure is not None:
        return "failed"
    return {True: "", False: "wrong", None: "unchecked"}[row.correct]


def line(row: Row) -> Iterator[str]:
    """A row in plain lines, one for each pass."""
    if row.failure is not None:
        yield f"{row.key}: failed: {row.failure}"
    for name, measured in row.passes.items():
        pymm = measured.contestants["pymm"]
        parts = [f"pymm {_ms(pymm.times)}"]
        best = best_peer(measured)
        if best is not None:
            claim = verdict(row) or f"{ratio(row, measured, best[0]):.2f} times as fast"
            parts.append(f"{best[0]} {_ms(best[1].times)}: {claim}")
        parts += [
            f"{part:.0%} of {limit}"
            for limit in measured.limits
            if (part := share(measured, limit)) is not None
        ]
        if pymm.peak_bytes is not None:
            parts.append(f"peak {_mb(pymm.peak_bytes)} MB")
        if (row.others or 0.0) > DISTURBED:
            parts.append(f"disturbed: others took {row.others:.0%} of the processor")
        yield f"{row.key} {WORDS[name]}: " + "; ".join(parts)


def print_result(to: Console, result: Result) -> None:
    """The tables: workloads, calls, what was absent, what is wrong."""
    facts = ", ".join(f"{k} {v}" for k, v in result.machine.items() if v is not None)
    to.print(f"{result.date}: {facts}")
    rows = [row for row in result.rows if row.kind != "call"]
    if any(row.passes for row in rows):
        to.print(_workloads(rows))
        to.print(
            "ms: median (20th to 80th percentile). Best: the fastest other way with the same result. % GEMM: "
            "the time of torch's bare products over pymm's; peak and copy alike. MB: the peak above the "
            "inputs, pymm's and that of the best."
        )
        for text in _rates(rows):
            to.print(text)
    calls = [row for row in result.rows if row.kind == "call" and row.passes]
    if calls:
        to.print(_calls(calls))
    for row in result.rows:
        if row.failure is not None:
            to.print(f"failed: {row.key}: {row.failure}", markup=False)
        if row.correct is False:
            to.print(f"wrong: {row.key}: error {row.error:.1e}, allowed {row.allowed:.1e}", markup=False)
    disturbed = [row.key for row in result.rows if (row.others or 0.0) > DISTURBED]
    if disturbed:
        to.print(
            f"disturbed: other processes took more than {DISTURBED:.0%} of the processor meanwhile: "
            + "; ".join(disturbed),
            markup=False,
        )
    for text in _absences(result.rows):
        to.print(text, markup=False)
    if result.interrupted:
        to.print("Interrupted: the rows above are what was measured.")


def _workloads(rows: list[Row]) -> Table:
    table = Table(title="Workloads", title_justify="left")
    table.add_column("workload", overflow="fold")
    table.add_column("pass", no_wrap=True)
    table.add_column("pymm, ms", justify="right")
    table.add_column("best, ms", justify="right", overflow="fold")
    for heading in ("× best", "× eager", "× compiled", "% GEMM", "% peak", "% copy"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("MB, best", justify="right")
    table.add_column("error / allowed", justify="right")
    for row in rows:
        for name, measured in row.passes.items():
            pymm, best = measured.contestants["pymm"], best_peer(measured)
            ratios = [
                _times_as_fast(row, measured, other)
                for other in (best[0] if best else "", "eager", "compiled")
            ]
            shares = [
                "" if part is None else f"{part:.0%}"
                for part in (share(measured, limit) for limit in ("gemm", "peak", "copy"))
            ]
            table.add_row(
                f"{row.op} {row.label} {row.dtype}",
                WORDS[name],
                _ms(pymm.times),
                f"{best[0]} {_ms(best[1].times)}" if best else "",
                *ratios,
                *shares,
                ", ".join(_mb(c.peak_bytes) for c in (pymm, best[1] if best else None) if c is not None),
                "" if row.error is None else f"{row.error:.1e} / {row.allowed:.1e}",
            )
    return table


def _calls(rows: list[Row]) -> Table:
    table = Table(title="One tiny call, µs", title_justify="left")
    table.add_column("op")
    for heading in ("pass", "pymm", "eager", "above eager"):
        table.add_column(heading, justify="right")
    for row in rows:
        for name, measured in row.passes.items():
            ours, eager = (1e3 * measured.contestants[c].times.p50_ms for c in ("pymm", "eager"))
            above = verdict(row) or f"{ours - eager:+.1f}"
            table.add_row(row.op, WORDS[name], f"{ours:.1f}", f"{eager:.1f}", above)
    return table


def _rates(rows: list[Row]) -> Iterator[str]:
    """The limits as rates: the median over the rows of each type."""
    for dtype in dict.fromkeys(row.dtype for row in rows):
        passes = [measured for row in rows if row.dtype == dtype for measured in row.passes.values()]
        parts = []
        for limit, words in (("peak", "multiply-adds in registers"), ("gemm", "torch's bare products")):
            found = [p.operations / limit_ms(p.limits[limit], limit) for p in passes if limit in p.limits]
            if found:
                parts.append(f"{words} {statistics.median(found) / 1e9:.3g} TFLOP/s")
        moved = [p.moved_bytes / p.limits["copy"].p50_ms for p in passes if "copy" in p.limits]
        if moved:
            parts.append(f"copy {statistics.median(moved) / 1e6:.3g} GB/s, read and written")
        if parts:
            yield f"{dtype}: {', '.join(parts)} (medians of the rows)"


@dataclass(frozen=True)
class _Absence:
    op: str
    contestant: str
    reason: str


def _absences(rows: list[Row]) -> list[str]:
    """Who did not run, each reason once."""
    found: dict[_Absence, int] = {}
    for row in rows:
        for measured in row.passes.values():
            for name, reason in measured.absent.items():
                absence = _Absence(row.op, name, reason)
                found[absence] = found.get(absence, 0) + 1
            for name, contestant in measured.contestants.items():
                if not contestant.same:
                    absence = _Absence(row.op, name, "computes something else, so it is not compared with")
                    found[absence] = found.get(absence, 0) + 1
    return [
        f"absent: {a.op}, {a.contestant} ({count} pass{'es' if count > 1 else ''}): {a.reason}"
        for a, count in found.items()
    ]


def _times_as_fast(row: Row, measured: Pass, other: str) -> str:
    if other not in measured.contestants:
        return ""
    found = ratio(row, measured, other)
    return verdict(row) if found is None else f"{found:.2f}"


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ms(times: Times) -> str:
    if times.samples == 1:
        return f"{number(times.p50_ms)} (once)"
    return f"{number(times.p50_ms)} ({number(times.p20_ms)}–{number(times.p80_ms)})"


def _mb(count: int | None) -> str:
    return "–" if count is None else number(count / 1e6)
