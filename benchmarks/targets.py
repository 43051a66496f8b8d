"""What pymm sets out to reach on a CPU, what a result measured, and what is known of the rows that miss it.

The bounds are meant for two threads of a machine with AMX, whose bare products in torch leave more than half
of the peak unused. Elsewhere a bound may lie above the machine's own limit: the column "at the peak" says
what would be reached if the matrix products took no longer than a register-resident loop and everything else
nothing.
"""

from __future__ import annotations

import fnmatch
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from pymm.benchmarks.report import WORDS, best_peer, limit_ms, number, verdict
from pymm.benchmarks.schema import Pass, Result, Row

FINDINGS = Path(__file__).with_name("findings.toml")
BOTH = ("forward_backward", "forward")


@dataclass(frozen=True)
class Reached:
    """What was measured, and what it would be at the peak; None where that says nothing."""

    value: float
    at_peak: float | None = None


Measure = Callable[[Mapping[str, Row], Row, Pass], Reached | None]


@dataclass(frozen=True)
class Target:
    """A bound on one pass of one workload."""

    key: str
    """`op/label/dtype`, or a pattern of it."""
    measured: str
    """The pass."""
    what: str
    """The quantity, in words."""
    bound: float
    measure: Measure
    at_most: bool = False
    unchecked_too: bool = False
    """Whether it says something of a row whose result was not compared: memory does, speed does not."""

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound


@dataclass(frozen=True)
class Finding:
    """What is known of rows that miss their bounds on one kind of machine."""

    rows: tuple[str, ...]
    """Patterns of `op/label/dtype`."""
    instruction_set: str
    profile: str
    """Where the time goes."""
    tried: tuple[str, ...]
    """Designs that were measured, and what came of each."""


@dataclass(frozen=True)
class Outcome:
    """A target beside what a result says; `reached` is None where something that it needs is absent."""

    target: Target
    key: str
    reached: Reached | None
    why: str = ""

    @property
    def holds(self) -> bool:
        return self.reached is not None and self.target.holds(self.reached.value)


def _times_as_fast(peers: tuple[str, ...] | None) -> Measure:
    """How many times as fast as the fastest of these; of all that compute the same, when None."""

    def measure(rows: Mapping[str, Row], row: Row, of: Pass) -> Reached | None:
        if peers is None:
            best = best_peer(of)
            found = [] if best is None else [best[1]]
        else:
            found = [of.contestants[p] for p in peers if p in of.contestants and of.contestants[p].same]
        if not found:
            return None
        theirs = min(c.times.p50_ms for c in found)
        peak = of.limits.get("peak")
        return Reached(
            theirs / of.contestants["pymm"].times.p50_ms, theirs / limit_ms(peak, "peak") if peak else None
        )

    return measure


def _share_of(limit: str) -> Measure:
    def measure(rows: Mapping[str, Row], row: Row, of: Pass) -> Reached | None:
        if limit not in of.limits:
            return None
        bound = limit_ms(of.limits[limit], limit)
        peak = of.limits.get("peak")
        at_peak = bound / limit_ms(peak, "peak") if peak and limit == "gemm" else None
        return Reached(bound / of.contestants["pymm"].times.p50_ms, at_peak)

    return measure


def _megabytes(results_too: bool) -> Measure:
    """The peak above the inputs, with or without the results."""

    def measure(rows: Mapping[str, Row], row: Row, of: Pass) -> Reached | None:
        peak = of.contestants["pymm"].peak_bytes
        return None if peak is None else Reached((peak - (0 if results_too else of.result_bytes)) / 1e6)

    return measure


def _memory_beside(peer: str) -> Measure:
    def measure(rows: Mapping[str, Row], row: Row, of: Pass) -> Reached | None:
        ours, theirs = (
            of.contestants[name].peak_bytes if name in of.contestants else None for name in ("pymm", peer)
        )
        return None if ours is None or not theirs else Reached(ours / theirs)

    return measure


def _microseconds_above_eager(rows: Mapping[str, Row], row: Row, of: Pass) -> Reached | None:
    eager = of.contestants.get("eager")
    if eager is None:
        return None
    return Reached(1e3 * (of.contestants["pymm"].times.p50_ms - eager.times.p50_ms))


def _fast(
    key: str, bound: float, peers: tuple[str, ...] | None = None, passes: tuple[str, ...] = BOTH[:1]
) -> list[Target]:
    words = "the best" if peers is None else " or ".join(peers)
    return [Target(key, p, f"times as fast as {words}", bound, _times_as_fast(peers)) for p in passes]


_EAGER, _COMPILED = ("eager",), ("compiled",)
_ALL_PATCHES = ("eager", "compiled", "reshape + linear", "reshape + linear, compiled")
_T197, _T577 = "attention/B8 H12 T197 D64", "attention/B8 H12 T577 D64"
_T77 = "attention/B16 H8 T77 D64 causal"

TARGETS: tuple[Target, ...] = (
    *_fast("info_nce/N=8192 D=512/bfloat16", 6.0, _EAGER),
    *_fast("info_nce/N=8192 D=512/bfloat16", 2.7, _COMPILED),
    Target(
        "info_nce/N=8192 D=512/bfloat16", BOTH[0], "of its bare products' speed", 1 / 1.3, _share_of("gemm")
    ),
    Target(
        "info_nce/N=8192 D=512/bfloat16",
        BOTH[0],
        "MB above inputs and results",
        20.0,
        _megabytes(False),
        True,
    ),
    *_fast("info_nce/N=1024 D=512/bfloat16", 2.5, _EAGER),
    *_fast("info_nce/N=1024 D=512/bfloat16", 1.5, _COMPILED),
    *_fast("info_nce/N=256 D=512/bfloat16", 1.3, _EAGER),
    *_fast("info_nce/N=8192 D=512/float32", 1.8, _EAGER),
    *_fast("info_nce/N=8192 D=512/float32", 1.0, _COMPILED),
    Target(
        "info_nce/N=131072 D=256/bfloat16", BOTH[0], "MB above inputs", 400.0, _megabytes(True), True, True
    ),
    *_fast(f"{_T197}/bfloat16", 2.5),
    *_fast(f"{_T577}/bfloat16", 4.0),
    *(t for more in ("", ", key padding") for t in _fast(f"{_T77}{more}/bfloat16", 2.0)),
    *(
        t
        for key in (_T197, _T577, _T77, f"{_T77}, key padding")
        for t in _fast(f"{key}/bfloat16", 1.5, passes=("forward",))
    ),
    *_fast(f"{_T197} bias/bfloat16", 2.0),
    *(t for key in (_T197, _T577, _T77, f"{_T77}, key padding") for t in _fast(f"{key}/float32", 1.3)),
    Target(
        "attention/B1 H32/8 T1 S4096 D128/bfloat16", "forward", "of a copy's speed", 0.7, _share_of("copy")
    ),
    *(
        t
        for patch in ("16 C=768", "32 C=768", "14 C=1024")
        for t in _fast(f"patch_embed/B=8 224x224 p={patch}/bfloat16", 1.6)
    ),
    *_fast("patch_embed/B=8 224x224 p=16 C=768 keep 25%/bfloat16", 3.0, _ALL_PATCHES),
    *(
        t
        for rows in (1600, 6304)
        for bound, one in ((2.0, BOTH[:1]), (1.4, BOTH[1:]))
        for t in _fast(f"linear/{rows}x768->3072 gelu/bfloat16", bound, passes=one)
    ),
    *_fast("vit_block/ViT-B/16 B=8 T=197/bfloat16", 2.0),
    *_fast("cosine_similarity/4096x4096x512/bfloat16", 2.0, _EAGER, passes=("forward",)),
    *_fast("cosine_topk/256x1000000x256 k=10/float32", 2.0, ("eager", "compiled"), passes=("forward",)),
    *_fast("cosine_topk/256x1000000x256 k=10/float32", 1.0, ("faiss",), passes=("forward",)),
    *_fast("mined_triplet_loss/4096x256 hard/float32", 3.0, ("pytorch-metric-learning",)),
    Target(
        "mined_triplet_loss/4096x256 hard/float32",
        BOTH[0],
        "of the memory of pytorch-metric-learning",
        0.05,
        _memory_beside("pytorch-metric-learning"),
        True,
    ),
    Target("*/one tiny call/*", "forward", "µs above eager", 15.0, _microseconds_above_eager, True),
    Target("*/one tiny call/*", "forward_backward", "µs above eager", 40.0, _microseconds_above_eager, True),
)


def findings(path: Path = FINDINGS) -> list[Finding]:
    """What the file says; its fields are those of `Finding`."""
    tables = tomllib.loads(path.read_text())["finding"]
    return [Finding(tuple(t["rows"]), t["instruction_set"], t["profile"], tuple(t["tried"])) for t in tables]


def outcomes(result: Result) -> Iterator[Outcome]:
    """Every target beside the rows of a result that it names."""
    rows = {row.key: row for row in result.rows}
    for target in TARGETS:
        keys = [key for key in rows if fnmatch.fnmatchcase(key, target.key)]
        for key in keys or [target.key]:
            yield _outcome(target, key, rows)


def _outcome(target: Target, key: str, rows: Mapping[str, Row]) -> Outcome:
    row = rows.get(key)
    of = None if row is None else row.passes.get(target.measured)
    if row is None or of is None:
        return Outcome(target, key, None, "not measured")
    allowed = {"", "unchecked"} if target.unchecked_too or row.kind == "call" else {""}
    if verdict(row) not in allowed:
        return Outcome(target, key, None, verdict(row))
    reached = target.measure(rows, row, of)
    return Outcome(target, key, reached, "" if reached is not None else "no such peer or limit here")


def print_targets(to: Console, result: Result) -> bool:
    """The table, and what is known of the rows that miss their bound; whether every row reached it."""
    found = list(outcomes(result))
    table = Table(title=f"Targets, {result.date}, {result.machine.get('processor')}", title_justify="left")
    table.add_column("workload", overflow="fold")
    for heading in ("pass", "target"):
        table.add_column(heading)
    for heading in ("reached", "at the peak"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for outcome in found:
        target, reached = outcome.target, outcome.reached
        sign = "≤" if target.at_most else "≥"
        table.add_row(
            outcome.key,
            WORDS[target.measured],
            f"{sign} {number(target.bound)} {target.what}",
            outcome.why if reached is None else number(reached.value),
            "" if reached is None or reached.at_peak is None else number(reached.at_peak),
            "yes" if outcome.holds else "no",
        )
    to.print(table)
    missed = [outcome.key for outcome in found if outcome.reached is not None and not outcome.holds]
    for finding in findings():
        rows = [k for k in dict.fromkeys(missed) if any(fnmatch.fnmatchcase(k, p) for p in finding.rows)]
        if rows and finding.instruction_set == result.machine.get("instruction_set"):
            to.print(f"{'; '.join(rows)}:", markup=False, style="bold")
            to.print(f"  profile: {finding.profile}", markup=False)
            for text in finding.tried:
                to.print(f"  tried: {text}", markup=False)
    return all(outcome.holds for outcome in found)
