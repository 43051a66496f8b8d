"""The pairwise sigmoid loss of SigLIP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_same, check_shape
from pymm.ops._contrastive import as_scalar, through_unit, unit
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "sigmoid_contrastive"


def sigmoid_contrastive(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float
) -> Tensor:
    r"""Sigmoid loss of pairs: every row of `x` and every row of `y` are told whether they belong together.

    .. math:: L = -\frac1N \sum_{i,j} \log \sigma\big(z_{ij} (s\, \hat x_i \cdot \hat y_j + b)\big),
              \quad z_{ij} = 1 \text{ if } i = j \text{ else } -1

    with `s` the logit scale, `b` the bias and normalized rows (Zhai et al. 2023, SigLIP, arXiv:2303.15343,
    eq. 2 and algorithm 1).

    Args:
        x, y: `(N, E)`, the features of N pairs. Rows are divided by `max(norm, 1e-12)`, as `F.normalize`
            does; rows that are normalized already stay as they are.
        logit_scale: multiplies the similarities (it is not their logarithm); a number, or a tensor of one
            element that may require a gradient.
        logit_bias: added to the scaled similarities; likewise.

    Returns:
        A scalar: the sum over all N² pairs divided by N; float64 for float64 inputs, float32 for all others.
        NaN when there are no pairs, as a mean over nothing.

    Raises:
        ValueError: when shapes, types or devices do not fit.

    Numerics:
        Products, norms and the loss are float32 at least, and features are never normalized in low precision.
        On a CPU the logits are computed in tiles and never exist as a matrix; the tiles of the gradient are
        rounded to the features' type where the machine multiplies it.

    Kept for backward: the arguments.
    """
    x, y = autocast(x, y)
    check_same(NAME, "x", x, y=y)
    check_shape(NAME, "x", x, ("N", "E"))
    check_shape(NAME, "y", y, tuple(x.shape))
    scale = as_scalar(NAME, "logit_scale", logit_scale, x)
    bias = as_scalar(NAME, "logit_bias", logit_bias, x)
    return call(NAME, x, y, scale, bias)


def _signs(n: int, like: Tensor) -> Tensor:
    return 2 * torch.eye(n, dtype=like.dtype, device=like.device) - 1


def _reference(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    n = x.shape[0]
    logits = logit_scale * (unit(x)[0] @ unit(y)[0].mT) + logit_bias
    if n == 0:
        return logits.sum() * float("nan")
    return -F.logsigmoid(_signs(n, logits) * logits).sum() / n


def _fake(x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    return logit_scale.new_empty(())


def _backward_reference(
    dloss: Tensor, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = x.shape[0]
    xu, yu = unit(x)[0], unit(y)[0]
    cosines = xu @ yu.mT
    signs = _signs(n, cosines)
    dlogits = -signs * torch.sigmoid(-signs * (logit_scale * cosines + logit_bias)) * (dloss / max(n, 1))
    return (
        through_unit(logit_scale * (dlogits @ yu), x),
        through_unit(logit_scale * (dlogits.mT @ xu), y),
        (dlogits * cosines).sum(),
        dlogits.sum(),
    )


def _backward_fake(
    dloss: Tensor, x: Tensor, y: Tensor, logit_scale: Tensor, logit_bias: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape), logit_scale.new_empty(()), logit_bias.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dloss: Tensor | None) -> tuple[Any, ...]:
    if dloss is None:
        return None, None, None, None
    return backward_op(dloss, *ctx.saved_tensors)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype)

    yield Sample("one pair", (rand(1, 5), rand(1, 5), number(10.0), number(-10.0)))
    yield Sample("ragged", (rand(37, 19), rand(37, 19), number(10.0), number(-10.0)))
    yield Sample("numbers", (rand(12, 8), rand(12, 8), 3.0, 1))
    yield Sample("one element", (rand(9, 8), rand(9, 8), number(2.0).reshape(1), number(-3.0).reshape(1)))
    yield Sample("extreme logits", (rand(21, 6), rand(21, 6), number(120.0), number(-40.0)))
    yield Sample("scale 0", (rand(7, 6), rand(7, 6), number(0.0), number(0.5)))
    zero = rand(8, 16)
    zero[3] = 0
    yield Sample("a zero row", (zero, rand(8, 16), number(4.0), number(-2.0)), smooth=False)
    yield Sample("strided", (rand(19, 24).t(), rand(24, 38)[:, ::2], number(4.0), number(-4.0)))
    yield Sample("several tiles", (rand(300, 70), rand(300, 70), number(10.0), number(-10.0)))


def _eager(x: Tensor, y: Tensor, logit_scale: Tensor | float, logit_bias: Tensor | float) -> Tensor:
    logits = logit_scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T + logit_bias
    return -F.logsigmoid(_signs(x.shape[0], logits) * logits).sum() / x.shape[0]


def _workloads() -> Sequence[Workload]:
    def make(n: int, d: int) -> Any:
        def inputs(dtype: torch.dtype) -> Any:
            scale, bias = torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)
            return (torch.randn(n, d).to(dtype), torch.randn(n, d).to(dtype), scale, bias), {}

        return inputs

    rows = [(1024, torch.bfloat16), (8192, torch.bfloat16), (8192, torch.float32)]
    return [
        Workload(
            f"N={n} D=512",
            dtype,
            make(n, 512),
            gemm=(n, n, 512),
            gemms=1,
            gemms_backward=3,
            family="D=512",
            size=n,
        )
        for n, dtype in rows
    ]


OP = register(
    Op(
        name=NAME,
        function=sigmoid_contrastive,
        forward=Kernel(
            "(Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias) -> Tensor", _reference, _fake
        ),
        backward=Kernel(
            "(Tensor dloss, Tensor x, Tensor y, Tensor logit_scale, Tensor logit_bias) "
            "-> (Tensor, Tensor, Tensor, Tensor)",
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
