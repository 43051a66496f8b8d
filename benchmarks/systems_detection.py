"""How well a CLIP run names regions of synthetic scenes in a drawing style that it never saw."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from torch import Tensor

from pymm.data import SceneDetection
from pymm.evaluation import ZeroShotDetector, average_precision
from pymm.models.rcnn import Detections
from pymm.training.clip import load_run

SCENES = "scenes:count=40,classes=20,styles=noto"


@lru_cache(maxsize=1)
def _found(run: Path) -> tuple[list[Detections], list[tuple[Tensor, Tensor]], int]:
    """Detections and truth of the scenes, and the number of classes."""
    trained, data = load_run(run), SceneDetection(SCENES)
    names = data.classes[1:]
    detector = ZeroShotDetector(trained.model, trained.tokenizer, names, "{object}")
    pictures = [data[i] for i in range(len(data))]
    truth = [(one.boxes, one.labels - 1) for one in pictures]
    return [detector(one.pixels) for one in pictures], truth, len(names)


def ap50_on_scenes(run: Path) -> float:
    """Average precision at an overlap of one half, of windows named by the run."""
    found, truth, _ = _found(run)
    return average_precision(found, truth)["ap50"]


def ap50_of_wrong_names(run: Path) -> float:
    """Likewise, each window with the next class's name: what boxes and scores are worth alone."""
    found, truth, classes = _found(run)
    return average_precision([one._replace(labels=(one.labels + 1) % classes) for one in found], truth)[
        "ap50"
    ]
