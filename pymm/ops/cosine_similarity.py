"""Pairwise cosine similarity."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_device, check_same, check_shape, fail, shape
from pymm.ops._cosine import accumulator, inverse_norms, row_gradient
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "cosine_similarity"


def cosine_similarity(
    x: Tensor, y: Tensor, scale: Tensor | float | None = None, eps: float = 1e-12
) -> Tensor:
    r"""Cosine of the angle between every row of `x` and every row of `y`.

    .. math:: s_{nm} = \mathrm{scale} \cdot \frac{x_n}{\max(\lVert x_n \rVert, \epsilon)} \cdot
              \frac{y_m}{\max(\lVert y_m \rVert, \epsilon)}

    the normalization of `torch.nn.functional.normalize`, and the similarity of CLIP (Radford et al. 2021,
    arXiv:2103.00020, fig. 3).

    Args:
        x: `(..., N, D)`.
        y: `(..., M, D)`, leading dimensions equal to x's; or `(M, D)`, shared by all of them.
        scale: multiplies the result; a number, or a tensor of one element that may require a gradient.
        eps: the smallest norm divided by, > 0.

    Returns:
        `(..., N, M)` in the type of `x`.

    Raises:
        ValueError: when shapes, types or devices do not fit, or `eps` is not positive.

    Numerics:
        Products and norms are accumulated in float32 at least, and the division happens before rounding: the
        rows are never normalized in low precision. A zero row gives zeros, and its gradient is the one of
        `x / eps`.

    Kept for backward: the inverse norms, N + M numbers.
    """
    x, y = autocast(x, y)
    check_same(NAME, "x", x, y=y)
    if x.ndim < 2:
        fail(NAME, "x", "(..., N, D)", shape(x))
    lead = tuple(x.shape[:-2])
    if y.ndim != 2 or x.ndim == 2:
        check_shape(NAME, "y", y, (*lead, "M", x.shape[-1]))
    else:
        check_shape(NAME, "y", y, ("M", x.shape[-1]))
    if not eps > 0:
        fail(NAME, "eps", "positive", eps)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            fail(NAME, "scale", "a number or a tensor of one element", shape(scale))
        check_device(NAME, "x", x, "scale", scale)
    out, _, _ = call(NAME, x, y, eps)
    return out if scale is None else out * scale


def _reference(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    xa, ya = x.to(acc), y.to(acc)
    inv_x, inv_y = inverse_norms(x, eps), inverse_norms(y, eps)
    s = (xa * inv_x[..., None]) @ (ya * inv_y[..., None]).mT
    return s.to(x.dtype), inv_x, inv_y


def _fake(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    return (
        x.new_empty((*x.shape[:-1], y.shape[-2])),
        x.new_empty(x.shape[:-1], dtype=acc),
        y.new_empty(y.shape[:-1], dtype=acc),
    )


def _backward_reference(
    dout: Tensor, x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    g, xa, ya = dout.to(acc), x.to(acc), y.to(acc)
    # The norms once more: a second derivative goes through them.
    inv_x, inv_y = inverse_norms(x, eps), inverse_norms(y, eps)
    dx = row_gradient(g, xa, ya, inv_x, inv_y, eps)
    dy = row_gradient(g.mT, ya.expand(*x.shape[:-2], *y.shape[-2:]), xa, inv_y, inv_x, eps)
    return dx.to(x.dtype), dy.sum_to_size(y.shape).to(y.dtype)


def _backward_fake(
    dout: Tensor, x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, ctx.eps = inputs
    _, inv_x, inv_y = output
    ctx.save_for_backward(x, y, inv_x, inv_y)
    ctx.mark_non_differentiable(inv_x, inv_y)
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dout: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dout is None:
        return None, None, None
    dx, dy = backward_op(dout, *ctx.saved_tensors, ctx.eps)
    return dx, dy, None


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    yield Sample("one row each", (rand(1, 5), rand(1, 5)))
    yield Sample("no rows", (rand(0, 5), rand(3, 5)))
    yield Sample("no columns", (rand(3, 5), rand(0, 5)))
    yield Sample("ragged", (rand(37, 19), rand(53, 19)))
    zero = rand(7, 16)
    zero[2] = 0
    yield Sample("a zero row", (zero, rand(9, 16)), smooth=False)
    yield Sample("norms below eps", (rand(7, 16) * 0.1, rand(9, 16)), {"eps": 0.5})
    yield Sample("tiny and huge rows", (rand(6, 24) * 1e-3, rand(5, 24) * 1e2))
    yield Sample("batch", (rand(2, 3, 17, 8), rand(2, 3, 11, 8)), {"scale": 2.5})
    yield Sample("one y for all", (rand(4, 9, 33), rand(12, 33)), {"scale": torch.tensor(3.0, dtype=dtype)})
    yield Sample("strided", (rand(19, 41).t(), rand(23, 38)[:, ::2]))
    yield Sample("several tiles", (rand(130, 70), rand(260, 70)))


def _eager(x: Tensor, y: Tensor, scale: Tensor | float | None = None, eps: float = 1e-12) -> Tensor:
    out = F.normalize(x, dim=-1, eps=eps) @ F.normalize(y, dim=-1, eps=eps).mT
    return out if scale is None else out * scale


def _workloads() -> Sequence[Workload]:
    def make(n: int, d: int) -> Any:
        return lambda dtype: ((torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype)), {})

    return [
        Workload(
            f"{n}x{n}x{d}",
            dtype,
            make(n, d),
            gemm=(n, n, d),
            gemms=1,
            gemms_backward=2,
            family=f"D={d}",
            size=n,
        )
        for n, d in ((1024, 512), (4096, 512))
        for dtype in (torch.bfloat16, torch.float32)
    ]


OP = register(
    Op(
        name=NAME,
        function=cosine_similarity,
        forward=Kernel("(Tensor x, Tensor y, float eps) -> (Tensor, Tensor, Tensor)", _reference, _fake),
        backward=Kernel(
            "(Tensor dout, Tensor x, Tensor y, Tensor inv_x, Tensor inv_y, float eps) -> (Tensor, Tensor)",
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
