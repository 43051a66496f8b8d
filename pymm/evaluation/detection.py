"""What a detector finds in pictures, and how good that is."""

from __future__ import annotations

from typing import Any

import torch

from pymm.data.detection import DetectionSource
from pymm.data.images import BadImage
from pymm.evaluation.average_precision import scores_of
from pymm.models import RCNN, Detections


@torch.no_grad()
def detect(model: RCNN, source: DetectionSource, batch_size: int = 16) -> list[Detections]:
    """What a model in eval mode finds in every picture, on the CPU.

    Raises:
        ValueError: when a picture does not decode, for a score leaves none out.
    """
    device = next(model.parameters()).device
    found: list[Detections] = []
    for first in range(0, len(source), batch_size):
        rows = range(first, min(first + batch_size, len(source)))
        try:
            pictures = [source[i].pixels.to(device) for i in rows]
        except BadImage as error:
            among = f"one of {rows.start} to {rows.stop - 1}: {error}"
            raise ValueError(f"detect: source must hold pictures that decode, got {among}") from error
        found += [Detections(*(t.cpu() for t in d)) for d in model(pictures)]
    return found


def evaluate_detector(model: RCNN, source: DetectionSource, batch_size: int = 16) -> dict[str, Any]:
    """Average precision of a model in eval mode on pictures whose objects are known.

    Returns:
        What `average_precision` gives, `"pictures"`, and `"per_class"`: for each class that occurs its `"ap"`
        and its `"objects"`. Crowds count as they do for COCO.

    Raises:
        ImportError: without pycocotools.
        ValueError: when a picture does not decode.
    """
    scores = scores_of(detect(model, source, batch_size), [source.truth(i) for i in range(len(source))])
    per_class = {source.classes[label]: one for label, one in scores.per_label.items()}
    return {**scores.overall, "pictures": len(source), "per_class": per_class}
