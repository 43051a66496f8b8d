"""What a trained classifier has to beat: simple answers to the same question, from the pixels alone."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from pymm.data import EvalTransform, PictureLoader, Pictures, read_pictures
from pymm.evaluation import classification_scores, knn_scores, logistic_scores
from pymm.ops import cosine_topk
from pymm.training.classify_data import pictures_of, tested_pictures
from pymm.training.classify_settings import ClassifySettings
from pymm.training.parts import unseen_of
from pymm.training.rundir import SETTINGS
from pymm.training.runs import CLASSES, load_run
from pymm.training.settings import ClipSettings
from pymm.training.settings_file import load_settings


def logistic_on_pixels(run: Path) -> float:
    """The top-1 accuracy of logistic regression on 16×16 pixels, on the run's data."""
    train, test, classes = _data(run, 16)
    scores = logistic_scores(train, test[0], len(classes), c=0.01)
    return float(classification_scores(scores, test[1], classes)["top1"])


def neighbours_on_pixels(run: Path) -> float:
    """The top-1 accuracy of the 20 nearest neighbours by the cosine of 28×28 pixels, on the run's data."""
    train, test, classes = _data(run, 28)
    return float(classification_scores(knn_scores(train, test[0], len(classes)), test[1], classes)["top1"])


def nearest_concept_on_pixels(run: Path) -> float:
    """How often the nearest training picture by the cosine of 16×16 pixels is of the same concept.

    The question of CLIP's `seen_concepts.r1` on the embedded pack, answered with the captions' pictures.
    """
    settings = load_settings(ClipSettings, run / SETTINGS)
    unseen = unseen_of(settings.data)

    def seen(name: str) -> bool:
        return name.rpartition("/")[2] not in unseen

    train, test = (
        read_pictures(sources[0], "train") for sources in (settings.data.source, settings.evaluation.source)
    )
    train, test = train.where(seen), test.where(seen)
    (known, _), (asked, _) = _pixels(train, 16), _pixels(test, 16)
    nearest = cosine_topk(asked, known, 1)[1][:, 0].tolist()
    concepts = [name.rpartition("/")[2] for name in train.names]
    right = [concepts[i] == name.rpartition("/")[2] for i, name in zip(nearest, test.names, strict=True)]
    return sum(right) / len(right)


def nothing_explained(run: Path) -> float:
    """What answering with the mean explains, by definition."""
    return 0.0


def most_frequent_token(run: Path) -> float:
    """How often the token that is hidden most often is the right one, on the run's test pictures."""
    return float(load_run(run).evaluate()["accuracy_of_the_most_frequent"])


Labelled = tuple[Tensor, Tensor]


def _data(run: Path, side: int) -> tuple[Labelled, Labelled, tuple[str, ...]]:
    """Pixels and labels of a run's training and test pictures, and the names of its classes."""
    settings = load_settings(ClassifySettings, run / SETTINGS)
    classes = tuple(json.loads((run / CLASSES).read_text(encoding="utf-8")))
    train = pictures_of(settings.data, "train")
    return _pixels(train, side), _pixels(tested_pictures(settings, classes), side), classes


def _pixels(pictures: Pictures, side: int) -> Labelled:
    loader = PictureLoader(
        pictures,
        transform=EvalTransform(size=side, output="uint8"),
        batch_size=1024,
        shuffle=False,
        drop_last=False,
    )
    batches = list(loader.epoch(0))
    pixels = torch.cat([batch.pixels for batch in batches]).flatten(1).float() / 255
    if bool((pixels.view(len(pixels), 3, -1).std(1) == 0).all()):  # grey: one channel says it all
        pixels = pixels[:, : side * side]
    return pixels, torch.cat([batch.ids for batch in batches])
