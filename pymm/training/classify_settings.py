"""The settings of `pymm train classify`. This file imports nothing heavy, so that `--help` is fast."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import tyro

from pymm.training.task_settings import (
    FREE,
    AdamWSettings,
    AugmentSettings,
    BatchSettings,
    Section,
    TaskSettings,
    require,
)


@dataclass(frozen=True)
class BackboneSettings(Section):
    """What is trained, from which weights, and how much of it."""

    backbone: Annotated[str, tyro.conf.arg(aliases=["--backbone"])] = "resnet18"
    """A name that `pymm list` knows; of a CLIP it is the image tower."""
    init: Annotated[str | None, tyro.conf.arg(aliases=["--init"])] = None
    """Weights to begin with: a run's directory, a safetensors file, or another library's checkpoint. Its head
    is dropped when the classes are not as many. By default random weights."""
    freeze: Annotated[int | Literal["all"], tyro.conf.arg(aliases=["--freeze"])] = 0
    """Stages from the pixels on that stay as they are; blocks of a transformer are stages, and so is what
    comes before them. "all" trains the head only. A frozen batch norm keeps its statistics."""
    image_size: int | None = None
    """Pixels per side; by default the model's own."""
    drop_path: float = 0.0
    """Stochastic depth of a transformer: the last block's branches are left out with this probability, those
    before it less often (Huang et al. 2016, arXiv:1603.09382)."""

    def __post_init__(self) -> None:
        require(self.freeze == "all" or self.freeze >= 0, "model.freeze", 'at least 0, or "all"', self.freeze)
        side = self.image_size
        require(side is None or side >= 1, "model.image_size", "positive", side)
        require(0 <= self.drop_path < 1, "model.drop_path", "in [0, 1)", self.drop_path)


@dataclass(frozen=True)
class PictureSettings(BatchSettings):
    """What the model sees."""

    source: str = "emoji:twemoji,fluent"
    """"digits", "fashion-mnist:DIR", "mnist:DIR", "emoji:STYLE,STYLE", a folder of folders of pictures, or
    WebDataset shards; the part of it that is for training."""
    label: str | None = None
    """Field of a sample's JSON that is its class; by default "group" for emoji, else .cls or "label"."""
    test_share: float = 0.2
    """Share that is tested where the source has no test part of its own, in (0, 1)."""
    split_seed: int = 0
    """Another seed, another share."""
    stream: Literal["auto", "yes", "no"] = "auto"
    """Whether `pymm train classify` reads shards anew in every epoch instead of holding their pictures, after
    one pass for the names of the classes. "auto": those of 256 MiB and more, and of another machine."""
    shuffle_buffer: int = 2000
    """Pictures of a stream that are held, still encoded, to draw from."""
    batch_size: int = 128
    """Pictures per optimizer step, over all processes."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.source), "data.source", "given", self.source)
        require(0 < self.test_share < 1, "data.test_share", "in (0, 1)", self.test_share)
        require(self.shuffle_buffer >= 1, "data.shuffle_buffer", "at least 1", self.shuffle_buffer)


@dataclass(frozen=True)
class CrossEntropySettings(Section):
    """Cross-entropy, with softer targets where asked."""

    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (Szegedy et al. 2016, arXiv:1512.00567, sec. 7)."""
    mixup: float = 0.0
    """Both parameters of the beta distribution that weights two pictures (Zhang et al. 2018,
    arXiv:1710.09412); 0 for none."""
    cutmix: float = 0.0
    """Likewise of the share that a patch of another picture covers (Yun et al. 2019, arXiv:1905.04899). With
    both, a fair coin decides for each batch."""

    def __post_init__(self) -> None:
        require(
            0 <= self.label_smoothing <= 1, "objective.label_smoothing", "in [0, 1]", self.label_smoothing
        )
        require(self.mixup >= 0, "objective.mixup", "at least 0", self.mixup)
        require(self.cutmix >= 0, "objective.cutmix", "at least 0", self.cutmix)


@dataclass(frozen=True)
class LayerwiseSettings(AdamWSettings):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with a learning rate per stage."""

    layer_decay: float = 1.0
    """The learning rate of a stage as a share of that of the next, in (0, 1] (Clark et al. 2020,
    arXiv:2003.10555, sec. 3.1)."""
    head_rate: float = 1.0
    """The head's learning rate as a multiple of `learning_rate`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.layer_decay <= 1, "optimizer.layer_decay", "in (0, 1]", self.layer_decay)
        require(self.head_rate > 0, "optimizer.head_rate", "positive", self.head_rate)


@dataclass(frozen=True)
class ClassEvaluationSettings(Section):
    """What the model is tested on, during the run, at its end, and by `pymm eval`."""

    source: tuple[str, ...] = field(default=(), metadata=FREE)
    """Other sources, all of their pictures; by default the test part of `data.source`."""
    batch_size: int = field(default=256, metadata=FREE)
    """Pictures at a time."""

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class ClassifySettings(TaskSettings):
    """Everything that `pymm train classify` is told."""

    task: ClassVar[str] = "classify"

    model: BackboneSettings = field(default_factory=BackboneSettings)
    data: PictureSettings = field(default_factory=PictureSettings)
    objective: CrossEntropySettings = field(default_factory=CrossEntropySettings)
    optimizer: LayerwiseSettings = field(default_factory=LayerwiseSettings)
    evaluation: ClassEvaluationSettings = field(default_factory=ClassEvaluationSettings)
