"""Non-maximum suppression: of boxes that overlap too much, the one with the best score."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pymm.ops._checks import check_device, check_same, check_shape, fail
from pymm.ops._cosine import accumulator
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "nms"
# The reference compares this many boxes with all the others at once.
BLOCK = 1024


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    r"""Keep each box that no kept box of a better score overlaps by more than a threshold.

    .. math:: \mathrm{IoU}(a, b) = \frac{|a \cap b|}{|a| + |b| - |a \cap b|}

    The greedy suppression of Girshick et al. 2014 (arXiv:1311.2524, sec. 2.2), torchvision's decisions.

    Args:
        boxes: `(K, 4)`, `x1, y1, x2, y2` with `x1 <= x2` and `y1 <= y2`, float32, bfloat16, float16 or
            float64.
        scores: `(K,)`, of the type of `boxes`.
        iou_threshold: 0 to 1.

    Returns:
        The indices of the boxes that are kept, int64, best score first; of equal scores the lower index
        comes first and wins.

    Raises:
        ValueError: when shapes, types or devices do not fit, or the threshold is not in 0..1.

    Numerics:
        In float32 at least, with the roundings of torchvision, and no other for any instruction set. A box
        without area, or with a coordinate that is NaN, suppresses none and is suppressed by none. A score
        that is NaN counts as the best, as in `torch.sort`.
    """
    check_same(NAME, "boxes", boxes, scores=scores)
    check_shape(NAME, "boxes", boxes, ("K", 4))
    check_shape(NAME, "scores", scores, (boxes.shape[0],))
    if not 0 <= iou_threshold <= 1:
        fail(NAME, "iou_threshold", "from 0 to 1", iou_threshold)
    return call(NAME, boxes.detach(), scores.detach(), float(iou_threshold))


def batched_nms(boxes: Tensor, scores: Tensor, groups: Tensor, iou_threshold: float) -> Tensor:
    """`nms` within each group: boxes of different groups, classes or levels, do not suppress each other.

    Args:
        boxes: `(K, 4)`, as for `nms`.
        scores: `(K,)`.
        groups: `(K,)`, integers.
        iou_threshold: 0 to 1.

    Returns:
        The indices of the boxes that are kept, best score first over all groups.

    Raises:
        ValueError: as `nms`, or when `groups` are not K integers.
    """
    check_same("batched_nms", "boxes", boxes, scores=scores)
    if not isinstance(groups, Tensor) or groups.is_floating_point():
        fail("batched_nms", "groups", "a tensor of integers", getattr(groups, "dtype", type(groups).__name__))
    check_shape("batched_nms", "groups", groups, (boxes.shape[0],))
    check_device("batched_nms", "boxes", boxes, "groups", groups)
    kept = [nms(boxes[:0], scores[:0], iou_threshold)]
    for group in groups.unique():
        rows = (groups == group).nonzero()[:, 0]
        kept.append(rows[nms(boxes[rows], scores[rows], iou_threshold)])
    found = torch.cat(kept).sort().values
    return found[scores[found].sort(descending=True, stable=True).indices]


def _reference(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    order = scores.sort(descending=True, stable=True).indices
    b = boxes[order].to(accumulator(boxes.dtype))
    area = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    count = len(b)
    kept = torch.ones(count, dtype=torch.bool, device="cpu")
    for first in range(0, count, BLOCK):
        rows = b[first : first + BLOCK, None]  # each against itself and those behind it
        others = b[None, first:]
        sides = torch.minimum(rows[..., 2:], others[..., 2:]) - torch.maximum(rows[..., :2], others[..., :2])
        shared = sides.clamp_min(0).prod(-1)
        iou = shared / (area[first : first + BLOCK, None] + area[None, first:] - shared)
        over = (iou.double() > iou_threshold).triu(1).cpu()
        for i in range(len(over)):
            if kept[first + i]:
                kept[first:] &= ~over[i]
    return order[kept.to(order.device)]


def _fake(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    count = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty(count, dtype=torch.int64)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def boxes(count: int, side: float, most: float) -> Tensor:
        corner = torch.rand(count, 2, dtype=torch.float64) * side
        size = torch.rand(count, 2, dtype=torch.float64) * most
        return torch.cat([corner, corner + size], 1).to(dtype)

    def scores(count: int) -> Tensor:
        # Different ones in every type.
        return (torch.randperm(count).double() / 1024).to(dtype)

    yield Sample("one box", (boxes(1, 9, 9), scores(1), 0.5))
    yield Sample("none", (boxes(0, 9, 9), scores(0), 0.5))
    yield Sample("the same box", (boxes(1, 9, 9).expand(40, 4), scores(40), 0.5))
    yield Sample("ties", (boxes(70, 30, 20), torch.zeros(70, dtype=dtype), 0.3))
    empty = boxes(9, 30, 0)
    yield Sample("no area", (torch.cat([empty, empty]), scores(18), 0.5))
    bad = boxes(20, 9, 9)
    bad[3, 1], bad[7, 2], bad[9] = float("nan"), float("inf"), float("-inf")
    yield Sample("not finite", (bad, scores(20), 0.5))
    yield Sample("strided", (boxes(100, 60, 30).t().contiguous().t(), scores(200)[::2], 0.4))
    yield Sample("several blocks", (boxes(1100, 300, 40), scores(1100).float().to(dtype), 0.5))


def _eager(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """One box at a time against those that are left."""
    left = scores.sort(descending=True, stable=True).indices
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while left.numel():
        best, left = left[0], left[1:]
        kept.append(best)
        corner = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (corner - torch.maximum(boxes[best, :2], boxes[left, :2])).clamp_min(0).prod(-1)
        left = left[~(shared / (area[best] + area[left] - shared) > iou_threshold)]
    return torch.stack(kept) if kept else left


def _workloads() -> Sequence[Workload]:
    def make(count: int) -> Any:
        def made(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            centre, size = torch.rand(count, 2) * 800, 16 + 112 * torch.rand(count, 2)
            boxes = torch.cat([centre - size / 2, centre + size / 2], 1).clamp(0, 800)
            return (boxes.to(dtype), torch.rand(count).to(dtype), 0.7), {}

        return made

    return [
        Workload(f"{count} boxes", torch.float32, make(count), backward=False, family="IoU 0.7", size=count)
        for count in (1000, 4000)
    ]


OP = register(
    Op(
        name=NAME,
        function=nms,
        forward=Kernel("(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor", _reference, _fake),
        samples=_samples,
        workloads=_workloads,
        eager=_eager,
    )
)
