"""A detector on scenes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pymm.data.scenes_dataset import SceneDetection
from pymm.evaluation.detection import detect, evaluate_detector
from pymm.models import Detections, create_model

SCENES = SceneDetection("scenes:count=3,classes=3,size=64")


class Known(nn.Module):
    """Knows the boxes of all scenes but those of one class, of which it finds nothing."""

    def __init__(self, blind: int) -> None:
        super().__init__()
        self.blind, self.at = blind, 0
        self.place = nn.Parameter(torch.zeros(()))

    def forward(self, pixels: Tensor) -> list[Detections]:
        found = []
        for picture in pixels:
            one = SCENES[self.at]
            assert torch.equal(picture, one.pixels)
            seen = one.labels != self.blind
            found.append(Detections(one.boxes[seen], torch.ones(int(seen.sum())), one.labels[seen]))
            self.at += 1
        return found


def test_a_class_that_is_not_found() -> None:
    pytest.importorskip("pycocotools")
    blind = int(SCENES[0].labels[0])
    known: Any = Known(blind)
    scores = evaluate_detector(known, SCENES, batch_size=2)
    classes = len({int(label) for i in range(3) for label in SCENES[i].labels})
    assert scores["per_class"][SCENES.classes[blind]]["ap"] == 0
    assert scores["ap"] == pytest.approx((classes - 1) / classes)
    assert scores["pictures"] == 3
    assert scores["objects"] == sum(one["objects"] for one in scores["per_class"].values())


def test_detect_keeps_the_order() -> None:
    model = create_model("fasterrcnn_tiny", num_classes=4, image_size=64).eval()
    model.score = 0.0
    together, apart = detect(model, SCENES), detect(model, SCENES, 1)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
