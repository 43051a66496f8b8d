"""The settings of `pymm train detect`. This file imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from pymm.training.task_settings import FREE, BatchSettings, Section, TaskSettings, require


@dataclass(frozen=True)
class DetectorSettings(Section):
    """What is trained."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "fasterrcnn_tiny"
    """A detector that `pymm list "fasterrcnn*"` knows; its classes are those of the data."""
    image_size: int | None = None
    """The short side that pictures are resized to; by default the model's own."""

    def __post_init__(self) -> None:
        side = self.image_size
        require(side is None or side >= 1, "model.image_size", "positive", side)


@dataclass(frozen=True)
class BoxedPictureSettings(BatchSettings):
    """What the model sees."""

    source: str = "scenes:count=2000,classes=20"
    """Synthetic scenes, as `pymm.data.SceneSettings.parse` reads them; WebDataset shards with boxes, as
    `pymm data scenes` writes them; or a folder in COCO's format, or one file of its annotations."""
    test_share: float = 0.2
    """Share that is tested where the source has no test part of its own, in (0, 1)."""
    split_seed: int = 0
    """Another seed, another share."""
    batch_size: int = 8
    """Pictures per optimizer step, over all processes."""
    flip: float = 0.5
    """Probability of a left-right flip."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source), "data.source", "given", self.source)
        require(0 < self.test_share < 1, "data.test_share", "in (0, 1)", self.test_share)
        require(0 <= self.flip <= 1, "data.flip", "in [0, 1]", self.flip)


@dataclass(frozen=True)
class RegionSampleSettings(Section):
    """The losses of both stages over a random sample of their candidates."""

    anchors: int = 128
    """Anchors sampled in a picture."""
    regions: int = 128
    """Regions sampled in a picture."""

    def __post_init__(self) -> None:
        require(self.anchors >= 1, "objective.anchors", "at least 1", self.anchors)
        require(self.regions >= 1, "objective.regions", "at least 1", self.regions)


@dataclass(frozen=True)
class DetectionEvaluationSettings(Section):
    """What the model is tested on, during the run, at its end, and by `pymm eval`."""

    source: str = field(default="", metadata=FREE)
    """Another source of pictures with boxes, of classes that are trained on; all of it. By default the
    source's own test part."""
    count: int = field(default=200, metadata=FREE)
    """Of synthetic scenes, so many of the training's kind."""
    start: int = field(default=1_000_000, metadata=FREE)
    """Index of the first of them; those that are trained on begin at 0."""
    batch_size: int = field(default=16, metadata=FREE)
    """Pictures at a time."""

    def __post_init__(self) -> None:
        for name in ("count", "start", "batch_size"):
            require(getattr(self, name) >= 1, f"evaluation.{name}", "at least 1", getattr(self, name))


@dataclass(frozen=True)
class DetectSettings(TaskSettings):
    """Everything that `pymm train detect` is told."""

    task: ClassVar[str] = "detect"

    model: DetectorSettings = field(default_factory=DetectorSettings)
    data: BoxedPictureSettings = field(default_factory=BoxedPictureSettings)
    objective: RegionSampleSettings = field(default_factory=RegionSampleSettings)
    evaluation: DetectionEvaluationSettings = field(default_factory=DetectionEvaluationSettings)
