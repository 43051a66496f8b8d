"""The settings of a CLIP run, beside those that every task has (`pymm.training.task_settings`).

This file imports nothing heavy, so that `--help` is fast.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from pymm.training.task_settings import (
    FREE,
    AdamWSettings,
    AugmentSettings,
    BatchSettings,
    RunSettings,
    ScheduleSettings,
    Section,
    TaskSettings,
    changed,
    require,
)

__all__ = [
    "AugmentSettings",
    "ClipSettings",
    "DataSettings",
    "EvaluationSettings",
    "ModelSettings",
    "ObjectiveSettings",
    "OptimizerSettings",
    "RunSettings",
    "ScheduleSettings",
    "changed",
]


@dataclass(frozen=True)
class ModelSettings(Section):
    """Which model."""

    name: str = "clip_rn_tiny"
    """A name that `pymm list` knows."""
    image_size: int | None = None
    """Pixels per side; by default the model's own."""
    image_init: str | None = None
    """A run's directory or a checkpoint, of pymm or another library, that the image tower begins with: of a
    CLIP, or of the tower alone. A projection that is not in it is drawn anew."""
    text_init: str | None = None
    """Likewise for the text tower."""
    freeze: tuple[Literal["image", "text"], ...] = ()
    """Towers that keep what their init gave them (LiT: Zhai et al. 2022, arXiv:2111.07991)."""

    def __post_init__(self) -> None:
        for tower in self.freeze:
            given = getattr(self, f"{tower}_init")
            require(
                given is not None, f"model.{tower}_init", f"given where model.freeze holds {tower}", given
            )


@dataclass(frozen=True)
class DataSettings(BatchSettings):
    """What the model sees."""

    source: tuple[str, ...] = ("emoji:twemoji,fluent",)
    """WebDataset shards: folders, globs, paths, URLs, or "emoji:STYLE,STYLE" for the embedded pack."""
    accumulation: Literal["cached", "plain"] = "cached"
    """How micro-batches become one step. "cached": features first, then the loss of the whole batch, then
    each micro-batch again with its gradient; the result is that of the whole batch. "plain": every
    micro-batch is contrasted with itself only, at two thirds of the cost."""
    captions: tuple[str, ...] = ("name_or_tags",)
    """"name", "name_or_tags", or templates with {caption} and {tag}; one is drawn for every pair."""
    augment: AugmentSettings = field(default_factory=AugmentSettings)
    holdout: float = 0.0
    """Share of the embedded pack's concepts that training leaves out, for evaluation."""
    holdout_seed: int = 0
    """Another seed, other concepts."""
    tokenizer: str = "train"
    """"train": byte pairs learned from the captions; else a tokenizer.json, its folder, CLIP's bpe file, or
    BERT's vocab.txt."""
    vocab_size: int | None = None
    """Size of a learned vocabulary; at most, and by default, the model's."""
    context_length: int | None = None
    """Tokens per text; at most, and by default, the model's."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(len(self.source) > 0, "data.source", "at least one source", self.source)
        require(0 <= self.holdout < 1, "data.holdout", "in [0, 1)", self.holdout)
        embedded = all(source.startswith("emoji:") for source in self.source)
        require(embedded or self.holdout == 0, "data.holdout", "0 for your own shards", self.holdout)


@dataclass(frozen=True)
class ObjectiveSettings(Section):
    """What is asked of the model."""

    kind: Literal["infonce", "sigmoid", "triplet"] = "infonce"
    """CLIP's softmax loss, SigLIP's sigmoid loss, or the hinge on mined triplets."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all candidates, in [0, 1]."""
    use_ids: bool = True
    """Pairs of one concept are each other's positives."""
    margin: float = 0.2
    """Of the triplets, between the cosines of a pair and of the negative."""
    mining: Literal["hard", "semi-hard", "all"] = "semi-hard"
    """Which triplets count: the hardest of each anchor, negatives just beyond the positive, or all whose
    hinge is positive."""

    def __post_init__(self) -> None:
        require(self.margin > 0, "objective.margin", "positive", self.margin)
        require(
            0 <= self.label_smoothing <= 1, "objective.label_smoothing", "in [0, 1]", self.label_smoothing
        )


@dataclass(frozen=True)
class OptimizerSettings(AdamWSettings):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    weight_decay: float = 0.2
    """Decoupled; biases, norms, class tokens, positions and the logit scale are left out."""
    betas: tuple[float, float] = (0.9, 0.98)
    """Of the two moments."""
    eps: float = 1e-6
    """Added to the root of the second moment."""
    max_logit_scale: float = 100.0
    """The logit scale never exceeds this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_logit_scale > 0, "optimizer.max_logit_scale", "positive", self.max_logit_scale)


@dataclass(frozen=True)
class EvaluationSettings(Section):
    """What the model is asked during the run, at its end, and by `pymm eval`."""

    source: tuple[str, ...] = field(default=(), metadata=FREE)
    """Shards whose pictures are to be named among all their captions; none for no evaluation."""
    templates: tuple[str, ...] = field(default=("{object}",), metadata=FREE)
    """Prompts around a caption; {object} stands for it. Several are averaged."""
    batch_size: int = field(default=256, metadata=FREE)
    """Pictures at a time."""

    def __post_init__(self) -> None:
        require(len(self.templates) > 0, "evaluation.templates", "at least one", self.templates)
        require(self.batch_size >= 1, "evaluation.batch_size", "at least 1", self.batch_size)


@dataclass(frozen=True)
class ClipSettings(TaskSettings):
    """Everything that `pymm train clip` is told."""

    task: ClassVar[str] = "clip"
    unit: ClassVar[str] = "pairs"

    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    evaluation: EvaluationSettings = field(default_factory=EvaluationSettings)
