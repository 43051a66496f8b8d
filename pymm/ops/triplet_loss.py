"""Triplet loss of given triplets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_same, check_shape, fail, shape
from pymm.ops._cosine import accumulator, free_norms, inverse_norms
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "triplet_loss"
DISTANCES = ("cosine", "euclidean")


def triplet_loss(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2, distance: str = "cosine"
) -> Tensor:
    r"""Mean hinge of how much nearer the positive should be to its anchor than the negative is.

    .. math:: L = \frac{1}{B} \sum_b \max(0,\; \mathrm{margin} + d(a_b, p_b) - d(a_b, n_b))

    (Schroff et al. 2015, arXiv:1503.03832, eq. 3, with another distance), where d is `1 - cos(a, b)`, the
    cosine of `pymm.ops.cosine_similarity`, or the Euclidean norm of `a - b`, not squared.

    Args:
        anchor: `(..., D)`.
        positive: of anchor's shape.
        negative: of anchor's shape.
        margin: any finite number.
        distance: `"cosine"` or `"euclidean"`.

    Returns:
        A scalar: float64 for float64 inputs, float32 for all others; the mean over all rows, those whose
        hinge is 0 included, and 0 when there are none.

    Raises:
        ValueError: when shapes, types or devices do not fit, or `distance` is unknown.

    Numerics:
        Distances are computed in float32 at least and the losses summed in float64, in one order. A hinge
        of exactly 0 has no gradient; nor has the Euclidean distance of two equal rows.

    Kept for backward: the inputs.
    """
    if all(isinstance(t, Tensor) for t in (anchor, positive, negative)):
        anchor, positive, negative = autocast(anchor, positive, negative)
    check_same(NAME, "anchor", anchor, positive=positive, negative=negative)
    if anchor.ndim < 1:
        fail(NAME, "anchor", "(..., D)", shape(anchor))
    check_shape(NAME, "positive", positive, tuple(anchor.shape))
    check_shape(NAME, "negative", negative, tuple(anchor.shape))
    check_margin(NAME, margin)
    if distance not in DISTANCES:
        fail(NAME, "distance", " or ".join(map(repr, DISTANCES)), repr(distance))
    return call(NAME, anchor, positive, negative, float(margin), distance == "cosine")


def check_margin(op: str, margin: object) -> None:
    if isinstance(margin, bool) or not isinstance(margin, (int, float)):
        fail(op, "margin", "a number", type(margin).__name__)
    if not abs(margin) < float("inf"):
        fail(op, "margin", "finite", margin)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1) * inverse_norms(a) * inverse_norms(b)


def _hinges(a: Tensor, p: Tensor, n: Tensor, margin: float, cosine: bool) -> Tensor:
    if cosine:
        return margin + _cosine(a, n) - _cosine(a, p)
    return margin + (a - p).norm(dim=-1) - (a - n).norm(dim=-1)


def _reference(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, cosine: bool) -> Tensor:
    a, p, n = (t.to(accumulator(t.dtype)) for t in (anchor, positive, negative))
    z = _hinges(a, p, n, margin, cosine)
    # Not relu of a mean: a NaN anywhere must reach the result.
    return torch.where(z <= 0, 0.0, z).sum() / max(1, z.numel())


def _fake(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, cosine: bool) -> Tensor:
    return anchor.new_empty((), dtype=accumulator(anchor.dtype))


def _cosine_gradient(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of cos(a, b) with respect to a and b."""
    inv_a, inv_b = inverse_norms(a)[..., None], inverse_norms(b)[..., None]
    unit_a, unit_b = a * inv_a, b * inv_b
    s = (unit_a * unit_b).sum(-1, keepdim=True)
    return inv_a * (unit_b - free_norms(inv_a) * s * unit_a), inv_b * (
        unit_a - free_norms(inv_b) * s * unit_b
    )


def _direction(a: Tensor, b: Tensor) -> Tensor:
    """Gradient of ||a - b|| with respect to a, 0 where a = b."""
    difference = a - b
    zero = (difference == 0).all(-1, keepdim=True)
    norm = difference.masked_fill(zero, 1.0).norm(dim=-1, keepdim=True)
    return torch.where(zero, 0.0, difference / norm)


def _backward_reference(
    dloss: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, p, n = (t.to(accumulator(t.dtype)) for t in (anchor, positive, negative))
    z = _hinges(a, p, n, margin, cosine)
    g = torch.where(z <= 0, 0.0, dloss / max(1, z.numel()))[..., None]
    if cosine:
        (from_n, dn), (from_p, dp) = _cosine_gradient(a, n), _cosine_gradient(a, p)
        gradients = (g * (from_n - from_p), -g * dp, g * dn)
    else:
        to_p, to_n = _direction(a, p), _direction(a, n)
        gradients = (g * (to_p - to_n), -g * to_p, g * to_n)
    da, dp, dn = (t.to(anchor.dtype) for t in gradients)
    return da, dp, dn


def _backward_fake(
    dloss: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape_ = anchor.shape
    return anchor.new_empty(shape_), anchor.new_empty(shape_), anchor.new_empty(shape_)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    anchor, positive, negative, ctx.margin, ctx.cosine = inputs
    ctx.save_for_backward(anchor, positive, negative)


def _backward_call(ctx: Any, backward_op: Any, dloss: Tensor) -> tuple[Any, ...]:
    return *backward_op(dloss, *ctx.saved_tensors, ctx.margin, ctx.cosine), None, None


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def triplet(*size: int) -> tuple[Tensor, Tensor, Tensor]:
        return rand(*size), rand(*size), rand(*size)

    for distance in DISTANCES:
        at = {"distance": distance}
        yield Sample(f"one row {distance}", triplet(1, 5), at)
        yield Sample(f"no rows {distance}", triplet(0, 5), at)
        yield Sample(f"ragged {distance}", triplet(37, 19), at)
        yield Sample(f"leading dimensions {distance}", triplet(3, 5, 24), {**at, "margin": 0.5})
        yield Sample(f"all satisfied {distance}", triplet(6, 12), {**at, "margin": -50.0})
        yield Sample(f"strided {distance}", (rand(19, 41).t(), rand(41, 38)[:, ::2], rand(41, 19)), at)
        yield Sample(f"many rows {distance}", triplet(700, 33), at)
    zero = triplet(7, 16)
    zero[0][1], zero[1][2], zero[2][3] = 0, 0, 0
    yield Sample("zero rows", zero, smooth=False)
    a, _, n = triplet(7, 16)
    yield Sample("positive equals anchor", (a, a.clone(), n), {"distance": "euclidean", "margin": 9.0}, False)


def _eager(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 0.2, distance: str = "cosine"
) -> Tensor:
    def d(a: Tensor, b: Tensor) -> Tensor:
        if distance == "cosine":
            return 1 - (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
        return (a - b).norm(dim=-1)

    z = F.relu(margin + d(anchor, positive) - d(anchor, negative))
    return z.mean() if z.numel() else z.sum()


def _workloads() -> Sequence[Workload]:
    def make(n: int, d: int, distance: str) -> Any:
        return lambda dtype: (tuple(torch.randn(n, d).to(dtype) for _ in range(3)), {"distance": distance})

    return [
        Workload(f"{n}x{d} {distance}", dtype, make(n, d, distance))
        for n, d in ((1024, 256), (16384, 512))
        for distance in DISTANCES
        for dtype in (torch.bfloat16, torch.float32)
    ]


OP = register(
    Op(
        name=NAME,
        function=triplet_loss,
        forward=Kernel(
            "(Tensor anchor, Tensor positive, Tensor negative, float margin, bool cosine) -> Tensor",
            _reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dloss, Tensor anchor, Tensor positive, Tensor negative, float margin, bool cosine)"
            " -> (Tensor, Tensor, Tensor)",
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
