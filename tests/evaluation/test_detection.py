"""A detector on scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pymm.data import SceneDetection, read_boxed_pictures
from pymm.evaluation.average_precision import scores_of
from pymm.evaluation.detection import detect, evaluate_detector
from pymm.models import Detections, create_model
from tests.data.coco import write_coco

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


def test_a_file_of_coco_scores_as_pycocotools_scores_it(tmp_path: Path) -> None:
    """Crowds, categories with gaps between their numbers, and detections near the truth and elsewhere."""
    coco, cocoeval = pytest.importorskip("pycocotools.coco"), pytest.importorskip("pycocotools.cocoeval")
    file = tmp_path / "annotations" / "instances_val.json"
    data = write_coco(file, tmp_path / "val", 12)
    numbers = [3, 7, 12]
    draw, found, results = torch.Generator().manual_seed(0), [], []
    source = read_boxed_pictures(str(tmp_path), "all")
    for i, image in enumerate(data["images"]):
        truth = source.truth(i)
        near = truth.boxes + torch.randn(truth.boxes.shape, generator=draw, dtype=torch.float64)
        boxes = torch.cat([near, near[:1] + 2, near + torch.tensor([3.0, 2, 12, 9])]).float()
        labels = torch.cat(
            [truth.labels, truth.labels[:1], torch.randint(1, 4, (len(near),), generator=draw)]
        )
        scores = torch.rand(len(boxes), generator=draw)
        found.append(Detections(boxes, scores, labels))
        for (x1, y1, x2, y2), label, score in zip(
            boxes.tolist(), labels.tolist(), scores.tolist(), strict=True
        ):
            one = {"image_id": image["id"], "category_id": numbers[label - 1], "score": score}
            results.append(one | {"bbox": [x1, y1, x2 - x1, y2 - y1]})
    truth = coco.COCO(str(file))
    evaluation = cocoeval.COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    ours = scores_of(found, [source.truth(i) for i in range(len(source))])
    for name, place in (("ap", 0), ("ap50", 1), ("ap75", 2), ("recall", 8)):
        assert ours.overall[name] == pytest.approx(evaluation.stats[place], abs=1e-12), name
    assert 0.1 < ours.overall["ap"] < 0.9
    assert ours.overall["objects"] == sum(not one["iscrowd"] for one in data["annotations"])
    for label, one in ours.per_label.items():
        evaluation.params.catIds = [numbers[label - 1]]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert one["ap"] == pytest.approx(evaluation.stats[0], abs=1e-12)
    without = [t._replace(crowd=torch.zeros_like(t.crowd)) for t in map(source.truth, range(len(source)))]
    assert scores_of(found, without).overall["ap"] != ours.overall["ap"]


def test_a_picture_that_does_not_decode_has_no_score(tmp_path: Path) -> None:
    data = write_coco(tmp_path / "instances.json", tmp_path, 3)
    (tmp_path / data["images"][1]["file_name"]).write_bytes(b"no picture")
    model = create_model("fasterrcnn_tiny", num_classes=4, image_size=64).eval()
    with pytest.raises(ValueError, match="source must hold pictures that decode, got one of 0 to 2: not an"):
        evaluate_detector(model, read_boxed_pictures(str(tmp_path), "all"))


def test_detect_keeps_the_order() -> None:
    model = create_model("fasterrcnn_tiny", num_classes=4, image_size=64).eval()
    model.score = 0.0
    together, apart = detect(model, SCENES), detect(model, SCENES, 1)
    for a, b in zip(together, apart, strict=True):
        torch.testing.assert_close(a.scores, b.scores, rtol=1e-4, atol=1e-5)
