"""The runner, on tiny workloads."""

from __future__ import annotations

import dataclasses
import importlib.util
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from pymm import ops
from pymm.benchmarks import BenchSettings, command, limits, measure, peers, report, run, schema
from pymm.benchmarks.cases import Selection, cases, names, of_op
from pymm.benchmarks.compare import moves
from pymm.benchmarks.load import Load
from pymm.benchmarks.measure import Options
from pymm.benchmarks.memory import peak_bytes
from pymm.benchmarks.plots import curves, draw
from pymm.benchmarks.timing import interleaved
from pymm.layers.block import transformer_blocks
from pymm.ops._record import Op, Workload

OP = ops.REGISTRY["cosine_similarity"]
CPU = torch.device("cpu")
QUICK = Options(seconds=0.01, compiled=False)


def workload(n: int = 20, **changes: Any) -> Workload:
    def make(dtype: torch.dtype) -> Any:
        return (torch.randn(n, 8).to(dtype), torch.randn(24, 8).to(dtype)), {}

    found = Workload(f"small {n}", torch.float32, make, gemm=(n, 24, 8), family="D=8", size=n)
    return dataclasses.replace(found, **changes)


def record(*workloads: Workload, **changes: Any) -> Op:
    return dataclasses.replace(OP, workloads=lambda: list(workloads), **changes)


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[[Op], None]:
    """Makes a record the only one."""

    def replace(op: Op) -> None:
        monkeypatch.setattr(ops, "REGISTRY", {op.name: op})
        monkeypatch.setitem(ops._record.REGISTRY, op.name, op)
        monkeypatch.setattr("pymm.benchmarks.composed.CASES", {})

    return replace


def settings(**changes: Any) -> BenchSettings:
    return BenchSettings(seconds=0.01, compiled=False, memory=False, **changes)


def wrong(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return OP.function(x, y) * (1.0 if x.dtype == torch.float64 else 1.01)


wrong.__name__ = OP.name


def broken(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no such instruction")


def test_row_has_every_contestant_and_limit() -> None:
    (case, call) = of_op(record(workload()))
    row = measure.measure(case, Options(seconds=1.0))  # far above a call, also where others are busy
    assert row.failure is None
    assert row.correct is True
    assert row.passes.keys() == {"forward", "forward_backward"}
    for measured in row.passes.values():
        assert measured.contestants.keys() >= {"pymm", "eager", "compiled"}
        assert measured.limits.keys() == {"gemm", "peak", "copy"}
        for contestant in measured.contestants.values():
            t = contestant.times
            assert 0 < t.p20_ms <= t.p50_ms <= t.p80_ms
            assert t.samples >= 3
            assert contestant.peak_bytes is not None
            assert contestant.error is not None
            assert contestant.error < 1e-5
    forward, both = row.passes["forward"], row.passes["forward_backward"]
    assert (forward.operations, both.operations) == (2 * 20 * 24 * 8, 3 * 2 * 20 * 24 * 8)
    assert (forward.result_bytes, both.result_bytes) == (4 * 20 * 24, 4 * (20 * 24 + 20 * 8 + 24 * 8))
    assert call.kind == "call"
    assert measure.measure(call, QUICK).passes["forward"].contestants.keys() == {"pymm", "eager"}


def test_every_row_of_the_promise_is_a_workload() -> None:
    """The shapes that the project has set itself limits for."""
    keys = {case.key for case in cases(Selection())}
    for key in (
        "info_nce/N=8192 D=512/bfloat16",
        "info_nce/N=1024 D=512/bfloat16",
        "info_nce/N=256 D=512/bfloat16",
        "info_nce/N=8192 D=512/float32",
        "info_nce/N=131072 D=256/bfloat16",
        *(f"attention/B8 H12 T{t} D64/{d}" for t in (197, 577) for d in ("bfloat16", "float32")),
        *(f"attention/B16 H8 T77 D64 causal{m}/bfloat16" for m in ("", ", key padding")),
        "attention/B8 H12 T197 D64 bias/bfloat16",
        "attention/B1 H32/8 T1 S4096 D128/bfloat16",
        *(f"patch_embed/B=8 224x224 p={p}/bfloat16" for p in ("16 C=768", "32 C=768", "14 C=1024")),
        "patch_embed/B=8 224x224 p=16 C=768 keep 25%/bfloat16",
        *(f"linear/{m}x768->3072 gelu/bfloat16" for m in (1600, 6304)),
        "vit_block/ViT-B/16 B=8 T=197/bfloat16",
        "cosine_similarity/4096x4096x512/bfloat16",
        "cosine_topk/256x1000000x256 k=10/float32",
        "mined_triplet_loss/4096x256 hard/float32",
        *(f"{name}/one tiny call/float32" for name in ops.REGISTRY),
    ):
        assert key in keys
    assert len(keys) == len(cases(Selection()))


def test_selection() -> None:
    chosen = cases(Selection(("attention", "vit_block"), ("t197", "bfloat16")))
    assert {case.op for case in chosen} == {"attention"}
    rows = ("B8 H12 T197 D64", "B8 H12 T197 D64 bias", "B8 H12 T197 D64 fused projection")
    assert {case.label for case in chosen} == set(rows)
    assert len(cases(Selection(("info_nce",), sweep=True))) > len(cases(Selection(("info_nce",))))
    with pytest.raises(ValueError, match="got no_such_op"):
        cases(Selection(("no_such_op",)))
    with pytest.raises(ValueError, match="do not hold 'nothing like it'"):
        cases(Selection((), ("nothing like it",)))
    assert names()[-1] == "vit_block"


def test_block_is_that_of_the_layers() -> None:
    from pymm.benchmarks.composed import HEADS, HIDDEN, PARAMETERS, WIDTH

    case = cases(Selection(("vit_block",), ("float32",)))[0]
    (_, *parameters), _ = case.make(torch.float32)
    (block,) = transformer_blocks(1, WIDTH, HEADS, HIDDEN)
    block.load_state_dict(dict(zip(PARAMETERS, parameters, strict=True)))
    x = torch.randn(1, 5, WIDTH)
    with torch.no_grad():
        expected = block(x)
        torch.testing.assert_close(case.function(x, *parameters), expected)
        assert case.eager is not None
        torch.testing.assert_close(case.eager(x, *parameters), expected)


def test_writes_adds_and_compares(
    only: Callable[[Op], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "deep" / "a.json"
    only(record(workload(20), workload(30)))
    assert run(settings(out=str(file), filter=("small 20",))) == 0
    assert run(settings(out=str(file), filter=("small 30",))) == 0
    result = schema.load(file)
    assert [row.label for row in result.rows] == ["small 20", "small 30"]
    assert result.machine["torch"] == torch.__version__
    assert run(BenchSettings(compare=(str(file), str(file)))) == 0
    assert "1.00" in capsys.readouterr().out
    assert run(BenchSettings(show=(str(file),))) == 0
    assert "small 30" in capsys.readouterr().out
    strange = dataclasses.replace(result, machine={**result.machine, "threads": 99})
    with pytest.raises(ValueError, match="threads differs"):
        result.merged(strange)


def test_save_names_the_day_and_the_machine(only: Callable[[Op], None], tmp_path: Path) -> None:
    only(record(workload()))
    assert run(settings(save="tiny", directory=str(tmp_path))) == 0
    (file,) = tmp_path.iterdir()
    result = schema.load(file)
    assert file.name.startswith(result.date + "_")
    assert file.name.endswith("_tiny.json")


def test_schema_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    with pytest.raises(ValueError, match="must be a file of pymm bench"):
        run(BenchSettings(compare=(str(file), str(file))))
    result = schema.Result(schema.FORMAT, "2026-01-01", {}, {}, False, [])
    schema.save(result, file)
    assert schema.load(file) == result
    full = _result({8: (_times(1, 1, 1), _times(2, 2, 2))})
    schema.save(full, file)
    assert schema.load(file) == full
    older = json.loads(file.read_text())
    del older["rows"][0]["others"]
    file.write_text(json.dumps(older))
    assert schema.load(file).rows[0] == dataclasses.replace(full.rows[0], others=None)
    schema.save(result, file)
    data = json.loads(file.read_text())
    for change in ({"format": 1}, {"rows": [{}]}, {"interrupted": "no"}, {"more": 0}):
        file.write_text(json.dumps({**data, **change}))
        with pytest.raises(ValueError, match="must"):
            schema.load(file)


def test_no_ratio_for_a_wrong_result(
    only: Callable[[Op], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    only(record(workload(), function=wrong))
    file = tmp_path / "a.json"
    assert run(settings(out=str(file), filter=("small",))) == 1
    text = capsys.readouterr().out
    assert text.count("eager") >= 2
    assert "times as fast" not in text
    assert "wrong" in text
    (row,) = schema.load(file).rows
    assert row.correct is False
    table = next(line for line in text.splitlines() if "small" in line and "│" in line)
    cells = [cell.strip() for cell in table.split("│")[1:-1]]
    assert cells[4:6] == ["wrong", "wrong"]


def test_a_failure_is_a_row(
    only: Callable[[Op], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = iter([workload(20, make=lambda dtype: 1 / 0), workload(30)])
    only(record(*calls))
    file = tmp_path / "a.json"
    assert run(settings(out=str(file), filter=("small",))) == 1
    first, second = schema.load(file).rows
    assert first.failure == "ZeroDivisionError: division by zero"
    assert second.passes["forward"].contestants.keys() >= {"pymm", "eager"}
    assert "failed: cosine_similarity/small 20/float32: ZeroDivisionError" in capsys.readouterr().out
    broken.__name__ = OP.name
    row = measure.measure(of_op(record(workload(), function=broken, eager=None))[0], QUICK)
    assert row.failure == "RuntimeError: no such instruction"


def test_an_interruption_keeps_what_was_measured(
    only: Callable[[Op], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    original = measure.measure

    def once(case: Any, options: Any) -> Any:
        if "30" in case.label:
            raise KeyboardInterrupt
        return original(case, options)

    monkeypatch.setattr(command, "measure", once)
    only(record(workload(20), workload(30), workload(40)))
    file = tmp_path / "a.json"
    assert run(settings(out=str(file))) == command.INTERRUPTED
    result = schema.load(file)
    assert result.interrupted
    assert [row.label for row in result.rows] == ["small 20"]


def test_a_terminal_has_a_bar(only: Callable[[Op], None], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Console(force_terminal=True, file=io.StringIO(), width=100)
    monkeypatch.setattr(command, "console", lambda: terminal)
    only(record(workload()))
    assert run(settings(filter=("small",))) == 0
    text = terminal.file.getvalue()
    assert "0/1" in text
    assert "times as fast" in text


def test_absent_peers_are_named(
    monkeypatch: pytest.MonkeyPatch, only: Callable[[Op], None], capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name in peers.PACKAGES else real(name, *a)
    )
    only(record(workload()))
    assert run(settings(filter=("small",))) == 0
    assert "torchmetrics (2 passes): not installed: pip install torchmetrics" in capsys.readouterr().out


def test_peers_that_fail_or_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    def unsuitable(args: Any, kwargs: Any) -> Any:
        raise peers.Unsuitable("has no such option")

    listed = (
        peers.Peer("fails", lambda args, kwargs: broken),
        peers.Peer("differs", lambda args, kwargs: lambda x, y: OP.function(x, y) * 2),
        peers.Peer("agrees", lambda args, kwargs: OP.function, backward=False),
        peers.Peer("cannot", unsuitable),
    )
    monkeypatch.setattr(peers, "PEERS", {OP.name: listed})
    row = measure.measure(of_op(record(workload()))[0], QUICK)
    forward, both = row.passes["forward"], row.passes["forward_backward"]
    assert forward.absent == {"fails": "RuntimeError: no such instruction", "cannot": "has no such option"}
    assert both.absent["agrees"] == "has no gradient"
    assert {k: c.same for k, c in forward.contestants.items()} == {
        "pymm": True,
        "eager": True,
        "differs": False,
        "agrees": True,
    }


@pytest.mark.parametrize(
    ("op", "words"),
    [
        ("attention", ("t77",)),
        ("attention", ("t197", "bias", "float32")),
        ("patch_embed", ("p=32", "float32")),
        ("patch_embed", ("keep", "float32")),
        ("triplet_loss", ("1024x", "float32")),
        ("attention_varlen", ("8 sequences", "float32")),
        ("cosine_similarity", ("1024x", "float32")),
        ("info_nce", ("n=256",)),
        ("mined_triplet_loss", ("512x256 all", "float32")),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_peers_compute_the_same(op: str, words: tuple[str, ...]) -> None:
    """What is written out in torch, and in the libraries that are installed, equals the op."""
    for case in cases(Selection((op,), words)):
        torch.manual_seed(0)
        args, kwargs = case.make(torch.float32)
        expected = case.function(*args, **kwargs)
        found, _ = peers.peers(case, args, kwargs, False)
        written = {k: f for k, (f, _) in found.items() if not k.startswith("SDPA")}
        if len(written) == 1 and all(peer.module for peer in peers.PEERS[op]):
            pytest.skip("needs one of the libraries")
        assert len(written) > 1
        for name, function in written.items():
            torch.testing.assert_close(
                function(*args, **kwargs), expected, atol=1e-3, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_a_peer_that_outlasts_its_budget_is_measured_once() -> None:
    import time

    def slow(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        time.sleep(0.6)
        return OP.function(x, y)

    case = dataclasses.replace(of_op(record(workload()))[0], eager=slow, backward=False)
    forward = measure.measure(case, dataclasses.replace(QUICK, seconds=0.5)).passes["forward"]
    assert forward.contestants["eager"].times.samples == 1
    assert forward.contestants["eager"].times.p50_ms >= 600
    assert forward.contestants["pymm"].times.samples >= 3


def test_alone_runs_no_contestant_and_claims_nothing(
    only: Callable[[Op], None], capsys: pytest.CaptureFixture[str]
) -> None:
    only(record(workload(alone=True)))
    assert run(settings(filter=("small",))) == 0
    text = capsys.readouterr().out
    assert "would not fit" in text
    assert "times as fast" not in text


def test_peak_memory_is_the_temporaries() -> None:
    size = 48 << 20

    def call() -> torch.Tensor:
        temporary = torch.ones(size, dtype=torch.uint8)
        return temporary[:10].clone()

    call()
    peak = peak_bytes(call, CPU)
    assert peak is not None
    assert abs(peak - size) < 2 << 20
    small = peak_bytes(lambda: torch.ones(16), CPU)
    assert small is not None
    assert small < 2 << 20


def test_peak_rate_is_that_of_arithmetic() -> None:
    from pymm.ops._extension import require_extension

    extension = require_extension()
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        once, twice = (extension.peak_operations(dtype, n) for n in (100, 200))
        assert twice == 2 * once > 0
    with pytest.raises(ValueError, match="dtype must be float32"):
        extension.peak_operations("int8", 1)
    with pytest.raises(ValueError, match="steps must be positive"):
        extension.peak_operations("float32", 0)


def test_others_are_what_is_busy_and_not_ours() -> None:
    before, after = Load(100.0, 60.0, 5.0), Load(120.0, 72.0, 8.0)
    assert after.others_since(before) == pytest.approx((12 - 3) / 20)
    assert before.others_since(before) == 0.0
    first = Load.now()
    assert first is not None
    sum(i * i for i in range(10**6))
    second = Load.now()
    assert second is not None
    assert second.own > first.own
    assert 0.0 <= second.others_since(first) <= 1.0


def test_a_disturbed_row_says_so() -> None:
    row = dataclasses.replace(_result({8: (_times(1, 1, 1), _times(2, 2, 2))}).rows[0], others=0.4)
    assert "disturbed: others took 40% of the processor" in next(report.line(row))
    assert "disturbed" not in next(report.line(dataclasses.replace(row, others=0.02)))


def test_peak_is_not_taken_from_the_start_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every call waits 9 ms, and then does 1000 steps in a millisecond."""
    clock = 0.0

    def operations(dtype: str, steps: int) -> float:
        nonlocal clock
        clock += 9e-3 + steps * 1e-6
        return float(steps)

    monkeypatch.setattr(limits, "EXTENSION", SimpleNamespace(peak_operations=operations))
    monkeypatch.setattr(limits, "time", SimpleNamespace(perf_counter=lambda: clock))
    bound = limits.limits([(1000, 1000, 500)], 0, torch.float32, CPU)["peak"]
    before = clock
    bound.call()
    rate = 1e9 / bound.factor / (clock - before)
    assert 0.5e6 < rate < 1e6


def test_interleaved_gives_all_a_turn_in_each_round() -> None:
    order: list[str] = []
    taken = interleaved({name: lambda n=name: order.append(n) for name in "abc"}, 0.0, CPU)
    assert all(len(seconds) == 3 for seconds in taken.values())
    rounds = [order[i : i + 3] for i in range(0, 9, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in rounds)


def _times(p20: float, p50: float, p80: float) -> schema.Times:
    return schema.Times(p20, p50, p80, 9)


def _result(points: dict[int, tuple[schema.Times, schema.Times]], correct: bool = True) -> schema.Result:
    def rows() -> Iterator[schema.Row]:
        for n, (pymm, eager) in points.items():
            contestants = {
                "pymm": schema.Contestant(pymm, 10 * n, 0.0, True),
                "eager": schema.Contestant(eager, 99 * n * n, 0.0, True),
            }
            measured = schema.Pass(2.0 * n, 8 * n, n, contestants, {"gemm": _times(1, 1, 1)}, {})
            yield schema.Row(
                *("op", f"N={n}", "float32", "workload", "D=8", n, "2026-01-01T00:00:00Z", 0.0, "cpu"),
                correct=correct,
                error=0.0,
                allowed=1.0,
                passes={"forward": measured},
            )

    facts = {"processor": "a", "threads": 2, "instruction_set": "avx2", "torch": "2"}
    return schema.Result(schema.FORMAT, "2026-01-01", facts, {}, False, list(rows()))


def test_moves_are_those_beyond_the_spread() -> None:
    steady = _times(9, 10, 11)
    before = _result({1: (steady, steady), 2: (steady, steady), 3: (steady, steady), 7: (steady, steady)})
    after = _result(
        {
            1: (_times(4, 5, 6), steady),
            2: (_times(8, 9, 9.5), _times(5, 5, 5)),
            3: (_times(12, 20, 30), steady),
        }
    )
    found = {move.key: (move.verdict, move.ratio, move.eager) for move in moves(before, after)}
    assert found == {
        "op/N=1/float32": ("faster", 2.0, 1.0),
        "op/N=2/float32": ("same", 10 / 9, 2.0),
        "op/N=3/float32": ("slower", 0.5, 1.0),
    }
    with pytest.raises(ValueError, match="no workload in common"):
        moves(before, _result({8: (steady, steady)}))


def test_plots(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    steady = _times(9, 10, 11)
    result = _result({n: (steady, _times(20, 21, 22)) for n in (8, 16, 32)})
    assert [curve.names for curve in curves(result)] == [["pymm", "eager"]]
    paths = draw(result, tmp_path / "plots")
    assert [path.name for path in paths] == ["ratio.png", "time.png", "memory.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert draw(_result({8: (steady, steady)}), tmp_path)[0].name == "ratio.png"


def test_errors() -> None:
    with pytest.raises(ValueError, match="--seconds must be positive"):
        run(BenchSettings(seconds=0.0))
    with pytest.raises(ValueError, match="--device must be one that this machine has, got 'nowhere'"):
        run(settings(device="nowhere", filter=("tiny",)))
