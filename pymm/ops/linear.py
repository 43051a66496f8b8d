"""A linear layer with activation and residual."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_same, check_shape, fail, shape
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "linear"

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "silu"]
ACTIVATIONS: tuple[str, ...] = get_args(Activation)
QUICK = 1.702


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    r"""Linear map, then an activation, then a residual.

    .. math:: y = f(x W^\top + b) + r

    with f the identity, `"gelu"`, :math:`z\,\Phi(z)` (Hendrycks and Gimpel 2016, arXiv:1606.08415, sec. 2),
    `"gelu_tanh"`, :math:`\tfrac z2 (1 + \tanh(\sqrt{2/\pi}(z + 0.044715 z^3)))`, `"quick_gelu"`,
    :math:`z\,\sigma(1.702 z)` (both ibid.; CLIP's is the latter), `"relu"`, or `"silu"`, :math:`z\,\sigma(z)`
    (Elfwing et al. 2017, arXiv:1702.03118, eq. 1).

    Args:
        x: `(..., K)`.
        weight: `(N, K)`, the layout of `torch.nn.Linear`.
        bias: `(N,)`.
        activation: `None`, `"gelu"`, `"gelu_tanh"`, `"quick_gelu"`, `"relu"` or `"silu"`.
        residual: `(..., N)`, exactly the result's shape: it does not broadcast.

    Returns:
        `(..., N)` in the type of `x`.

    Raises:
        ValueError: when shapes, types or devices do not fit, or the activation is unknown.

    Numerics:
        Accumulated in float32 at least; on the CPU bias, activation and residual are applied before the
        result is rounded to its type, once. Under autocast all tensors are cast to autocast's type first.

    Kept for backward: x and weight, and with an activation its input `(..., N)` in the type of `x`, as
    `F.linear` followed by an activation keeps them; computing it again would cost one product more.
    """
    x, weight, bias, residual = autocast(x, weight, bias, residual)
    check_same(NAME, "x", x, weight=weight, bias=bias, residual=residual)
    if x.ndim < 1:
        fail(NAME, "x", "(..., K)", shape(x))
    check_shape(NAME, "weight", weight, ("N", x.shape[-1]))
    if bias is not None:
        check_shape(NAME, "bias", bias, (weight.shape[0],))
    if residual is not None:
        check_shape(NAME, "residual", residual, (*x.shape[:-1], weight.shape[0]))
    if activation is not None and activation not in ACTIVATIONS:
        fail(NAME, "activation", f"None or one of {', '.join(ACTIVATIONS)}", repr(activation))
    keep = (
        activation is not None
        and torch.is_grad_enabled()
        and (x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad))
    )
    out, _ = call(NAME, x, weight, bias, activation, residual, keep)
    return out


_FORWARD: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(QUICK * z),
    "relu": F.relu,
    "silu": F.silu,
}


def _quick_gelu_backward(dout: Tensor, z: Tensor) -> Tensor:
    s = torch.sigmoid(QUICK * z)
    return dout * (s + QUICK * z * s * (1 - s))


def _silu_backward(dout: Tensor, z: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(dout, z)
    s = torch.sigmoid(z)  # torch does not differentiate its own silu_backward
    return dout * (s + z * s * (1 - s))


_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda dout, z: torch.ops.aten.gelu_backward(dout, z, approximate="tanh"),
    "quick_gelu": _quick_gelu_backward,
    "relu": lambda dout, z: torch.ops.aten.threshold_backward(dout, z, 0),
    "silu": _silu_backward,
}


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    pre = F.linear(x, weight, bias)
    out = pre if activation is None else _FORWARD[activation](pre)
    if residual is not None:
        out = out + residual
    return out, pre if keep and activation is not None else x.new_empty((0,))


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    size = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(size), x.new_empty(size if keep and activation is not None else (0,))


def _backward_reference(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dz = dout
    if activation is not None:
        # A second derivative goes through z as well, which `pre` no longer knows.
        again = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
        z = F.linear(x, weight, bias) if pre is None or again else pre
        dz = _BACKWARD[activation](dout, z)
    none = x.new_empty((0,))
    rows = dz.flatten(0, -2) if dz.ndim > 1 else dz[None]  # (M, N)
    dx = dz @ weight if need_x else none
    dweight = rows.mT @ x.reshape(rows.shape[0], x.shape[-1]) if need_weight else none
    dbias = rows.sum(0) if need_bias else none
    return dx, dweight, dbias


def _backward_fake(
    dout: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pre: Tensor | None,
    activation: str | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else (0,)),
        x.new_empty(weight.shape if need_weight else (0,)),
        x.new_empty((weight.shape[0] if need_bias else 0,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, ctx.activation, _, keep = inputs
    pre = output[1]
    ctx.save_for_backward(
        x, weight, bias if ctx.activation is not None else None, pre if keep and ctx.activation else None
    )
    ctx.mark_non_differentiable(pre)
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 6
    needs = ctx.needs_input_grad[:3]
    dx = dweight = dbias = None
    if any(needs):
        dx, dweight, dbias = backward_op(dout, *ctx.saved_tensors, ctx.activation, *needs)
    return (
        dx if needs[0] else None,
        dweight if needs[1] else None,
        dbias if needs[2] else None,
        None,
        dout if ctx.needs_input_grad[4] else None,
        None,
    )


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    yield Sample("one row", (rand(1, 5), rand(3, 5), rand(3), "gelu"))
    yield Sample("a vector", (rand(7), rand(4, 7), rand(4), "silu", rand(4)))
    yield Sample("no rows", (rand(0, 5), rand(3, 5), rand(3), "gelu", rand(0, 3)))
    yield Sample("no columns", (rand(2, 5), rand(0, 5), rand(0), "gelu"))
    yield Sample("no width", (rand(2, 0), rand(3, 0), rand(3), "gelu", rand(2, 3)))
    yield Sample("bare", (rand(9, 17), rand(13, 17)))
    yield Sample("bias", (rand(4, 9, 17), rand(13, 17), rand(13)))
    yield Sample("residual alone", (rand(2, 3, 5, 8), rand(6, 8)), {"residual": rand(2, 3, 5, 6)})
    for activation in ACTIVATIONS:
        yield Sample(activation, (rand(5, 7, 33), rand(35, 33) * 0.3, rand(35), activation, rand(5, 7, 35)))
    yield Sample("no bias", (rand(37, 19), rand(53, 19) * 0.3, None, "quick_gelu"))
    yield Sample("extreme", (rand(6, 12) * 30, rand(11, 12), rand(11), "gelu_tanh"))
    yield Sample(
        "strided", (rand(19, 41).t(), rand(38, 23)[::2].t(), rand(46)[::2], "relu", rand(23, 41).t())
    )
    yield Sample("expanded", (rand(1, 18).expand(5, 18), rand(1, 18).expand(7, 18), None, "gelu"))
    yield Sample(
        "several tiles", (rand(2, 101, 70), rand(260, 70) * 0.1, rand(260), "gelu", rand(2, 101, 260))
    )
    yield Sample("few rows, many columns", (rand(3, 40), rand(517, 40) * 0.2, rand(517), "gelu"))
    yield Sample("deep", (rand(5, 1100), rand(9, 1100) * 0.03, rand(9)))


def _eager(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Activation | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    out = F.linear(x, weight, bias)
    if activation is not None:
        out = _FORWARD[activation](out)
    return out if residual is None else out + residual


def _workloads() -> Sequence[Workload]:
    def make(m: int, k: int, n: int) -> Any:
        return lambda dtype: (
            (
                torch.randn(m, k).to(dtype),
                (torch.randn(n, k) * k**-0.5).to(dtype),
                torch.randn(n).to(dtype),
                "gelu",
            ),
            {},
        )

    return [
        Workload(f"{m}x{k}->{n} gelu", dtype, make(m, k, n), gemm=(m, n, k), gemms=1, gemms_backward=2)
        for m, k, n in ((1600, 768, 3072), (6304, 768, 3072))
        for dtype in (torch.bfloat16, torch.float32)
    ]


OP = register(
    Op(
        name=NAME,
        function=linear,
        forward=Kernel(
            "(Tensor x, Tensor weight, Tensor? bias, str? activation, Tensor? residual, bool keep)"
            " -> (Tensor, Tensor)",
            _reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dout, Tensor x, Tensor weight, Tensor? bias, Tensor? pre, str? activation, bool need_x,"
            " bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
            _backward_reference,
            _backward_fake,
        ),
        setup_context=_setup_context,
        backward_call=_backward_call,
        samples=_samples,
        workloads=_workloads,
        eager=_eager,
    )
)
