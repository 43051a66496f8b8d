"""The bounds beside results, and what is said of those that are missed."""

from __future__ import annotations

import dataclasses
import fnmatch
import io
from pathlib import Path

import pytest
from rich.console import Console

from pymm.benchmarks import BenchSettings, run, schema
from pymm.benchmarks.cases import Selection, cases
from pymm.benchmarks.schema import Contestant, Pass, Result, Row, Times
from pymm.benchmarks.targets import TARGETS, findings, outcomes, print_targets

LINEAR = "1600x768->3072 gelu"


def times(ms: float) -> Times:
    return Times(ms, ms, ms, 9)


def row(
    label: str, pymm_ms: float, correct: bool | None = True, op: str = "linear", **peers_ms: float
) -> Row:
    contestants = {
        name: Contestant(times(ms), 1_000_000 * int(ms), 0.0, True)
        for name, ms in {"pymm": pymm_ms, **peers_ms}.items()
    }
    limits = {"peak": times(5.0), "gemm": times(8.0), "copy": times(1.0)}
    one = Pass(1.0, 10, 1_000_000, contestants, limits, {})
    passes = {"forward": one, "forward_backward": one}
    return Row(
        op,
        label,
        "bfloat16",
        "workload",
        None,
        None,
        "",
        correct=correct,
        error=1.0,
        allowed=0.5,
        passes=passes,
    )


def result(*rows: Row, isa: str = "avx512_bf16") -> Result:
    machine = {"processor": "any", "instruction_set": isa}
    return Result(schema.FORMAT, "2026-01-01", machine, {}, False, list(rows))


def of(found: Result, key: str) -> dict[tuple[str, str], tuple[float | None, bool, str]]:
    return {
        (o.target.measured, o.target.what): (o.reached.value if o.reached else None, o.holds, o.why)
        for o in outcomes(found)
        if o.key == key
    }


def printed(found: Result) -> tuple[str, bool]:
    to = Console(file=io.StringIO(), width=250)
    held = print_targets(to, found)
    text: str = to.file.getvalue()  # type: ignore[attr-defined]
    return text, held


def test_every_target_names_a_workload() -> None:
    keys = {case.key for case in cases(Selection())}
    for target in TARGETS:
        assert fnmatch.filter(keys, target.key), target.key


def test_every_finding_is_of_a_target() -> None:
    for finding in findings():
        assert finding.profile
        assert len(finding.tried) >= 3
        for pattern in finding.rows:
            assert any(fnmatch.fnmatchcase(t.key, pattern) for t in TARGETS), pattern


def test_bound_met_and_missed() -> None:
    found = of(result(row(LINEAR, 10.0, eager=15.0, compiled=18.0)), f"linear/{LINEAR}/bfloat16")
    assert found[("forward", "times as fast as the best")] == (1.5, True, "")
    assert found[("forward_backward", "times as fast as the best")] == (1.5, False, "")


def test_the_peak_bounds_the_ratio() -> None:
    (one,) = [
        o for o in outcomes(result(row(LINEAR, 10.0, eager=15.0))) if o.reached and o.target.bound == 2.0
    ]
    assert one.reached is not None
    assert one.reached.at_peak == 3.0


@pytest.mark.parametrize(("correct", "why"), [(False, "wrong"), (None, "unchecked")])
def test_no_ratio_without_a_right_result(correct: bool | None, why: str) -> None:
    found = of(result(row(LINEAR, 1.0, correct, eager=15.0)), f"linear/{LINEAR}/bfloat16")
    assert set(found.values()) == {(None, False, why)}


def test_absent_rows_and_peers_are_said() -> None:
    assert set(of(result(), f"linear/{LINEAR}/bfloat16").values()) == {(None, False, "not measured")}
    alone = of(result(row("N=1024 D=512", 1.0, op="info_nce")), "info_nce/N=1024 D=512/bfloat16")
    assert set(alone.values()) == {(None, False, "no such peer or limit here")}


def test_memory_is_judged_of_unchecked_rows_too() -> None:
    wide = row("N=131072 D=256", 300.0, None, op="info_nce")
    key = "info_nce/N=131072 D=256/bfloat16"
    assert of(result(wide), key) == {("forward_backward", "MB above inputs"): (300.0, True, "")}
    assert of(result(dataclasses.replace(wide, correct=False)), key) == {
        ("forward_backward", "MB above inputs"): (None, False, "wrong")
    }


def test_calls_are_judged_each() -> None:
    calls = [
        dataclasses.replace(row("one tiny call", ms, op=op, eager=0.01), kind="call")
        for op, ms in (("linear", 0.02), ("attention", 0.2))
    ]
    for op, held in (("linear", True), ("attention", False)):
        found = of(result(*calls), f"{op}/one tiny call/bfloat16")
        assert {holds for _, holds, _ in found.values()} == {held}


def test_what_was_tried_is_printed_on_its_machine_only() -> None:
    missed = row(LINEAR, 10.0, eager=11.0)
    text, held = printed(result(missed))
    assert not held
    assert "tried: 256 of K" in text
    assert "profile:" in text
    assert "tried:" not in printed(result(missed, isa="amx"))[0]
    assert "tried:" not in printed(result(row(LINEAR, 1.0, eager=11.0)))[0]


def test_the_command_reads_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    schema.save(result(row(LINEAR, 10.0, eager=15.0)), path)
    assert run(BenchSettings(targets=(str(path),))) == 1
    assert LINEAR in capsys.readouterr().out
