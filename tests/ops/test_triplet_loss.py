"""triplet_loss beyond its record: an oracle of loops, torch's own losses, kinks, threads, errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.ops import triplet_loss

each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])
each_distance = pytest.mark.parametrize("distance", ["cosine", "euclidean"])


def triplets(*size: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    a, p, n = (torch.randn(size, dtype=dtype).requires_grad_() for _ in range(3))
    return a, p, n


def oracle(a: Tensor, p: Tensor, n: Tensor, margin: float, distance: str) -> float:
    def d(u: list[float], v: list[float]) -> float:
        if distance == "euclidean":
            return math.dist(u, v)
        dot = sum(s * t for s, t in zip(u, v, strict=True))
        return 1 - dot / max(math.hypot(*u), 1e-12) / max(math.hypot(*v), 1e-12)

    rows = list(zip(*(t.flatten(0, -2).tolist() for t in (a, p, n)), strict=True))
    return sum(max(0.0, margin + d(u, v) - d(u, w)) for u, v, w in rows) / len(rows)


@each_backend
@each_distance
@pytest.mark.parametrize("margin", [0.0, 0.2, 1.5, -0.3])
def test_equals_loops(backend: str, distance: str, margin: float) -> None:
    a, p, n = triplets(3, 41, 13)
    with ops.backend(backend):
        loss = triplet_loss(a, p, n, margin=margin, distance=distance)
    assert loss.item() == pytest.approx(oracle(a, p, n, margin, distance), rel=1e-12)


@each_backend
@each_distance
def test_gradients_equal_those_of_torchs_loss(backend: str, distance: str) -> None:
    a, p, n = triplets(57, 21)

    def d(u: Tensor, v: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(u, v) if distance == "cosine" else (u - v).norm(dim=-1)

    expected = F.triplet_margin_with_distance_loss(a, p, n, distance_function=d, margin=0.5)
    with ops.backend(backend):
        loss = triplet_loss(a, p, n, margin=0.5, distance=distance)
        got = torch.autograd.grad(3 * loss, [a, p, n])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(got, torch.autograd.grad(3 * expected, [a, p, n]))


@each_backend
@each_distance
def test_a_hinge_of_zero_has_no_gradient(backend: str, distance: str) -> None:
    a = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    p = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with ops.backend(backend):
        loss = triplet_loss(a, p, p, margin=0.0, distance=distance)
        gradients = torch.autograd.grad(loss, [a, p])
    assert loss.item() == 0
    assert all(bool((g == 0).all()) for g in gradients)


@each_backend
def test_equal_rows_have_no_direction(backend: str) -> None:
    a, n = torch.randn(5, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    p = a.detach().clone().requires_grad_()
    with ops.backend(backend):
        da, dp, dn = torch.autograd.grad(triplet_loss(a, p, n, 50.0, "euclidean"), [a, p, n])
    assert bool((dp == 0).all())
    torch.testing.assert_close(da, -dn)
    torch.testing.assert_close(dn.norm(dim=-1), torch.full((5,), 0.2))


@each_backend
@each_distance
def test_nan_reaches_the_loss(backend: str, distance: str) -> None:
    a, p, n = (t.detach() for t in triplets(9, 6, dtype=torch.float32))
    n[4, 2] = float("nan")
    with ops.backend(backend):
        assert math.isnan(triplet_loss(a, p, n, distance=distance).item())


@each_backend
def test_no_rows_and_no_columns(backend: str) -> None:
    with ops.backend(backend):
        empty = torch.zeros(0, 4, requires_grad=True)
        loss = triplet_loss(empty, empty, empty)
        loss.backward()
        assert loss.item() == 0
        assert triplet_loss(*[torch.zeros(3, 0)] * 3, margin=0.25).item() == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_loss_of_low_precision_is_float32(dtype: torch.dtype) -> None:
    a, p, n = (t.detach().to(dtype).requires_grad_() for t in triplets(300, 40))
    loss = triplet_loss(a, p, n)
    loss.backward()
    assert loss.dtype == torch.float32
    assert a.grad is not None
    assert a.grad.dtype == dtype
    expected = triplet_loss(a.double(), p.double(), n.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@each_distance
def test_same_bits_on_any_number_of_threads(distance: str, threads) -> None:
    a, p, n = triplets(3000, 33, dtype=torch.float32)
    results = []
    for count in (1, 2, 5):
        threads(count)
        loss = triplet_loss(a, p, n, distance=distance)
        results.append([loss, *torch.autograd.grad(loss, [a, p, n])])
    for result in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(result, results[0], strict=True))


@each_distance
def test_double_backward(distance: str) -> None:
    a, p, n = triplets(3, 5)
    assert torch.autograd.gradgradcheck(lambda *t: triplet_loss(*t, margin=0.5, distance=distance), (a, p, n))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": torch.ones(2, 4)}, r"triplet_loss: positive must be \(2, 3\), got \(2, 4\)"),
        ({"negative": torch.ones(3)}, r"triplet_loss: negative must be \(2, 3\), got \(3,\)"),
        ({"anchor": torch.tensor(1.0)}, r"triplet_loss: anchor must be \(..., D\), got \(\)"),
        (
            {"negative": torch.ones(2, 3).bfloat16()},
            r"triplet_loss: negative must be of anchor's type torch.float32, got torch.bfloat16",
        ),
        ({"positive": 1.0}, r"triplet_loss: positive must be a tensor, got float"),
        ({"margin": "big"}, r"triplet_loss: margin must be a number, got str"),
        ({"margin": float("inf")}, r"triplet_loss: margin must be finite, got inf"),
        ({"margin": float("nan")}, r"triplet_loss: margin must be finite, got nan"),
        ({"distance": "dot"}, r"triplet_loss: distance must be 'cosine' or 'euclidean', got 'dot'"),
        (
            {"positive": torch.ones(2, 3, device="meta")},
            r"triplet_loss: positive must be on anchor's device cpu, got meta",
        ),
    ],
)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {name: torch.ones(2, 3) for name in ("anchor", "positive", "negative")} | change
    with pytest.raises(ValueError, match=f"^{message}$"):
        triplet_loss(**arguments)
