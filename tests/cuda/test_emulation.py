"""The CUDA kernels against the reference, compiled as C++ with emulation.h, on every sample."""

from __future__ import annotations

import pytest
import torch

from pymm.ops import _dispatch, _gpu
from tests.cuda.compiled import SOURCES
from tests.ops.harness import DTYPES, cases, run, sample_of
from tests.ops.test_records import check

NAMES = {source.stem for source in SOURCES}
CASES = [pytest.param(n, i, id=f"{n}-{label}".replace(" ", "_")) for n, i, label in cases() if n in NAMES]


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "index"), CASES)
def test_kernel_equals_reference_in_float64(
    name: str, index: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, sample = sample_of(name, index, dtype)
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    monkeypatch.setattr(_dispatch, "_allowed", lambda kind: ("cuda",))
    monkeypatch.setattr(_gpu, "problem_of", lambda candidate, op: None)
    got = run(op, sample, backend="cuda")
    check(op, sample, dtype, truth, got)
