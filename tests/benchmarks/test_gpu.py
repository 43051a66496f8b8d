"""The program that tests and measures on a GPU, as far as it goes without one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pymm.ops._record import REGISTRY, Workload

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import gpu

    monkeypatch.setattr(gpu, "DEVICE", "cpu")
    monkeypatch.setattr(gpu, "_time", lambda call: (call(), {"p20_ms": 1.0, "p50_ms": 2.0, "p80_ms": 3.0})[1])
    monkeypatch.setattr(gpu, "sdpa_kernel", lambda choice: nullcontext())
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    return gpu


def test_runs_samples_in_the_interpreter(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--workers", "1"]
    done = subprocess.run(
        [*command, "--ops", "triplet_loss", "--leave-out", "many rows", "--out", str(tmp_path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu.json").read_text())
    samples = [s.label for s in REGISTRY["triplet_loss"].samples(torch.float32)]
    samples = [label for label in samples if "many rows" not in label]  # half a minute of the interpreter
    assert sorted({t["sample"] for t in result["tests"]}) == sorted(samples)
    assert len(result["tests"]) == 4 * len(samples)
    # Triton leaves float64 to CUDA C++.
    found = {(t["dtype"] == "float64", t["status"]) for t in result["tests"]}
    assert found == {(False, "ok"), (True, "left out")}


def test_a_wrong_kernel_is_told(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import gpu_tests

    results = gpu_tests._results

    def spoiled(op, function, args, kwargs, backend, dtype=None):
        found = results(op, function, args, kwargs, "reference", dtype)
        return {k: v + 1e-3 for k, v in found.items()} if backend == "triton" else found

    monkeypatch.setattr(gpu_tests, "_results", spoiled)
    monkeypatch.setattr(gpu_tests.ops, "explain", lambda *_, **__: None)
    row = gpu_tests._compared("triplet_loss", "triton", 2, torch.float32, "cpu")
    assert row["status"] == "wrong"


def test_every_workload_has_an_op_that_takes_it(gpu: ModuleType) -> None:
    found = list(gpu.gpu_workloads())
    assert {op.name for op, _, _ in found} == set(REGISTRY)
    labels = [(op.name, w.label) for op, w, _ in found]
    assert len(set(labels)) == len(labels)


@pytest.mark.parametrize("name", ["attention", "info_nce", "cosine_topk"])
def test_row_has_every_contestant(gpu: ModuleType, name: str) -> None:
    op = REGISTRY[name]
    sample = next(s for s in op.samples(torch.float32) if s.label == "ragged" or name == "cosine_topk")
    kwargs = {k: v for k, v in sample.kwargs.items() if k != "return_lse"}
    workload = Workload("small", torch.float32, lambda dtype: (sample.args, kwargs), gemm=(8, 8, 8))
    row = gpu.measured(op, workload, False)
    for key in ("forward", "forward_backward"):
        times = row[key]
        assert "the tensors are on cpu" in times.pop("triton")["failed"]  # a failure is a finding, and told
        assert {"copy", "gemm"} < times.keys()
        assert all(t["p50_ms"] > 0 for t in times.values())
    gpu.print_row(row)
