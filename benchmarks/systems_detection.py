"""Detection on synthetic scenes: what CLIP names in a style that it never saw, and what a guess is worth."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from pymm.data import SceneDetection
from pymm.evaluation import ZeroShotDetector, average_precision
from pymm.models.rcnn import Detections
from pymm.training.clip import load_run
from pymm.training.detect import held_out_scenes
from pymm.training.detect_settings import DetectSettings
from pymm.training.rundir import SETTINGS
from pymm.training.settings_file import load_settings

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


def ap50_of_one_name(run: Path) -> float:
    """Of the true boxes of a detector's test scenes, all with the name that its training scenes have most."""
    settings = load_settings(DetectSettings, run / SETTINGS)
    trained, tested = SceneDetection(settings.data.source, keep=False), held_out_scenes(settings)
    most = int(torch.cat([trained[i].labels for i in range(len(trained))]).bincount().argmax())
    truth = [(tested[i].boxes, tested[i].labels) for i in range(len(tested))]
    found = [
        Detections(boxes, torch.ones(len(boxes)), torch.full_like(labels, most)) for boxes, labels in truth
    ]
    return average_precision(found, truth)["ap50"]
