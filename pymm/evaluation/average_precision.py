"""COCO's average precision of detections."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pymm.models.rcnn import Detections


def average_precision(
    found: Sequence[Detections], truth: Sequence[tuple[Tensor, Tensor]], most: int = 100
) -> dict[str, float]:
    """Average precision and recall over pictures, as pycocotools computes them.

    Precision averaged over 101 recalls, over the classes that occur in the truth, and over the overlaps
    0.50, 0.55 ... 0.95 (Lin et al. 2014, arXiv:1405.0312; the COCO detection challenge).

    Args:
        found: the detections of each picture.
        truth: boxes `(R, 4)` and labels `(R,)` of each picture.
        most: detections that count in a picture, the best ones.

    Returns:
        `ap`, `ap50`, `ap75`; `recall`, the largest with `most` detections; and `objects`. All 0 without an
        object.

    Raises:
        ImportError: when pycocotools is not installed.
        ValueError: when the numbers of pictures differ, or a score is not finite.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError as error:
        raise ImportError("average precision needs pycocotools: pip install 'pymm[detect]'") from error
    if len(found) != len(truth):
        raise ValueError(f"average_precision: found must hold {len(truth)} pictures, got {len(found)}")
    if not all(one.scores.isfinite().all() for one in found):
        raise ValueError("average_precision: found must hold finite scores, got nan or inf")
    objects = sum(len(labels) for _, labels in truth)
    names = ("ap", "ap50", "ap75", "recall")
    if objects == 0:
        return dict.fromkeys(names, 0.0) | {"objects": 0}
    labels = sorted({int(label) for _, one in truth for label in one})
    annotations = [
        {"image_id": i, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for i, (boxes, one) in enumerate(truth)
        for box, label in zip(_corner_and_size(boxes), one.tolist(), strict=True)
    ]
    results = [
        {"image_id": i, "category_id": label, "bbox": box, "score": score}
        for i, one in enumerate(found)
        for box, score, label in zip(
            _corner_and_size(one.boxes), one.scores.tolist(), one.labels.tolist(), strict=True
        )
    ]
    with contextlib.redirect_stdout(io.StringIO()):  # it reports progress there
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "annotations": [one | {"id": i} for i, one in enumerate(annotations, start=1)],
            "categories": [{"id": label} for label in labels],
        }
        coco.createIndex()
        if not results:
            return dict.fromkeys(names, 0.0) | {"objects": objects}
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    # (overlaps, recalls, classes, areas, limits); -1 where a class does not occur.
    every = precision[:, :, :, 0, 2]
    values = {"ap": every, "ap50": every[:1], "ap75": every[5:6], "recall": recall[:, :, 0, 2]}
    return {name: _mean(values[name]) for name in names} | {"objects": objects}


def _mean(values: Any) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else 0.0


def _corner_and_size(boxes: Tensor) -> list[list[float]]:
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes.tolist()]
