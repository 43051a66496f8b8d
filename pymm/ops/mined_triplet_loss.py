"""Triplet loss whose triplets are mined from a batch by its labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_device, check_same, check_shape, fail
from pymm.ops._cosine import accumulator, inverse_norms, row_gradient
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register
from pymm.ops.triplet_loss import check_margin

NAME = "mined_triplet_loss"
MININGS = ("hard", "semi-hard", "all")


def mined_triplet_loss(
    x: Tensor, labels: Tensor, y: Tensor | None = None, margin: float = 0.2, mining: str = "hard"
) -> Tensor:
    r"""Mean hinge over the triplets that a miner selects in a batch of labelled rows.

    .. math:: L = \frac{1}{|T|} \sum_{(a, p, n) \in T} \max(0,\; \mathrm{margin} + d(a, p) - d(a, n)),
              \qquad d = 1 - \cos

    Without `y`, every row of `x` is an anchor, its positives p are the other rows of its label, its
    negatives n the rows of other labels. With `y`, the anchors are the rows of `x`, whose positives and
    negatives are rows of `y`, and the rows of `y`, whose positives and negatives are rows of `x`: 2N
    anchors of one mean. The selected triplets T are:

    - `"hard"`: one per anchor that has a positive and a negative, of its farthest positive and its
      nearest negative, also where the hinge is 0 (batch hard, Hermans et al. 2017, arXiv:1703.07737, eq.
      5). With `y` and no label twice it is half of the max-of-hinges loss of VSE++ (Faghri et al. 2017,
      arXiv:1707.05612, eq. 6) divided by N.
    - `"semi-hard"`: for every anchor and positive, the nearest of the negatives that are farther than the
      positive but by less than the margin, d(a, p) < d(a, n) < d(a, p) + margin; a pair that has none
      selects nothing (Schroff et al. 2015, FaceNet, arXiv:1503.03832, eq. 4 and section 3.2).
    - `"all"`: every triplet whose hinge is positive (batch all averaged over its non-zero terms,
      Hermans et al. 2017, eq. 6 and section 2).

    Args:
        x: `(N, D)`.
        labels: `(N,)`, integers; the label of row i of `x`, and of row i of `y`.
        y: `(N, D)` features of another kind, or None.
        margin: any finite number.
        mining: `"hard"`, `"semi-hard"` or `"all"`.

    Returns:
        A scalar: float64 for float64 inputs, float32 for all others; 0 when no triplet is selected.

    Raises:
        ValueError: when shapes, types or devices do not fit, or `mining` is unknown.

    Numerics:
        Cosines are those of `pymm.ops.cosine_similarity`, compared as they are accumulated, in float32 at
        least, and losses are summed in that type or a wider one. Among equally hard rows the lowest index is
        chosen. The choice has no gradient, nor has a hinge of exactly 0. A NaN in `x` or `y` makes the loss
        NaN. On a CPU the N x N similarities never exist: they are computed in tiles, and in panels of a few
        rows for "semi-hard" and "all".

    Kept for backward: the inputs, the inverse norms, the size of T, and for "hard" the chosen triplets, 2
    numbers per anchor; the other minings select again.
    """
    if isinstance(x, Tensor) and (y is None or isinstance(y, Tensor)):
        x, y = autocast(x, y)
    check_same(NAME, "x", x, y=y)
    check_shape(NAME, "x", x, ("N", "D"))
    if y is not None:
        check_shape(NAME, "y", y, tuple(x.shape))
    if not isinstance(labels, Tensor):
        fail(NAME, "labels", "a tensor", type(labels).__name__)
    if labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        fail(NAME, "labels", "integers", labels.dtype)
    check_shape(NAME, "labels", labels, (x.shape[0],))
    check_device(NAME, "x", x, "labels", labels)
    check_margin(NAME, margin)
    if mining not in MININGS:
        fail(NAME, "mining", ", ".join(map(repr, MININGS)), repr(mining))
    return call(NAME, x, y, labels.to(torch.int64), float(margin), mining)[0]


# The loss is a sum over pairs: every selected hinge that is positive adds margin + s[a, n] - s[a, p]. So
# a miner answers with W (A, C), how often the cosine of anchor and candidate enters the sum, with sign;
# with the number of positive hinges; with the number of selected triplets; and, for "hard", with the
# chosen (p, n) of each anchor.
_Mined = tuple[Tensor, Tensor, Tensor, Tensor]


def _hard(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> _Mined:
    p = s.masked_fill(~positive, float("inf")).argmin(1, keepdim=True)  # the first of equal ones
    n = s.masked_fill(~negative, float("-inf")).argmax(1, keepdim=True)
    valid = positive.any(1, keepdim=True) & negative.any(1, keepdim=True)
    active = valid & (margin + s.gather(1, n) > s.gather(1, p))
    w = torch.zeros_like(s).scatter_(1, n, active.to(s.dtype)).scatter_(1, p, -active.to(s.dtype))
    return w, active.sum(), valid.sum(), torch.cat([p, n], 1).masked_fill(~active, -1)


def _semi_hard(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> _Mined:
    # Negatives from near to far, equal ones by index, then what is no negative.
    far, order = (-s).masked_fill(~negative, float("inf")).sort(dim=1, stable=True)
    at = torch.searchsorted(far, -s, right=True).clamp_max(s.shape[1] - 1)  # first one beyond p
    n = order.gather(1, at)
    s_n = -far.gather(1, at)
    selected = positive & (s_n < s) & (margin + s_n > s)
    w = torch.zeros_like(s).scatter_add_(1, n, selected.to(s.dtype)) - selected.to(s.dtype)
    count = selected.sum()
    return w, count, count, s.new_empty((0, 2), dtype=torch.int64)


def _all(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> _Mined:
    near = s + margin  # a hinge is positive where this, of a negative, is above the cosine of a positive
    positives = s.masked_fill(~positive, float("inf")).sort(dim=1).values
    negatives = near.masked_fill(~negative, float("-inf")).sort(dim=1).values
    per_negative = torch.searchsorted(positives, near, right=False) * negative
    per_positive = (s.shape[1] - torch.searchsorted(negatives, s, right=True)) * positive
    count = per_negative.sum()
    return (per_negative - per_positive).to(s.dtype), count, count, s.new_empty((0, 2), dtype=torch.int64)


_MINERS = {"hard": _hard, "semi-hard": _semi_hard, "all": _all}


def _mine(s: Tensor, labels: Tensor, crossed: bool, margin: float, mining: str) -> _Mined:
    """What the miner selects for the cosines `s` `(N, N)`; `crossed`: the columns are other rows."""
    same = labels[:, None] == labels[None, :]
    positive = same if crossed else same & ~torch.eye(len(labels), dtype=torch.bool, device=s.device)
    if len(labels) == 0:
        none = labels.new_zeros(())
        return s, none, none, labels.new_empty((0, 2))
    w, active, count, triplets = _MINERS[mining](s, positive, ~same, margin)
    if crossed:
        back = _MINERS[mining](s.mT.contiguous(), positive, ~same, margin)
        w, active, count = w + back[0].mT, active + back[1], count + back[2]
        triplets = torch.cat([triplets, back[3]])
    return w, active, count, triplets


def _cosines(x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor) -> Tensor:
    return (x * inv_x[:, None]) @ (y * inv_y[:, None]).mT


def _reference(
    x: Tensor, y: Tensor | None, labels: Tensor, margin: float, mining: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    inv_x = inverse_norms(x)
    inv_y = inv_x.new_empty(0) if y is None else inverse_norms(y)
    s = _cosines(x.to(acc), (x if y is None else y).to(acc), inv_x, inv_x if y is None else inv_y)
    w, active, count, triplets = _mine(s, labels, y is not None, margin, mining)
    # W is mostly zeros, and 0 * NaN is NaN: a NaN anywhere reaches the loss.
    total = margin * active.to(acc) + (w * s).sum()
    return total / count.clamp_min(1), count, triplets, inv_x, inv_y


def _fake(
    x: Tensor, y: Tensor | None, labels: Tensor, margin: float, mining: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = accumulator(x.dtype)
    anchors = x.shape[0] * (1 if y is None else 2) if mining == "hard" else 0
    return (
        x.new_empty((), dtype=acc),
        labels.new_empty(()),
        labels.new_empty((anchors, 2)),
        x.new_empty(x.shape[:1], dtype=acc),
        x.new_empty(0 if y is None else y.shape[:1], dtype=acc),
    )


def _backward_reference(
    dloss: Tensor,
    x: Tensor,
    y: Tensor | None,
    labels: Tensor,
    count: Tensor,
    triplets: Tensor,
    inv_x: Tensor,
    inv_y: Tensor,
    margin: float,
    mining: str,
) -> tuple[Tensor, Tensor]:
    acc = accumulator(x.dtype)
    # The norms once more: a second derivative goes through them.
    xa, inv_x = x.to(acc), inverse_norms(x)
    ya, inv_ya = (xa, inv_x) if y is None else (y.to(acc), inverse_norms(y))
    with torch.no_grad():
        w = _mine(_cosines(xa, ya, inv_x, inv_ya), labels, y is not None, margin, mining)[0]
    ds = w * (dloss / count.clamp_min(1))
    if y is None:
        return row_gradient(ds + ds.mT, xa, xa, inv_x, inv_x).to(x.dtype), x.new_empty(0)
    dx = row_gradient(ds, xa, ya, inv_x, inv_ya)
    dy = row_gradient(ds.mT, ya, xa, inv_ya, inv_x)
    return dx.to(x.dtype), dy.to(y.dtype)


def _backward_fake(dloss: Tensor, x: Tensor, y: Tensor | None, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0 if y is None else y.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, y, labels, ctx.margin, ctx.mining = inputs
    _, *statistics = output
    ctx.save_for_backward(x, y, labels, *statistics)
    ctx.mark_non_differentiable(*statistics)
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dloss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if dloss is None:
        return None, None, None, None, None
    dx, dy = backward_op(dloss, *ctx.saved_tensors, ctx.margin, ctx.mining)
    return dx, dy if ctx.saved_tensors[1] is not None else None, None, None, None


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    for mining in MININGS:
        at: dict[str, Any] = {"mining": mining}
        yield Sample(f"one row {mining}", (rand(1, 5), torch.tensor([3])), at)
        yield Sample(f"no rows {mining}", (rand(0, 5), torch.zeros(0, dtype=torch.int64)), at)
        yield Sample(f"one label {mining}", (rand(9, 8), torch.full((9,), -7)), at)
        yield Sample(f"no label twice {mining}", (rand(9, 8), torch.arange(9)), at)
        ragged = torch.randint(0, 9, (37,))
        ragged[5] = 1 << 40  # an anchor without positives, and a label beyond 32 bits
        yield Sample(f"ragged {mining}", (rand(37, 19), ragged), {**at, "margin": 0.5})
        yield Sample(f"two labels {mining}", (rand(50, 24), torch.arange(50) % 2), at)
        yield Sample(f"crossed {mining}", (rand(23, 16), torch.arange(23) % 20, rand(23, 16)), at)
        yield Sample(f"all satisfied {mining}", (rand(20, 12), torch.arange(20) % 4), {**at, "margin": -3.0})
        labels = torch.randint(0, 40, (150,))
        yield Sample(f"several tiles {mining}", (rand(150, 40), labels), at)
        yield Sample(f"several tiles, crossed {mining}", (rand(150, 40), labels, rand(150, 40)), at)
    strided = (rand(19, 41).t(), torch.arange(82)[::2] % 8, rand(41, 38)[:, ::2])
    yield Sample("strided", strided)
    zero = rand(12, 16)
    zero[3] = 0
    yield Sample("a zero row", (zero, torch.arange(12) % 3), smooth=False)


def _eager(
    x: Tensor, labels: Tensor, y: Tensor | None = None, margin: float = 0.2, mining: str = "hard"
) -> Tensor:
    """A miner as users write it; "semi-hard" and "all" hold all N^3 triplets."""
    unit = F.normalize(x, dim=-1)
    s = unit @ (unit if y is None else F.normalize(y, dim=-1)).mT
    same = labels[:, None] == labels[None, :]
    positive = same if y is not None else same & ~torch.eye(len(labels), dtype=torch.bool, device=x.device)
    sides = [s] if y is None else [s, s.mT]
    losses = []
    for side in sides:
        if len(labels) == 0:
            losses.append(side.sum(1))
        elif mining == "hard":
            valid = positive.any(1) & (~same).any(1)
            p = side.masked_fill(~positive, float("inf")).min(1).values[valid]
            n = side.masked_fill(same, float("-inf")).max(1).values[valid]
            losses.append(F.relu(margin + n - p))
        else:
            z = margin + side[:, None, :] - side[:, :, None]  # (anchor, positive, negative)
            selected = positive[:, :, None] & ~same[:, None, :] & (z > 0)
            if mining == "semi-hard":
                nearest = z.masked_fill(~(selected & (z < margin)), float("-inf")).max(2).values
                losses.append(nearest[nearest.isfinite()])
            else:
                losses.append(z[selected])
    values = torch.cat(losses)
    return values.mean() if values.numel() else s.sum() * 0


def _workloads() -> Sequence[Workload]:
    def make(n: int, d: int, per_label: int, mining: str, crossed: bool) -> Any:
        def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            labels = torch.arange(n) // per_label
            other = torch.randn(n, d).to(dtype) if crossed else None
            return (torch.randn(n, d).to(dtype), labels, other), {"mining": mining}

        return inputs

    return [
        Workload(
            f"{n}x{d} {mining}" + (" crossed" if crossed else ""),
            dtype,
            make(n, d, per_label, mining, crossed),
            gemm=(n, n, d),
            gemms=1,
            gemms_backward=0 if mining == "hard" else 2,
            family=f"D={d} {mining}" + (" crossed" if crossed else ""),
            size=n,
        )
        for n, d, per_label, mining, crossed in (
            (1024, 256, 4, "hard", False),
            (4096, 256, 4, "hard", False),
            (4096, 256, 1, "hard", True),
            (512, 256, 4, "semi-hard", False),
            (512, 256, 4, "all", False),
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]


_ARGUMENTS = "Tensor x, Tensor? y, Tensor labels"

OP = register(
    Op(
        name=NAME,
        function=mined_triplet_loss,
        forward=Kernel(
            f"({_ARGUMENTS}, float margin, str mining) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
            _reference,
            _fake,
        ),
        backward=Kernel(
            f"(Tensor dloss, {_ARGUMENTS}, Tensor count, Tensor triplets, Tensor inv_x, Tensor inv_y,"
            " float margin, str mining) -> (Tensor, Tensor)",
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
