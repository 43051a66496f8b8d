"""COCO's average precision of detections."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymm.data.scenes_dataset import Truth
from pymm.models.rcnn import Detections

NAMES = ("ap", "ap50", "ap75", "recall")


@dataclass(frozen=True)
class Scores:
    """Of detections: `overall` as `average_precision` gives them, and `ap` and `objects` of each label."""

    overall: dict[str, float]
    per_label: dict[int, dict[str, float]]


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
    alone = [Truth(boxes, labels, torch.zeros(len(labels), dtype=torch.bool)) for boxes, labels in truth]
    return scores_of(found, alone, most).overall


def scores_of(found: Sequence[Detections], truth: Sequence[Truth], most: int = 100) -> Scores:
    """`average_precision` of all labels and of each.

    Args:
        found, most: as there.
        truth: of each picture; its crowds count neither as objects nor against what is found in them.

    Raises:
        ImportError, ValueError: as there.
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
    objects = Counter(label for one in truth for label in one.labels[~one.crowd].tolist())
    labels = sorted({label for one in truth for label in one.labels.tolist()})
    nothing = Scores(
        dict.fromkeys(NAMES, 0.0) | {"objects": objects.total()},
        {label: {"ap": 0.0, "objects": count} for label, count in sorted(objects.items())},
    )
    annotations = [
        {"image_id": i, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": int(crowd)}
        for i, one in enumerate(truth)
        for box, label, crowd in zip(
            _corner_and_size(one.boxes), one.labels.tolist(), one.crowd.tolist(), strict=True
        )
    ]
    results = [
        {"image_id": i, "category_id": label, "bbox": box, "score": score}
        for i, one in enumerate(found)
        for box, score, label in zip(
            _corner_and_size(one.boxes), one.scores.tolist(), one.labels.tolist(), strict=True
        )
    ]
    if not objects or not results:
        return nothing
    with contextlib.redirect_stdout(io.StringIO()):  # it reports progress there
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i} for i in range(len(truth))],
            "annotations": [one | {"id": i} for i, one in enumerate(annotations, start=1)],
            "categories": [{"id": label} for label in labels],
        }
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.params.maxDets = [1, 10, most]
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]
    # (overlaps, recalls, classes, areas, limits); -1 where a class does not occur.
    every = precision[:, :, :, 0, 2]
    values = {"ap": every, "ap50": every[:1], "ap75": every[5:6], "recall": recall[:, :, 0, 2]}
    overall = {name: _mean(values[name]) for name in NAMES} | {"objects": objects.total()}
    per_label = {
        label: {"ap": _mean(every[:, :, i]), "objects": objects[label]}
        for i, label in enumerate(labels)
        if objects[label]
    }
    return Scores(overall, per_label)


def _mean(values: Any) -> float:
    return float(values[values > -1].mean()) if (values > -1).any() else 0.0


def _corner_and_size(boxes: Tensor) -> list[list[float]]:
    return [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in boxes.tolist()]
