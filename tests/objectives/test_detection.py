"""Matching, sampling and the losses of R-CNN; tests/interop/test_rcnn.py compares them with torchvision's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from pymm.models import RCNN, describe, rcnn
from pymm.objectives import DetectionObjective
from pymm.objectives.detection import matched, sampled


def tiny(anchors: tuple[float, ...] | None = (16, 28, 40, 56, 80)) -> RCNN:
    row = describe("fasterrcnn_tiny")
    assert isinstance(row, rcnn.RCNNSpec)
    return rcnn.build(replace(row, width=8, pyramid=16, vector=24, num_classes=4, anchors=anchors))


def test_matching() -> None:
    targets = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30], [50, 50, 60, 60]])
    candidates = torch.tensor(
        [[0.0, 0, 10, 9], [0, 0, 10, 5], [0, 0, 10, 2], [20, 20, 24, 24], [40, 40, 41, 41]]
    )
    at, kind = matched(targets, candidates, 0.7, 0.3)
    assert kind.tolist() == [1, -1, 0, 0, 0]
    assert at[0] == 0
    at, kind = matched(targets[:2], candidates, 0.7, 0.3, all_targets=True)
    assert kind.tolist() == [1, -1, 0, 1, 0]  # the second target's best, though it is a poor one
    assert at[3] == 1
    _, kind = matched(targets[:0], candidates, 0.7, 0.3, all_targets=True)
    assert kind.tolist() == [0] * 5


def test_sampling() -> None:
    kind = torch.tensor([1] * 30 + [0] * 100 + [-1] * 50)
    ones, zeros = sampled(kind, 40, 0.25)
    assert (len(ones), len(zeros)) == (10, 30)
    assert (kind[ones] == 1).all()
    assert (kind[zeros] == 0).all()
    assert len(ones.unique()) == 10
    ones, zeros = sampled(kind[25:], 400, 0.25)
    assert (len(ones), len(zeros)) == (5, 100)
    torch.manual_seed(0)
    first = sampled(kind, 40, 0.25)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(first, sampled(kind, 40, 0.25), strict=True))


def test_a_few_steps_learn_one_picture() -> None:
    torch.manual_seed(1)
    model = tiny().train()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    image = torch.zeros(3, 128, 128, dtype=torch.uint8)
    image[0, 20:60, 30:90] = 255
    boxes, labels = torch.tensor([[30.0, 20, 90, 60]]), torch.tensor([2])
    objective = DetectionObjective(anchors=64, regions=64)
    losses = []
    for _ in range(25):
        loss = sum(objective(model, image[None].repeat(2, 1, 1, 1), [boxes] * 2, [labels] * 2).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_every_part_has_a_gradient() -> None:
    model = tiny().train()
    image = torch.randint(0, 256, (1, 3, 128, 128), dtype=torch.uint8)
    boxes = torch.tensor([[10.0, 20, 60, 80]])
    losses = DetectionObjective()(model, image, [boxes], [torch.tensor([1])])
    assert list(losses) == ["objectness", "proposals", "classes", "boxes"]
    sum(losses.values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        # The branches of the residual blocks begin as zeros, which nothing passes.
        assert name.startswith("backbone.stages") or p.grad.abs().max() > 0, name


def test_pictures_without_objects() -> None:
    model = tiny().train()
    image = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    nothing = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
    losses = DetectionObjective()(model, image, [nothing[0]] * 2, [nothing[1]] * 2)
    assert losses["proposals"] == losses["boxes"] == 0
    assert losses["objectness"] > 0
    assert losses["classes"] > 0


def test_fast_rcnn_is_given_its_regions() -> None:
    model = tiny(None).train()
    image = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    boxes, regions = torch.tensor([[10.0, 20, 40, 50]]), torch.rand(30, 4) * 20
    regions[:, 2:] += 25
    losses = DetectionObjective()(model, image, [boxes], [torch.tensor([3])], [regions])
    assert list(losses) == ["classes", "boxes"]


@pytest.mark.parametrize(
    ("boxes", "labels", "message"),
    [
        ([[[1.0, 1, 5, 5]]] * 2, [[1]], r"boxes and labels must be lists of 1"),
        ([[[1.0, 1, 5]]], [[1]], r"boxes and labels must be \(G, 4\) and \(G,\)"),
        ([[[1.0, 1, 1, 5]]], [[1]], r"boxes must be x1 < x2 and y1 < y2, got a box without area"),
        ([[[1.0, 1, 5, 5]]], [[0]], r"labels must be from 1 to 3, got \[0\]"),
        ([[[1.0, 1, 5, 5]]], [[4]], r"labels must be from 1 to 3, got \[4\]"),
    ],
)
def test_errors(boxes: list[list[list[float]]], labels: list[list[int]], message: str) -> None:
    with pytest.raises(ValueError, match=f"^DetectionObjective: {message}"):
        DetectionObjective()(
            tiny(),
            torch.zeros(1, 3, 64, 64),
            [torch.tensor(b) for b in boxes],
            [torch.tensor(label) for label in labels],
        )
