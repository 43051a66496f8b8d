"""Pictures of a result: the ratio to the best peer, time against N, memory against N."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pymm.benchmarks.report import WORDS, best_peer, limit_ms, ratio, verdict
from pymm.benchmarks.schema import Contestant, Pass, Result, Row

LEAST_POINTS = 3  # of a curve


@dataclass(frozen=True)
class Curve:
    """The rows of one op, type and family, and one pass of them, by size."""

    op: str
    dtype: str
    family: str
    word: str
    points: list[tuple[int, Row, Pass]]

    @property
    def title(self) -> str:
        return f"{self.op} {self.family} {self.dtype}, {self.word}"

    @property
    def names(self) -> list[str]:
        """Contestants at more than one point, pymm first."""
        seen = [name for _, _, measured in self.points for name, c in measured.contestants.items() if c.same]
        return [name for name in dict.fromkeys(["pymm", *seen]) if seen.count(name) > 1]


def draw(result: Result, directory: Path) -> list[Path]:
    """Write the pictures that the rows allow as PNG, and return their paths.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("bench: plots need matplotlib: pip install 'pymm[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    directory.mkdir(parents=True, exist_ok=True)
    written = []

    def keep(figure: Figure, name: str) -> None:
        written.append(directory / f"{name}.png")
        figure.savefig(written[-1], dpi=130)

    bars = [
        (row, word, measured)
        for row in result.rows
        if row.kind == "workload"
        for word, measured in row.passes.items()
        if best_peer(measured) is not None
    ]
    if bars:
        figure = Figure(figsize=(11, 1.6 + 0.26 * len(bars)), layout="constrained")
        _ratios(figure.subplots(), bars, result)
        keep(figure, "ratio")
    found = curves(result)
    if found:
        for name, panel in (("time", _time_panel), ("memory", _memory_panel)):
            columns = min(2, len(found))
            rows = -(-len(found) // columns)
            figure = Figure(figsize=(6.5 * columns, 4.4 * rows), layout="constrained")
            axes = figure.subplots(rows, columns, squeeze=False).ravel()
            for axis, curve in zip(axes, found, strict=False):
                panel(axis, curve)
            for axis in axes[len(found) :]:
                axis.set_axis_off()
            figure.suptitle(_machine(result), fontsize=9)
            keep(figure, name)
    return written


def curves(result: Result) -> list[Curve]:
    """The curves with points enough, in the order of the rows."""
    groups: dict[tuple[str, str, str, str], list[tuple[int, Row, Pass]]] = {}
    for row in result.rows:
        for name, measured in row.passes.items():
            if row.family is not None and row.size is not None and row.correct is not False:
                key = (row.op, row.dtype, row.family, WORDS[name])
                groups.setdefault(key, []).append((row.size, row, measured))
    return [
        Curve(*key, sorted(points, key=lambda point: point[0]))
        for key, points in groups.items()
        if len(points) >= LEAST_POINTS
    ]


def _machine(result: Result) -> str:
    m = result.machine
    return (
        f"{result.date}, {m['processor']}, {m['threads']} threads, {m['instruction_set']}, torch {m['torch']}"
    )


def _ratios(axis: Any, bars: list[tuple[Row, str, Pass]], result: Result) -> None:
    """Horizontal bars on a logarithmic axis; where the result is not known to be right, the reason alone."""
    colours = {op: f"C{i}" for i, op in enumerate(dict.fromkeys(row.op for row, _, _ in bars))}
    for place, (row, word, measured) in enumerate(bars):
        best = best_peer(measured)
        assert best is not None
        value = ratio(row, measured, best[0])
        if value is None:
            axis.text(1, place, f" {verdict(row)}", va="center", fontsize=7, color="crimson")
            continue
        spread = [
            best[1].times.p20_ms / measured.contestants["pymm"].times.p80_ms,
            best[1].times.p80_ms / measured.contestants["pymm"].times.p20_ms,
        ]
        axis.barh(
            place, value - 1, left=1, height=0.7, color=colours[row.op], alpha=1 if word == "forward" else 0.6
        )
        axis.plot(spread, [place, place], color="black", linewidth=0.8)
        at = max(value, spread[1], 1)
        axis.text(at * 1.03, place, f"{value:.2f}× {best[0]}", va="center", fontsize=7)
    axis.axvline(1, color="black", linewidth=1)
    axis.set_xscale("log")
    ticks = [0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100]
    axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axis.minorticks_off()
    values = [v for row, _, m in bars if (v := ratio(row, m, (best_peer(m) or ("",))[0])) is not None] or [
        1.0
    ]
    axis.set_xlim(min(0.5, min(values) / 1.5), max(2.0, max(values)) * 4)
    axis.set_yticks(
        range(len(bars)),
        [f"{row.op} {row.label} {row.dtype}, {WORDS[word]}" for row, word, _ in bars],
        fontsize=7,
    )
    axis.invert_yaxis()
    axis.set_ylim(len(bars) - 0.3, -0.7)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("times as fast as the best other way (line: 20th to 80th percentile)")
    axis.set_title(f"pymm beside the best peer\n{_machine(result)}", fontsize=9)


def _series(
    curve: Curve, name: str, value: Callable[[Contestant], float | None]
) -> Iterator[tuple[int, float]]:
    for size, _, measured in curve.points:
        contestant = measured.contestants.get(name)
        found = value(contestant) if contestant is not None else None
        if found is not None:
            yield size, found


def _panel(axis: Any, curve: Curve, value: Callable[[Contestant], float | None], unit: str) -> None:
    for name in curve.names:
        points = list(_series(curve, name, value))
        if points:
            style = {"linewidth": 2.5, "color": "black"} if name == "pymm" else {"linewidth": 1.2}
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    sizes = [size for size, _, _ in curve.points]
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.set_xlabel("N")
    axis.set_ylabel(unit)
    axis.set_title(curve.title, fontsize=9)
    axis.grid(alpha=0.3)


def _time_panel(axis: Any, curve: Curve) -> None:
    _panel(axis, curve, lambda c: c.times.p50_ms, "ms")
    for limit, label in (
        ("gemm", "its products in torch"),
        ("peak", "its products at the peak"),
        ("copy", "a copy"),
    ):
        points = [
            (size, limit_ms(m.limits[limit], limit)) for size, _, m in curve.points if limit in m.limits
        ]
        if points:
            axis.plot(*zip(*points, strict=True), linestyle="--", linewidth=1, label=f"limit: {label}")
    axis.legend(fontsize=7)


def _memory_panel(axis: Any, curve: Curve) -> None:
    """Above the inputs; what the results alone take is the limit."""
    _panel(axis, curve, lambda c: c.peak_bytes / 1e6 if c.peak_bytes else None, "MB above the inputs")
    points = [(size, m.result_bytes / 1e6) for size, _, m in curve.points if m.result_bytes]
    if points:
        axis.plot(*zip(*points, strict=True), linestyle="--", linewidth=1, label="limit: the results alone")
    axis.legend(fontsize=7)
