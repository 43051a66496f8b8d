"""nms and batched_nms beyond the record: torchvision's operators, an oracle of loops, ties, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymm import ops
from pymm.ops import batched_nms, nms
from tests.ops.harness import instruction_set
from tests.ops.test_records import ISAS
from tests.torchvision_shim import require

each_backend = pytest.mark.parametrize("backend", ["cpu", "reference"])


def random_boxes(count: int, side: float = 100.0, most: float = 40.0) -> Tensor:
    corner = torch.rand(count, 2) * side
    return torch.cat([corner, corner + torch.rand(count, 2) * most], 1)


def loops(boxes: Tensor, scores: Tensor, threshold: float) -> list[int]:
    """Python's own floats."""

    def iou(a: list[float], b: list[float]) -> float:
        w = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
        h = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
        areas = [(p[2] - p[0]) * (p[3] - p[1]) for p in (a, b)]
        return w * h / (sum(areas) - w * h) if sum(areas) > w * h else 0.0

    rows = boxes.double().tolist()
    kept: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: (-scores[i].item(), i)):
        if all(iou(rows[i], rows[j]) <= threshold for j in kept):
            kept.append(i)
    return kept


@each_backend
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_equals_loops(backend: str, threshold: float) -> None:
    boxes, scores = random_boxes(150).double(), torch.rand(150).double()
    with ops.backend(backend):
        assert nms(boxes, scores, threshold).tolist() == loops(boxes, scores, threshold)


@pytest.mark.parametrize("isa", ISAS)
def test_equals_torchvision(isa: str) -> None:
    theirs = require().ops.nms
    with instruction_set(isa):
        for count, threshold in ((7, 0.5), (500, 0.7), (3000, 0.3)):
            for dtype in (torch.float32, torch.float64):
                boxes, scores = random_boxes(count).to(dtype), torch.rand(count).to(dtype)
                assert torch.equal(nms(boxes, scores, threshold), theirs(boxes, scores, threshold))


@pytest.mark.parametrize("isa", ISAS)
def test_exactly_the_threshold_is_kept(isa: str) -> None:
    """Of integer boxes many overlap by exactly a half, and by what rounding makes of 0.7."""
    theirs = require().ops.nms
    corner, size = torch.randint(0, 6, (400, 2)), torch.randint(1, 8, (400, 2))
    boxes, scores = torch.cat([corner, corner + size], 1).float(), torch.rand(400)
    with instruction_set(isa):
        for threshold in (0.5, 0.7, 2 / 3, 0.1):
            assert torch.equal(nms(boxes, scores, threshold), theirs(boxes, scores, threshold))
    halves = torch.tensor([[0.0, 0, 2, 1], [0, 0, 1, 1]])
    assert nms(halves, torch.tensor([1.0, 0.5]), 0.5).tolist() == [0, 1]
    assert nms(halves, torch.tensor([1.0, 0.5]), 0.49).tolist() == [0]


@each_backend
def test_equal_scores_keep_their_order(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [5, 5, 6, 6], [0, 0, 1, 1], [5, 5, 6, 6], [9, 9, 10, 10]])
    with ops.backend(backend):
        assert nms(boxes, torch.ones(5), 0.5).tolist() == [0, 1, 4]


@each_backend
def test_scores_that_are_nan_come_first(backend: str) -> None:
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1], [5, 5, 6, 6]])
    with ops.backend(backend):
        assert nms(boxes, torch.tensor([2.0, float("nan"), 1.0]), 0.5).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_are_widened(dtype: torch.dtype) -> None:
    boxes, scores = random_boxes(300).to(dtype), torch.rand(300).to(dtype)
    assert torch.equal(nms(boxes, scores, 0.4), nms(boxes.float(), scores.float(), 0.4))


@pytest.mark.parametrize("count", [0, 1, 300, 1500])
def test_batched_equals_torchvision(count: int) -> None:
    theirs = require().ops.batched_nms
    boxes, scores, groups = random_boxes(count), torch.rand(count), torch.randint(0, 5, (count,))
    got = batched_nms(boxes, scores, groups, 0.5)
    assert torch.equal(got, theirs(boxes, scores, groups, 0.5))
    assert all(a >= b for a, b in zip(scores[got], scores[got][1:], strict=False))


BOXES, SCORES = torch.tensor([[0.0, 0, 1, 1]]), torch.ones(1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((BOXES[:, :3], SCORES, 0.5), r"boxes must be \(K, 4\), got \(1, 3\)"),
        ((BOXES, SCORES[:0], 0.5), r"scores must be \(1,\), got \(0,\)"),
        ((BOXES, SCORES.double(), 0.5), r"scores must be of boxes's type torch.float32"),
        ((BOXES.int(), SCORES, 0.5), r"boxes must be float32, bfloat16, float16 or float64"),
        ((BOXES, SCORES, 1.5), r"iou_threshold must be from 0 to 1, got 1.5"),
        ((BOXES, SCORES, float("nan")), r"iou_threshold must be from 0 to 1, got nan"),
    ],
)
def test_errors(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=f"^nms: {message}"):
        nms(*args)


def test_batched_errors() -> None:
    with pytest.raises(ValueError, match=r"^batched_nms: groups must be a tensor of integers"):
        batched_nms(BOXES, SCORES, SCORES, 0.5)
    with pytest.raises(ValueError, match=r"^batched_nms: groups must be \(1,\)"):
        batched_nms(BOXES, SCORES, torch.zeros(2, dtype=torch.int64), 0.5)
