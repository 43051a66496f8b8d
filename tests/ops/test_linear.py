"""linear beyond its record: each activation, the residual's rule, second derivatives, and its errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.ops import linear
from pymm.ops.linear import ACTIVATIONS

PLAIN = {
    None: lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": F.relu,
    "silu": F.silu,
}
EVERY = pytest.mark.parametrize("activation", [None, *ACTIVATIONS])


def rand(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, dtype=dtype, requires_grad=True)


@EVERY
def test_equals_plain_torch(activation: Any) -> None:
    x, weight, bias, residual = rand(2, 5, 7), rand(11, 7), rand(11), rand(2, 5, 11)
    leaves = (x, weight, bias, residual)
    got = linear(x, weight, bias, activation, residual)
    expected = PLAIN[activation](F.linear(x, weight, bias)) + residual
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    dout = torch.randn_like(got)
    for a, b in zip(
        torch.autograd.grad(got, leaves, dout), torch.autograd.grad(expected, leaves, dout), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_over_the_whole_line(activation: Any, dtype: torch.dtype) -> None:
    """Value and slope of f itself, where f bends, far out where it is flat, and at the ends of the type."""
    far = torch.tensor([-1e30, -1e4, -150.0, -89.0, -88.0, -0.0, 0.0, 88.0, 89.0, 150.0, 1e4, 1e30])
    z = torch.cat([torch.linspace(-12, 12, 4001), far]).to(dtype)[:, None].requires_grad_()
    one = torch.ones(1, 1, dtype=dtype)
    got = linear(z, one, None, activation)
    (slope,) = torch.autograd.grad(got.sum(), z)
    exact = z.detach().double().requires_grad_()
    value = PLAIN[activation](exact)
    (expected,) = torch.autograd.grad(value.sum(), exact)
    known = value.isfinite() & expected.isfinite()  # torch's own tanh GELU overflows at 1e30
    assert known[:-1].all()
    tolerance = 1e-6 if dtype == torch.float32 else 1e-13
    torch.testing.assert_close(got[known].double(), value[known], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(slope[known].double(), expected[known], rtol=0, atol=tolerance)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_is_not_swallowed(activation: Any) -> None:
    x = torch.tensor([[math.nan, 1.0]]).t().contiguous()
    got = linear(x, torch.ones(1, 1), None, activation)
    assert got[0].isnan().all()
    assert got[1].isfinite().all()


@EVERY
def test_gradcheck_of_every_argument(activation: Any) -> None:
    size = {"dtype": torch.float64}
    leaves = (rand(4, 3, **size), rand(5, 3, **size), rand(5, **size), rand(4, 5, **size))

    def function(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return linear(x, weight, bias, activation, residual)

    assert torch.autograd.gradcheck(function, leaves)
    if activation != "relu":
        assert torch.autograd.gradgradcheck(function, leaves)


def test_only_wanted_gradients_are_computed() -> None:
    x, weight, bias = rand(4, 3), rand(5, 3), rand(5)
    linear(x.detach(), weight.detach(), bias, "gelu").sum().backward()
    assert x.grad is None
    assert weight.grad is None
    expected = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)).sum(), bias)[0]
    torch.testing.assert_close(bias.grad, expected)


def test_residual_alone_needs_no_product() -> None:
    residual = rand(4, 5)
    linear(torch.randn(4, 3), torch.randn(5, 3), None, "silu", residual).sum().backward()
    assert torch.equal(residual.grad, torch.ones(4, 5))


def test_nothing_is_kept_without_gradients() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    _, pre = torch.ops.pymm.linear(x, weight, None, "gelu", None, False)
    assert pre.numel() == 0


def test_backward_recomputes_what_was_not_kept() -> None:
    x, weight, bias = rand(4, 3), rand(5, 3), rand(5)
    out, _ = torch.ops.pymm.linear(x, weight, bias, "gelu", None, False)
    got = torch.autograd.grad(out.sum(), (x, weight, bias))
    expected = torch.autograd.grad(F.gelu(F.linear(x, weight, bias)).sum(), (x, weight, bias))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 2, 31, 97, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_number_of_rows_and_threads(rows: int, dtype: torch.dtype, threads: Any) -> None:
    x, weight = torch.randn(rows, 70).to(dtype), (torch.randn(300, 70) / 8).to(dtype)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(linear(x, weight, None, "silu"))
    exact = F.silu(F.linear(x.double(), weight.double()))
    bound = (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps) * exact.abs().max()
    for result in results:
        assert torch.equal(result, results[0]), "the thread count changes the bits"
        assert (result.double() - exact).abs().max() <= bound


def test_autocast() -> None:
    x, weight, bias, residual = rand(4, 3), rand(5, 3), rand(5), rand(4, 5)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(x, weight, bias, "gelu", residual)
    assert got.dtype == torch.bfloat16
    low = (t.bfloat16() for t in (x, weight, bias))
    assert torch.equal(got, linear(*low, "gelu", residual.bfloat16()))
    got.float().sum().backward()
    assert {t.grad.dtype for t in (x, weight, bias, residual)} == {torch.float32}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": 1.0}, "x must be a tensor, got float"),
        ({"x": torch.zeros(4, 3).int()}, "x must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"x": torch.zeros(())}, "x must be (..., K), got ()"),
        ({"weight": torch.zeros(5, 4)}, "weight must be (N, 3), got (5, 4)"),
        (
            {"weight": torch.zeros(5, 3).double()},
            "weight must be of x's type torch.float32, got torch.float64",
        ),
        ({"bias": torch.zeros(5, 1)}, "bias must be (5,), got (5, 1)"),
        ({"residual": torch.zeros(5)}, "residual must be (4, 5), got (5,)"),
        ({"residual": torch.zeros(1, 5)}, "residual must be (4, 5), got (1, 5)"),
        (
            {"residual": torch.zeros(4, 5).bfloat16()},
            "residual must be of x's type torch.float32, got torch.bfloat16",
        ),
        ({"weight": torch.zeros(5, 3, device="meta")}, "weight must be on x's device cpu, got meta"),
        (
            {"activation": "swish"},
            "activation must be None or one of gelu, gelu_tanh, quick_gelu, relu, silu, got 'swish'",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        linear(**{"x": torch.zeros(4, 3), "weight": torch.zeros(5, 3), **changed})
    assert str(caught.value) == f"linear: {message}"


def test_explain_names_the_kernel() -> None:
    assert ops.explain(linear, torch.zeros(4, 3), torch.zeros(5, 3)).backend == "cpu"
