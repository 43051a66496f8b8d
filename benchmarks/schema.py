"""The one format of results: these classes are its documentation, and the JSON file is their fields.

A field that changes its meaning, or goes, raises FORMAT; a reader refuses another format. A field that is
added has a default, and so an older file can still be read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 2
PASSES = ("forward", "forward_backward")


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call: 20th percentile, median, 80th percentile; and of how many calls."""

    p20_ms: float
    p50_ms: float
    p80_ms: float
    samples: int


@dataclass(frozen=True)
class Contestant:
    """One way to compute a workload."""

    times: Times
    peak_bytes: int | None
    """At the peak of one call above the inputs, results included (`pymm.benchmarks.memory` says how)."""
    error: float | None
    """Of the forward result against float64, None where that is not known."""
    same: bool
    """False when the result is another one, so that its time says nothing; a peer of pymm, not pymm."""


@dataclass(frozen=True)
class Pass:
    """A workload's forward pass, or forward and backward together."""

    operations: float
    """Multiplications and additions of its matrix products; 0 where it has none."""
    moved_bytes: int
    """Bytes of inputs and results, each once: what has to be read and written at least."""
    result_bytes: int
    """Of the results alone: outputs, and in `forward_backward` gradients."""
    contestants: dict[str, Contestant]
    """`pymm`, `eager`, `compiled` (torch.compile of eager) and peers."""
    limits: dict[str, Times]
    """Of the same work: `peak`, its operations in a register-resident loop on all threads; `gemm`, torch's
    bare products; `copy`, a copy that moves as many bytes."""
    absent: dict[str, str]
    """Contestants that did not run, and why."""


@dataclass(frozen=True)
class Row:
    """A workload, measured."""

    op: str
    label: str
    dtype: str
    kind: str
    """`workload`, `sweep` (a point of a curve) or `call` (a tiny one: what a call costs)."""
    family: str | None
    """Rows of one op, type and family are the points of one curve over `size`."""
    size: int | None
    time: str
    """When it was measured, ISO 8601, UTC."""
    others: float | None = None
    """The share of the processor's time that other processes took meanwhile; None where that is not known."""
    backend: str | None = None
    """Which of pymm's backends ran it."""
    correct: bool | None = None
    """Whether the result and every gradient were within `allowed`; None when the workload was not checked."""
    error: float | None = None
    """Of the result or the gradient that is worst in relation to what is allowed there."""
    allowed: float | None = None
    """By the rule of the op's tests (`pymm.ops._tolerance`)."""
    unchecked: str | None = None
    """Why it was not checked."""
    failure: str | None = None
    """What stopped the measurement."""
    passes: dict[str, Pass] = field(default_factory=dict)
    """`forward`, `forward_backward`."""

    @property
    def key(self) -> str:
        """By which rows are selected and paired: `op/label/dtype`."""
        return f"{self.op}/{self.label}/{self.dtype}"


@dataclass(frozen=True)
class Result:
    """A file of results."""

    format: int
    date: str
    """Of the last row, YYYY-MM-DD."""
    machine: dict[str, Any]
    """What `pymm.ops._machine.machine()` says, and the device."""
    settings: dict[str, Any]
    """Seconds for each workload, whether compiled contestants and memory were measured."""
    interrupted: bool
    rows: list[Row]

    def merged(self, later: Result) -> Result:
        """This result with the rows of a later one; of a row that both hold, the later.

        Raises:
            ValueError: when they are of two machines.
        """
        differing = [k for k, v in self.machine.items() if later.machine.get(k) != v]
        if differing:
            raise ValueError(
                f"bench: rows can be added to those of the same machine only; {', '.join(differing)} differs"
            )
        rows = {row.key: row for row in [*self.rows, *later.rows]}
        return dataclasses.replace(later, rows=list(rows.values()))


def save(result: Result, path: Path) -> None:
    """Write a file at once: whoever reads it, or stops the run, finds the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".new")
    beside.write_text(json.dumps(dataclasses.asdict(result), indent=1) + "\n")
    os.replace(beside, path)


def load(path: Path) -> Result:
    """Read a file.

    Raises:
        ValueError: when it is none, or of another format.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"bench: {path} must be a file of pymm bench, got {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        got = data.get("format") if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"bench: {path} must be a file of pymm bench of format {FORMAT}, got {got}")
    result = _read(Result, data, str(path))
    assert isinstance(result, Result)
    return result


def _has_no_default(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as the type that a field is annotated with."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        assert isinstance(kind, type)
        hints = typing.get_type_hints(kind)
        needed = {f.name for f in dataclasses.fields(kind) if _has_no_default(f)}
        if not isinstance(value, dict) or not needed <= value.keys() <= hints.keys():
            got = ", ".join(value) if isinstance(value, dict) else type(value).__name__
            raise ValueError(f"bench: {where} must hold {', '.join(hints)}, got {got}")
        return kind(**{k: _read(hints[k], part, f"{where}: {k}") for k, part in value.items()})
    if origin is list and isinstance(value, list):
        return [_read(arguments[0], v, f"{where} {i}") for i, v in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {k: _read(arguments[1], v, f"{where}: {k}") for k, v in value.items()}
    if origin is types.UnionType:
        return None if value is None else _read(arguments[0], value, where)
    if kind is Any or (kind is float and type(value) in (int, float)) or type(value) is kind:
        return value
    raise ValueError(f"bench: {where} must be {getattr(kind, '__name__', kind)}, got {value!r}")
