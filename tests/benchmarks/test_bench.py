from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pymm import ops
from pymm.benchmarks import BenchSettings, run
from pymm.benchmarks.measure import Times, interleaved, measure
from pymm.ops._record import Workload

OP = ops.REGISTRY["cosine_similarity"]
SMALL = Workload(
    "small",
    torch.float32,
    lambda dtype: ((torch.randn(20, 8).to(dtype), torch.randn(24, 8).to(dtype)), {}),
    gemm=(20, 24, 8),
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    op = dataclasses.replace(OP, workloads=lambda: [SMALL])
    monkeypatch.setitem(ops.REGISTRY, OP.name, op)


def settings(**changes: Any) -> BenchSettings:
    return BenchSettings(ops=("cosine_similarity",), seconds=0.01, compiled=False, **changes)


def test_row_has_every_contestant() -> None:
    row = measure(OP, SMALL, 0.01, True)
    assert row["correct"] is True
    for key in ("forward", "forward_backward"):
        assert row[key].keys() == {"pymm", "eager", "compiled", "gemm", "copy"}
        assert all(t["p20_ms"] <= t["p50_ms"] <= t["p80_ms"] for t in row[key].values())


@pytest.mark.usefixtures("small")
def test_writes_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "deep" / "a.json"
    assert run(settings(out=str(file))) == 0
    result = json.loads(file.read_text())
    assert [row["workload"] for row in result["workloads"]] == ["small"]
    assert result["machine"]["torch"] == torch.__version__
    assert run(BenchSettings(compare=(str(file), str(file)))) == 0
    assert "1.00" in capsys.readouterr().out


def test_no_ratio_for_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def cosine_similarity(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return OP.function(x, y) * (1.0 if x.dtype == torch.float64 else 1.01)

    wrong = dataclasses.replace(OP, function=cosine_similarity, workloads=lambda: [SMALL])
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setitem(ops.REGISTRY, OP.name, wrong)
    assert run(settings()) == 1
    assert "wrong" in capsys.readouterr().out


def test_errors() -> None:
    with pytest.raises(ValueError, match="got no_such_op"):
        run(BenchSettings(ops=("no_such_op",)))
    with pytest.raises(ValueError, match="holds 'nothing like it'"):
        run(settings(only="nothing like it"))
    with pytest.raises(ValueError, match="must be a file of pymm bench"):
        run(BenchSettings(compare=("/no/such/file", "/no/such/file")))


def test_interleaved_runs_all_alike() -> None:
    order: list[str] = []
    times = interleaved({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 0.0, least=7)
    assert order == ["a", "b"] * 8
    assert all(isinstance(t, Times) for t in times.values())
