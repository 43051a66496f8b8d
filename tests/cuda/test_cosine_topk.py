"""What the samples of top-k's record do not reach: parts of several tiles, long lists, mixed types, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymm import ops
from pymm.ops import _dispatch, _gpu
from tests.ops.harness import DTYPES

pytestmark = pytest.mark.usefixtures("emulated", "poisoned")

# (N, M, D, k)
CASES = {
    "parts of several tiles": (5, 1000, 24, 10),
    "more neighbours than a tile has rows": (3, 517, 16, 300),
    "queries in several goes": (67, 140, 9, 70),
    "ragged edges": (66, 385, 35, 33),
    "as many neighbours as are kept": (2, 300, 8, 64),
}


def topk(monkeypatch: pytest.MonkeyPatch, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    monkeypatch.setattr(_dispatch, "_allowed", lambda kind: ("cuda",))
    monkeypatch.setattr(_gpu, "problem_of", lambda candidate, op: None)
    with ops.backend("cuda"):
        return ops.cosine_topk(x, y, k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_every_tie(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    n, m, d, k = CASES[name]
    x, y = torch.randn(n, d).sign(), torch.randn(m, d).sign()  # products exact, all norms equal
    values, indices = topk(monkeypatch, x.to(dtype), y.to(dtype), k)
    best, at = (x @ y.mT).sort(descending=True, stable=True)
    assert torch.equal(indices, at[:, :k])
    torch.testing.assert_close(values, (best[:, :k] / d).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bank_of_a_narrower_type(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(70, 37), torch.randn(500, 37).to(dtype)
    values, indices = topk(monkeypatch, x, y, 20)
    wide_values, wide_indices = topk(monkeypatch, x, y.float(), 20)
    assert values.dtype == torch.float32
    assert torch.equal(values, wide_values)
    assert torch.equal(indices, wide_indices)
    expected, _ = ops.cosine_topk(x.double(), y.double(), 20)
    torch.testing.assert_close(values.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_is_the_largest(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    y = torch.full((400, 8), -1.0)
    y[390, 3] = torch.nan
    y[7] = torch.nan
    y[[200, 300]] = 0
    y[350] = 1
    y[20, 2] = torch.inf  # divided by its infinite norm: not a number
    x = torch.cat([torch.ones(1, 8), torch.zeros(1, 8), torch.full((1, 8), torch.nan)])
    values, indices = topk(monkeypatch, x.to(dtype), y.to(dtype), 8)
    assert indices.tolist() == [
        [7, 20, 390, 350, 200, 300, 0, 1],
        [7, 20, 390, 0, 1, 2, 3, 4],
        list(range(8)),
    ]
    nan = torch.nan
    expected = torch.tensor([[nan, nan, nan, 1, 0, 0, -1, -1], [nan] * 3 + [0] * 5, [nan] * 8])
    torch.testing.assert_close(values, expected.to(dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_minus_zero_is_zero(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.zeros(1, 8), torch.zeros(5, 8)
    x[0, :2] = torch.tensor([1e-30, 1])
    y[::2, ::2] = torch.tensor([-1, 1e20, 0, 0])  # -1e-50, which float32 rounds to -0
    values, indices = topk(monkeypatch, x.to(dtype), y.to(dtype), 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]
    assert not values.signbit().any()
