"""What a detector finds in synthetic scenes, and how good that is."""

from __future__ import annotations

from typing import Any

import torch

from pymm.data.scenes_dataset import SceneDetection, collate
from pymm.evaluation.average_precision import average_precision
from pymm.models import RCNN, Detections


@torch.no_grad()
def detect(model: RCNN, scenes: SceneDetection, batch_size: int = 16) -> list[Detections]:
    """What a model in eval mode finds in every scene, on the CPU."""
    device = next(model.parameters()).device
    found: list[Detections] = []
    for first in range(0, len(scenes), batch_size):
        batch = collate([scenes[i] for i in range(first, min(first + batch_size, len(scenes)))])
        found += [Detections(*(t.cpu() for t in d)) for d in model(batch.pixels.to(device))]
    return found


def evaluate_detector(model: RCNN, scenes: SceneDetection, batch_size: int = 16) -> dict[str, Any]:
    """Average precision of a model in eval mode on synthetic scenes.

    Returns:
        What `average_precision` gives, `"pictures"`, and `"per_class"`: for each class that occurs its `"ap"`
        and its `"objects"`.

    Raises:
        ImportError: without pycocotools.
    """
    found = detect(model, scenes, batch_size)
    samples = [scenes[i] for i in range(len(scenes))]
    truth = [(one.boxes, one.labels) for one in samples]
    per_class = {}
    for label in sorted({int(label) for one in samples for label in one.labels}):
        ours = [Detections(*(t[d.labels == label] for t in d)) for d in found]
        theirs = [(boxes[labels == label], labels[labels == label]) for boxes, labels in truth]
        scores = average_precision(ours, theirs)
        per_class[scenes.classes[label]] = {name: scores[name] for name in ("ap", "objects")}
    return {**average_precision(found, truth), "pictures": len(samples), "per_class": per_class}
