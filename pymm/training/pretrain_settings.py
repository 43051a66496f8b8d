"""The settings of `pymm train mae`, `tokenizer` and `beit`. This file imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import tyro

from pymm.training.classify_settings import ClassEvaluationSettings, PictureSettings
from pymm.training.task_settings import AdamWSettings, Section, TaskSettings, require


@dataclass(frozen=True)
class PretrainOptimizerSettings(AdamWSettings):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) as MAE and BEiT have it."""

    betas: tuple[float, float] = (0.9, 0.95)
    """Of the two moments."""


@dataclass(frozen=True)
class MAEModelSettings(Section):
    """What is trained."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "mae_vit_mini_patch8_64"
    """A name that `pymm list 'mae_*'` knows."""
    image_size: int | None = None
    """Pixels per side; by default the model's own."""


@dataclass(frozen=True)
class MaskedPixelsSettings(Section):
    """What is hidden, and what is asked of it."""

    mask_ratio: float = 0.75
    """Share of the patches that is hidden, in (0, 1)."""
    normalize: bool = True
    """Compare with each patch's pixels less their mean, over their spread."""

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, "objective.mask_ratio", "in (0, 1)", self.mask_ratio)


@dataclass(frozen=True)
class MAESettings(TaskSettings):
    """Everything that `pymm train mae` is told."""

    task: ClassVar[str] = "mae"

    model: MAEModelSettings = field(default_factory=MAEModelSettings)
    data: PictureSettings = field(default_factory=PictureSettings)
    objective: MaskedPixelsSettings = field(default_factory=MaskedPixelsSettings)
    optimizer: PretrainOptimizerSettings = field(default_factory=PretrainOptimizerSettings)
    evaluation: ClassEvaluationSettings = field(default_factory=ClassEvaluationSettings)


@dataclass(frozen=True)
class TokenizerModelSettings(Section):
    """What is trained."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "vq_tokenizer_mini"
    """A name that `pymm list 'vq_tokenizer_*'` knows."""
    image_size: int | None = None
    """Pixels per side; by default the model's own."""


@dataclass(frozen=True)
class TokenizerLossSettings(Section):
    """The squared error of the pixels, and the distance from the codes."""

    commitment: float = 0.25
    """Weight of the second, at least 0."""

    def __post_init__(self) -> None:
        require(self.commitment >= 0, "objective.commitment", "at least 0", self.commitment)


@dataclass(frozen=True)
class TokenizerSettings(TaskSettings):
    """Everything that `pymm train tokenizer` is told."""

    task: ClassVar[str] = "tokenizer"

    model: TokenizerModelSettings = field(default_factory=TokenizerModelSettings)
    data: PictureSettings = field(default_factory=PictureSettings)
    objective: TokenizerLossSettings = field(default_factory=TokenizerLossSettings)
    evaluation: ClassEvaluationSettings = field(default_factory=ClassEvaluationSettings)


@dataclass(frozen=True)
class BEiTModelSettings(Section):
    """What is trained, and whose tokens it learns."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "beit_mini_patch8_64_pretraining"
    """A name that `pymm list 'beit_*_pretraining'` knows."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=["--tokenizer"])] = "runs/tokenizer"
    """A run of `pymm train tokenizer`."""
    image_size: int | None = None
    """Pixels per side; by default the model's own."""


@dataclass(frozen=True)
class MaskedTokensSettings(Section):
    """What is hidden."""

    mask_ratio: float = 0.4
    """Share of the patches that is hidden, in blocks, in (0, 1)."""

    def __post_init__(self) -> None:
        require(0 < self.mask_ratio < 1, "objective.mask_ratio", "in (0, 1)", self.mask_ratio)


@dataclass(frozen=True)
class BEiTSettings(TaskSettings):
    """Everything that `pymm train beit` is told."""

    task: ClassVar[str] = "beit"

    model: BEiTModelSettings = field(default_factory=BEiTModelSettings)
    data: PictureSettings = field(default_factory=PictureSettings)
    objective: MaskedTokensSettings = field(default_factory=MaskedTokensSettings)
    optimizer: PretrainOptimizerSettings = field(default_factory=PretrainOptimizerSettings)
    evaluation: ClassEvaluationSettings = field(default_factory=ClassEvaluationSettings)
