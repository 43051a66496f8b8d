"""cosine_topk beyond its record: an oracle of loops, ties, mixed types, memory, threads, errors."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pymm import ops
from pymm.ops import cosine_topk
from tests.ops.harness import instruction_set
from tests.ops.test_records import ISAS

ROOT = Path(__file__).parents[2]
each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def signs(*size: int) -> Tensor:
    """Rows whose norms and products are exact in every type, so that ties are exact too."""
    return torch.randn(size).sign()


def oracle(x: Tensor, y: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """Loops in Python's own floats."""
    values, indices = [], []
    for a in x.double().tolist():
        scored = []
        for m, b in enumerate(y.double().tolist()):
            norms = [max(math.sqrt(sum(v * v for v in row)), 1e-12) for row in (a, b)]
            scored.append((-sum(p * q for p, q in zip(a, b, strict=True)) / norms[0] / norms[1], m))
        best = sorted(scored)[:k]
        values.append([-s for s, _ in best])
        indices.append([m for _, m in best])
    return values, indices


@each_backend
@pytest.mark.parametrize(("n", "m", "d", "k"), [(1, 1, 1, 1), (3, 129, 7, 129), (97, 300, 5, 4)])
def test_equals_loops(backend: str, n: int, m: int, d: int, k: int) -> None:
    x, y = torch.randn(n, d, dtype=torch.float64), torch.randn(m, d, dtype=torch.float64)
    with ops.backend(backend):
        values, indices = cosine_topk(x, y, k)
    expected_values, expected_indices = oracle(x, y, k)
    assert indices.tolist() == expected_indices
    torch.testing.assert_close(values, torch.tensor(expected_values, dtype=torch.float64))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ties_come_in_the_order_of_their_indices(isa: str, dtype: torch.dtype) -> None:
    x, y = signs(7, 16), signs(400, 16)  # 17 possible similarities for 400 rows
    with instruction_set(isa):
        values, indices = cosine_topk(x.to(dtype), y.to(dtype), 350)
    expected_values, expected_indices = oracle(x, y, 350)
    assert indices.tolist() == expected_indices
    assert values.tolist() == expected_values


def test_one_row_many_times() -> None:
    y = torch.randn(1, 33).expand(1000, 33)
    _, indices = cosine_topk(torch.randn(5, 33), y, 300)
    assert torch.equal(indices, torch.arange(300).expand(5, 300))


def test_zero_rows() -> None:
    y = torch.cat([-torch.ones(2, 8), torch.zeros(3, 8), torch.ones(1, 8)])
    values, indices = cosine_topk(torch.stack([torch.ones(8), torch.zeros(8)]), y, 6)
    assert indices.tolist() == [[5, 2, 3, 4, 0, 1], [0, 1, 2, 3, 4, 5]]
    torch.testing.assert_close(values, torch.tensor([[1.0, 0, 0, 0, -1, -1], [0.0] * 6]))


@each_backend
def test_no_columns(backend: str) -> None:
    with ops.backend(backend):
        values, indices = cosine_topk(torch.zeros(2, 0), torch.zeros(5, 0), 3)
    assert values.tolist() == [[0.0] * 3] * 2
    assert indices.tolist() == [[0, 1, 2]] * 2


@each_backend
def test_nan_counts_as_the_largest(backend: str) -> None:
    y = torch.randn(200, 8)
    y[150, 3] = float("nan")
    with ops.backend(backend):
        values, indices = cosine_topk(torch.randn(3, 8), y, 2)
    assert indices[:, 0].tolist() == [150] * 3
    assert bool(values[:, 0].isnan().all())
    assert bool(values[:, 1].isfinite().all())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_bank_of_lower_precision_is_widened(isa: str, dtype: torch.dtype) -> None:
    x, y = torch.randn(30, 700), torch.randn(290, 700).to(dtype)  # several blocks along the depth too
    with instruction_set(isa):
        values, indices = cosine_topk(x, y, 9)
        wide_values, wide_indices = cosine_topk(x, y.float(), 9)
    assert values.dtype == torch.float32
    assert torch.equal(indices, wide_indices)
    torch.testing.assert_close(values, wide_values, rtol=1e-6, atol=1e-6)


@each_backend
def test_gradients_of_a_mixed_call(backend: str) -> None:
    x, y = torch.randn(6, 20, requires_grad=True), torch.randn(40, 20).bfloat16().requires_grad_()
    wide = y.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    with ops.backend(backend):
        dx, dy = torch.autograd.grad(cosine_topk(x, y, 3)[0].sum(), [x, y])
    expected_x, expected_y = torch.autograd.grad(cosine_topk(x64, wide, 3)[0].sum(), [x64, wide])
    assert (dx.dtype, dy.dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(dx.double(), expected_x, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dy.double(), expected_y, rtol=2**-8, atol=1e-3)


def test_gradient_is_that_of_the_chosen_pairs() -> None:
    x = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    y = torch.randn(25, 9, dtype=torch.float64, requires_grad=True)
    values, indices = cosine_topk(x, y, 4)
    weight = torch.randn_like(values)
    pairs = torch.cosine_similarity(x[:, None], y[indices], dim=-1)
    torch.testing.assert_close(values, pairs)
    got = torch.autograd.grad((values * weight).sum(), [x, y])
    expected = torch.autograd.grad((pairs * weight).sum(), [x, y])
    torch.testing.assert_close(got, expected)


def test_double_backward() -> None:
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a, b: cosine_topk(a, b, 2)[0], (x, y))


def test_a_fixed_bank_gets_no_gradient() -> None:
    x, y = torch.randn(3, 5, requires_grad=True), torch.randn(7, 5)
    values, indices = cosine_topk(x, y, 2)
    values.sum().backward()
    assert not indices.requires_grad
    assert x.grad is not None
    assert y.grad is None


def test_same_bits_on_any_number_of_threads(threads) -> None:
    x, y = torch.randn(300, 40), torch.randn(5000, 40)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(cosine_topk(x, y, 17))
    for values, indices in results[1:]:
        assert torch.equal(values, results[0][0])
        assert torch.equal(indices, results[0][1])


def test_autocast() -> None:
    x, y = torch.randn(4, 16), torch.randn(50, 16)
    with torch.autocast("cpu", torch.bfloat16):
        values, _ = cosine_topk(x, y, 3)
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), cosine_topk(x, y, 3)[0], rtol=0.02, atol=0.02)


def test_memory_is_not_that_of_the_matrix() -> None:
    code = """
import resource, torch
from pymm.ops import cosine_topk
torch.set_num_threads(2)
x, y = torch.randn(512, 16), torch.randn(200_000, 16)
cosine_topk(x[:2], y[:300], 5)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
cosine_topk(x, y, 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 16 * 1024  # KiB; the matrix would be 400 MB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.ones(2, 3), torch.ones(4, 3), 5), r"cosine_topk: k must be from 1 to M = 4, got 5"),
        ((torch.ones(2, 3), torch.ones(4, 3), 0), r"cosine_topk: k must be from 1 to M = 4, got 0"),
        ((torch.ones(2, 3), torch.ones(0, 3), 1), r"cosine_topk: k must be from 1 to M = 0, got 1"),
        ((torch.ones(2, 3), torch.ones(4, 3), 2.0), r"cosine_topk: k must be an int, got float"),
        ((torch.ones(2, 3), torch.ones(4, 5), 1), r"cosine_topk: y must be \(M, 3\), got \(4, 5\)"),
        ((torch.ones(3), torch.ones(4, 3), 1), r"cosine_topk: x must be \(N, D\), got \(3,\)"),
        (
            (torch.ones(2, 3).int(), torch.ones(4, 3), 1),
            r"cosine_topk: x must be float32, .* got torch.int32",
        ),
        (
            (torch.ones(2, 3).bfloat16(), torch.ones(4, 3), 1),
            r"cosine_topk: y must be of x's type torch.bfloat16, got torch.float32",
        ),
        (
            (torch.ones(2, 3), torch.ones(4, 3).double(), 1),
            r"cosine_topk: y must be float32, bfloat16 or float16 for a float32 x, got torch.float64",
        ),
        ((torch.ones(2, 3), [[1.0] * 3], 1), r"cosine_topk: y must be a tensor, got list"),
        (
            (torch.ones(2, 3), torch.ones(4, 3, device="meta"), 1),
            r"cosine_topk: y must be on x's device cpu, got meta",
        ),
    ],
)
def test_errors(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        cosine_topk(*arguments)
