"""`pymm probe`: what the frozen features of a model know, by neighbours and by linear classifiers."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pymm.training.classify_settings import (
    BackboneSettings,
    ClassEvaluationSettings,
    ClassifySettings,
    PictureSettings,
)

Probe = Literal["knn", "ridge", "logistic"]


@dataclass(frozen=True)
class ProbeSettings:
    """Classify pictures by a model's frozen features."""

    model: BackboneSettings = field(default_factory=BackboneSettings)
    data: PictureSettings = field(default_factory=PictureSettings)
    evaluation: ClassEvaluationSettings = field(default_factory=ClassEvaluationSettings)
    probes: tuple[Probe, ...] = ("knn", "ridge")
    """"knn": 20 nearest neighbours. "ridge": least squares in closed form. "logistic": logistic regression,
    slower; needs pymm[data]."""
    seed: int = 0
    """Of the weights where there is no checkpoint."""
    threads: int | None = None
    """CPU threads; by default torch's."""
    out: str | None = None
    """A JSON file for the scores."""


def run(settings: ProbeSettings) -> int:
    """0 when the scores are printed.

    Raises:
        SettingsError: when no probe is asked for, or the checkpoint does not fit.
        ValueError, FileNotFoundError: as `train_classify`.
    """
    import torch

    from pymm.evaluation import (
        classification_scores,
        extract_features,
        knn_scores,
        logistic_scores,
        ridge_scores,
    )
    from pymm.training.classify_data import pictures_of, tested_batches, tested_pictures
    from pymm.training.environment import reproducible
    from pymm.training.files import write_atomically
    from pymm.training.task_settings import require
    from pymm.training.transfer import build_backbone, build_from, describe_init

    require(len(settings.probes) > 0, "probes", "at least one", settings.probes)
    asked, data = settings.model, settings.data
    require(
        data.stream != "yes", "data.stream", '"auto" or "no" for a probe, which holds its pictures', "yes"
    )
    pictures = pictures_of(data, "train")
    given = ClassifySettings(data=data, evaluation=settings.evaluation)
    tested, classes = tested_pictures(given, pictures.classes), pictures.classes
    if asked.init is None:
        model = build_backbone(asked.backbone, len(classes), image_size=asked.image_size, seed=settings.seed)
    else:
        model, report = build_from(
            asked.backbone, len(classes), asked.init, image_size=asked.image_size, seed=settings.seed
        )
        print(describe_init(asked.init, report))
    probes: dict[str, Any] = {"knn": knn_scores, "ridge": ridge_scores, "logistic": logistic_scores}
    found = {}
    with reproducible(torch.device("cpu"), settings.threads):
        train = extract_features(model, tested_batches(model, pictures, given))
        features, labels = extract_features(model, tested_batches(model, tested, given))
        for name in settings.probes:
            scores = classification_scores(probes[name](train, features, len(classes)), labels, classes)
            found[name] = scores
            print(
                f"{name}: top1 {scores['top1']:.3f}  mean class accuracy {scores['mean_class_accuracy']:.3f}"
            )
    if settings.out is not None:
        write_atomically(Path(settings.out), (json.dumps(found, indent=2) + "\n").encode())
    return 0
