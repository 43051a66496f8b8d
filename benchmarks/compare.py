"""What moved between two results."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from pymm.benchmarks.report import WORDS, number
from pymm.benchmarks.schema import Result, Times


@dataclass(frozen=True)
class Move:
    """One pass of one row, before and after.

    `eager` is how many times as fast the same eager code ran: what moved with it is the machine, not pymm.
    """

    key: str
    word: str
    before: Times
    after: Times
    eager: float | None

    @property
    def ratio(self) -> float:
        """How many times as fast."""
        return self.before.p50_ms / self.after.p50_ms

    @property
    def verdict(self) -> str:
        """`faster` or `slower` where the spreads, 20th to 80th percentile, do not touch; else `same`."""
        if self.after.p80_ms < self.before.p20_ms:
            return "faster"
        return "slower" if self.after.p20_ms > self.before.p80_ms else "same"


def moves(before: Result, after: Result) -> list[Move]:
    """The pairs of rows with the same key, those that moved most first.

    Raises:
        ValueError: when there is none.
    """
    old = {row.key: row for row in before.rows}
    found = []
    for row in after.rows:
        for name, measured in row.passes.items():
            if row.key not in old or name not in old[row.key].passes:
                continue
            then, now = old[row.key].passes[name].contestants, measured.contestants
            eager = None
            if "eager" in then and "eager" in now:
                eager = then["eager"].times.p50_ms / now["eager"].times.p50_ms
            found.append(Move(row.key, WORDS[name], then["pymm"].times, now["pymm"].times, eager))
    if not found:
        raise ValueError("bench: the two files have no workload in common")
    return sorted(found, key=lambda move: -max(move.ratio, 1 / move.ratio))


def print_moves(to: Console, before: Result, after: Result) -> None:
    """The table of moves, the rows that only one side has, and what differs between the machines."""
    table = Table(title=f"{before.date}, then {after.date}", title_justify="left")
    for heading in ("workload", "pass"):
        table.add_column(heading, overflow="fold")
    for heading in ("before, ms", "spread", "after, ms", "spread", "times as fast", "eager's", ""):
        table.add_column(heading, justify="right", no_wrap=True)
    for move in moves(before, after):
        table.add_row(
            move.key,
            move.word,
            *(text for t in (move.before, move.after) for text in _cells(t)),
            f"{move.ratio:.2f}",
            "" if move.eager is None else f"{move.eager:.2f}",
            move.verdict,
        )
    to.print(table)
    for name, one, other in (("before", before, after), ("after", after, before)):
        only = sorted({row.key for row in one.rows} - {row.key for row in other.rows})
        if only:
            to.print(f"only {name}: {', '.join(only)}", markup=False)
    for what in {**before.machine, **after.machine}:
        was, is_now = before.machine.get(what), after.machine.get(what)
        if was != is_now:
            to.print(f"{what} differs: {was}, then {is_now}", markup=False)


def _cells(times: Times) -> tuple[str, str]:
    return number(times.p50_ms), f"{number(times.p20_ms)}–{number(times.p80_ms)}"
