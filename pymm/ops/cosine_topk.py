"""The k most similar rows of a bank for every query, by cosine, without the matrix of similarities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_device, check_same, check_shape, fail, shape
from pymm.ops._cosine import accumulator, free_norms, inverse_norms
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "cosine_topk"
# The reference holds a block of similarities of at most this many numbers.
BLOCK = 1 << 24


def cosine_topk(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    r"""The `k` rows of `y` with the largest cosine to each row of `x`, largest first.

    .. math:: s_{nm} = \frac{x_n}{\max(\lVert x_n \rVert, 10^{-12})} \cdot
              \frac{y_m}{\max(\lVert y_m \rVert, 10^{-12})}

    Exact search by inner product (the flat index of Douze et al. 2024, arXiv:2401.08281) over normalized
    rows, as in the zero-shot classification and retrieval of CLIP (Radford et al. 2021, arXiv:2103.00020,
    fig. 1).

    Args:
        x: `(N, D)` queries, float32, bfloat16, float16 or float64.
        y: `(M, D)` bank, of x's type, or bfloat16 or float16 while x is float32.
        k: how many, 1 to M.

    Returns:
        values `(N, k)` in the type of `x`, and indices `(N, k)`, int64. Equal similarities come in the
        order of their indices, so the result never depends on threads or blocks.

    Raises:
        ValueError: when shapes, types or devices do not fit, or `k` is not in 1..M.

    Numerics:
        Similarities are compared as they are accumulated, in float32 at least and before they are rounded
        to the type of `x`; so rounded values may be equal where their order is not that of the indices. A
        bank of lower precision than `x` is widened, never `x` narrowed. A zero row has similarity 0 to
        every row; NaN counts as the largest, as in `torch.topk`. The values have a gradient, that of the
        chosen pairs; the choice itself has none.

    Kept for backward: the inputs and the indices.
    """
    if isinstance(x, Tensor) and isinstance(y, Tensor):
        x, y = autocast(x, y)
    check_same(NAME, "x", x)
    if not isinstance(y, Tensor):
        fail(NAME, "y", "a tensor", type(y).__name__)
    if x.dtype == torch.float32:
        if y.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            fail(NAME, "y", "float32, bfloat16 or float16 for a float32 x", y.dtype)
    elif y.dtype != x.dtype:
        fail(NAME, "y", f"of x's type {x.dtype}", y.dtype)
    check_device(NAME, "x", x, "y", y)
    if x.ndim != 2:
        fail(NAME, "x", "(N, D)", shape(x))
    check_shape(NAME, "y", y, ("M", x.shape[1]))
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)):
        fail(NAME, "k", "an int", type(k).__name__)
    if not 1 <= k <= y.shape[0]:
        fail(NAME, "k", f"from 1 to M = {y.shape[0]}", k)
    return call(NAME, x, y, k)


def _reference(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    unit_x, unit_y = (t.to(acc) * inverse_norms(t)[:, None] for t in (x, y))
    values = x.new_empty((x.shape[0], k))
    indices = x.new_empty((x.shape[0], k), dtype=torch.int64)
    rows = max(1, BLOCK // max(1, y.shape[0]))
    for i in range(0, x.shape[0], rows):
        # torch.topk leaves the order of equal values open; a stable sort keeps that of the indices.
        best, at = (unit_x[i : i + rows] @ unit_y.mT).sort(dim=-1, descending=True, stable=True)
        values[i : i + rows] = best[:, :k].to(x.dtype)
        indices[i : i + rows] = at[:, :k]
    return values, indices


def _fake(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    size = (x.shape[0], k)
    return x.new_empty(size), x.new_empty(size, dtype=torch.int64)


def _backward_reference(
    dvalues: Tensor, x: Tensor, y: Tensor, indices: Tensor, need_dy: bool
) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    g = dvalues.to(acc)[..., None]  # (N, k, 1)
    inv_x = inverse_norms(x)[:, None, None]  # (N, 1, 1)
    unit_x = x.to(acc)[:, None] * inv_x  # (N, 1, D)
    chosen = y[indices]
    inv_chosen = inverse_norms(chosen)[..., None]  # (N, k, 1)
    unit_chosen = chosen.to(acc) * inv_chosen  # (N, k, D)
    gs = g * (unit_x * unit_chosen).sum(-1, keepdim=True)
    dx = (inv_x * (g * unit_chosen - free_norms(inv_x) * gs * unit_x)).sum(1)
    if not need_dy:
        return dx.to(x.dtype), y.new_empty(0)
    dchosen = inv_chosen * (g * unit_x - free_norms(inv_chosen) * gs * unit_chosen)
    dy = torch.zeros_like(y, dtype=acc, memory_format=torch.contiguous_format)
    dy = dy.index_put((indices,), dchosen, accumulate=True)
    return dx.to(x.dtype), dy.to(y.dtype)


def _backward_fake(
    dvalues: Tensor, x: Tensor, y: Tensor, indices: Tensor, need_dy: bool
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), y.new_empty(y.shape if need_dy else (0,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, _ = inputs
    _, indices = output
    ctx.save_for_backward(x, y, indices)
    ctx.mark_non_differentiable(indices)
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dvalues: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dvalues is None:
        return None, None, None
    need_dy = ctx.needs_input_grad[1]
    dx, dy = backward_op(dvalues, *ctx.saved_tensors, need_dy)
    return dx, dy if need_dy else None, None


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    yield Sample("one query, one row", (rand(1, 5), rand(1, 5), 1))
    yield Sample("no queries", (rand(0, 5), rand(3, 5), 2))
    yield Sample("all rows", (rand(7, 19), rand(23, 19), 23))
    # Rows of 16 signs: norms and products are exact in every type, and so are the many ties.
    yield Sample("ties", (rand(5, 16).sign(), rand(300, 16).sign(), 70), smooth=False)
    query = rand(6, 24)
    query[2] = 0
    yield Sample("a zero query", (query, rand(40, 24), 3), smooth=False)
    yield Sample("strided", (rand(19, 41).t(), rand(83, 38)[:, ::2], 5))
    yield Sample("several tiles", (rand(130, 33), rand(700, 33), 10))
    yield Sample("deep", (rand(5, 1100), rand(150, 1100), 4))


def _eager(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    unit_x = F.normalize(x, dim=-1)
    best, at = [], []
    for first in range(0, y.shape[0], 65536):
        chunk = F.normalize(y[first : first + 65536], dim=-1)
        values, indices = (unit_x @ chunk.mT).topk(min(k, chunk.shape[0]), dim=-1)
        best.append(values)
        at.append(indices + first)
    values, order = torch.cat(best, -1).topk(k, dim=-1)
    return values, torch.cat(at, -1).gather(-1, order)


def _observed(args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> tuple[Tensor, ...]:
    """The values, and the cosines of the rows that the indices name: among near ties any order is right."""
    x, y, _ = args
    values, indices = result
    rows = F.normalize(y.double()[indices.reshape(-1)], dim=-1).view(*indices.shape, -1)
    named = (F.normalize(x.double(), dim=-1)[:, None] * rows).sum(-1)
    return values, named.to(values.dtype)


def _workloads() -> Sequence[Workload]:
    def make(n: int, m: int, d: int, k: int) -> Any:
        return lambda dtype: ((torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype), k), {})

    return [
        Workload(
            f"{n}x{m}x{d} k={k}",
            dtype,
            make(n, m, d, k),
            gemm=(n, m, d),
            gemms=1,
            backward=False,
            observed=_observed,
            family=f"N={n} D={d} k={k}",
            size=m,
        )
        for n, m, d, k in ((256, 100_000, 256, 10), (256, 1_000_000, 256, 10))
        for dtype in (torch.bfloat16, torch.float32)
    ]


OP = register(
    Op(
        name=NAME,
        function=cosine_topk,
        forward=Kernel("(Tensor x, Tensor y, int k) -> (Tensor, Tensor)", _reference, _fake),
        backward=Kernel(
            "(Tensor dvalues, Tensor x, Tensor y, Tensor indices, bool need_dy) -> (Tensor, Tensor)",
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
