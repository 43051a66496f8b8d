"""InfoNCE and its gradient in plain torch: the specification that every kernel is tested against.

The logits are in memory as a matrix, in float32 at least. Arguments and shapes as in `pymm.ops.info_nce`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._contrastive import through_unit, unit


def hard_targets(rows: int, columns: int, ids: Tensor | None, like: Tensor) -> Tensor:
    """`(rows, columns)`: the positives among the first `rows` candidates, with equal weight."""
    if ids is None:
        return torch.eye(rows, columns, dtype=like.dtype, device=like.device)
    same = (ids[:, None] == ids[None, :]).to(like.dtype)
    return F.pad(same / same.sum(1, keepdim=True), (0, columns - rows))


def _side(
    x: Tensor,
    candidates: Tensor,
    logit_scale: Tensor,
    ids: Tensor | None,
    teacher: Tensor | None,
    teacher_candidates: Tensor | None,
    label_smoothing: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits `(N, C)`, targets `(N, C)` and the teacher's logits of one direction."""
    cosines = x @ candidates.mT
    columns = max(candidates.shape[0], 1)
    targets = hard_targets(x.shape[0], candidates.shape[0], ids, x)
    teacher_logits = None
    if teacher is not None and teacher_candidates is not None:
        teacher_logits = logit_scale.detach() * (teacher @ teacher_candidates.mT)
        targets = alpha * teacher_logits.softmax(1) + (1 - alpha) * targets
    if label_smoothing:
        targets = (1 - label_smoothing) * targets + label_smoothing / columns
    return logit_scale * cosines, targets, teacher_logits


def _sides(
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    negatives_x: Tensor | None,
    negatives_y: Tensor | None,
    ids: Tensor | None,
    teacher_x: Tensor | None,
    teacher_y: Tensor | None,
    normalize: bool,
    symmetric: bool,
    label_smoothing: float,
    alpha: float,
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]]:
    """Per direction: rows, candidates, logits, targets and the teacher's logits."""

    def units(*parts: Tensor | None) -> Tensor | None:
        present = [unit(t, normalize)[0] for t in parts if t is not None]
        return torch.cat(present) if present else None

    ways = [(x, y, negatives_y, teacher_x, teacher_y), (y, x, negatives_x, teacher_y, teacher_x)]
    for a, b, negatives, teacher_a, teacher_b in ways[: 2 if symmetric else 1]:
        rows, candidates = cast(Tensor, units(a)), cast(Tensor, units(b, negatives))
        teacher = units(teacher_a)
        teacher_candidates = None if teacher is None else units(teacher_b, negatives)
        yield (
            rows,
            candidates,
            *_side(rows, candidates, logit_scale, ids, teacher, teacher_candidates, label_smoothing, alpha),
        )


def statistics_type(x: Tensor) -> torch.dtype:
    """A log-sum-exp near 100 would cost a probability five digits in float32."""
    return torch.float32 if x.device.type == "mps" else torch.float64


def reference(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses, statistics, teacher_statistics = [], [], []
    for _, _, logits, targets, teacher_logits in _sides(x, *rest):
        lse = logits.logsumexp(1)
        losses.append(lse - (targets * logits).sum(1))
        statistics.append(lse)
        if teacher_logits is not None:
            teacher_statistics.append(teacher_logits.logsumexp(1))
    lse = torch.stack(statistics + teacher_statistics)
    return torch.stack(losses).mean(0), lse.to(statistics_type(x))


def backward_reference(
    dlosses: Tensor,
    lse: Tensor,
    x: Tensor,
    y: Tensor,
    logit_scale: Tensor,
    negatives_x: Tensor | None,
    negatives_y: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    # `lse` is left alone: recomputed from the arguments, this function has their full second derivatives.
    options, needs = rest[:-1], rest[-1]
    normalize, symmetric = options[3], options[4]
    n = x.shape[0]
    weights = (dlosses / 2 if symmetric else dlosses)[:, None]
    features = {"x": x, "y": y, "nx": negatives_x, "ny": negatives_y}
    sums: dict[str, Tensor] = {}
    dscale = torch.zeros_like(logit_scale)

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value

    sides = _sides(x, y, logit_scale, negatives_x, negatives_y, *options)
    for (rows, candidates, logits, targets, _), names in zip(
        sides, (("x", "y", "ny"), ("y", "x", "nx")), strict=False
    ):
        dlogits = weights * (logits.softmax(1) - targets)
        dscale = dscale + (dlogits * (rows @ candidates.mT)).sum()
        dcandidates = logit_scale * (dlogits.mT @ rows)
        add(names[0], logit_scale * (dlogits @ candidates))
        add(names[1], dcandidates[:n])
        add(names[2], dcandidates[n:].clone())  # results of an op share no memory

    def gradient(name: str, needed: bool) -> Tensor:
        source = features[name]
        if not needed or source is None:
            return x.new_empty((0, x.shape[1]))
        return through_unit(sums[name], source, normalize)

    dx, dy, dnx, dny = (gradient(name, needs[i]) for name, i in (("x", 0), ("y", 1), ("nx", 3), ("ny", 4)))
    return dx, dy, dscale, dnx, dny
