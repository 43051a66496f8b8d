"""Training a masked autoencoder, and loading what a run left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pymm.data import LabelledBatch, PictureLoader, random_mask
from pymm.evaluation.reconstruction import fill_in, picture_sheet
from pymm.models import MAE
from pymm.objectives import MaskedPixels
from pymm.training.loop import RunResult
from pymm.training.pretrain import (
    OnStep,
    averaged,
    new_model,
    normalized,
    placed,
    pretrain,
    scores_table,
    tested_batches,
)
from pymm.training.pretrain_settings import MAESettings
from pymm.training.runs import Run, load_weights


def train_mae(settings: MAESettings, *, on_step: OnStep = None) -> RunResult:
    """Train a masked autoencoder (He et al. 2022, arXiv:2111.06377), or go on with a run.

    `settings.run.out` receives `settings.json`, `log.jsonl`, `checkpoints/` and, at the end,
    `model.safetensors`; `load_run` reads them, and `pymm train classify --init` begins with the encoder.

    Args:
        settings: the model, the data and the run.
        on_step: called in the main process after each step with the line that the log would hold.

    Returns:
        How the run ended.

    Raises:
        SettingsError: for settings that do not fit the model or the run in that directory.
        ValueError: for an unknown model, or data that yields nothing.
        TrainingError: as `Trainer.fit`.
    """
    model = _model(settings, settings.run.seed)

    def forward(trained: Any, batch: LabelledBatch) -> tuple[Tensor]:
        losses, _ = _losses(trained, batch.pixels, settings, None)
        return (losses,)

    def score(scored: Any, batches: PictureLoader) -> dict[str, Any]:
        return _scores(scored, batches, settings)

    return pretrain(settings, model, model, forward, score, on_step)


def _model(settings: MAESettings, seed: int = 0) -> MAE:
    return new_model(MAE, settings.model.name, settings.model.image_size, seed, "mae_*")


def _masks(
    model: MAE, pixels: Tensor, settings: MAESettings, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    patches = (pixels.shape[2] // model.patch_size) * (pixels.shape[3] // model.patch_size)
    keep, mask = random_mask(len(pixels), patches, settings.objective.mask_ratio, generator=generator)
    return keep.to(pixels.device), mask.to(pixels.device)


def _losses(
    model: MAE, pixels: Tensor, settings: MAESettings, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """The loss of each picture, and what one that answers with zeros would have."""
    keep, mask = _masks(model, pixels, settings, generator)
    objective, wanted = MaskedPixels(settings.objective.normalize), normalized(model, pixels)
    predicted = model(pixels, keep)
    return objective(predicted, wanted, mask), objective(torch.zeros_like(predicted), wanted, mask)


def _scores(model: MAE, batches: PictureLoader, settings: MAESettings) -> dict[str, Any]:
    """The loss on pictures that were not trained on, always behind the same masks.

    `explained` is what is gained on answering with zeros, as a share of that answer's loss.
    """
    generator = torch.Generator().manual_seed(0)

    def measure(batch: LabelledBatch) -> dict[str, Tensor]:
        losses, zeros = _losses(model, batch.pixels, settings, generator)
        return {"loss": losses, "loss_of_zeros": zeros}

    scores = averaged(model, batches, measure)
    return {"explained": 1 - scores["loss"] / scores["loss_of_zeros"], **scores}


@dataclass(frozen=True)
class MAERun(Run):
    """A run of a masked autoencoder."""

    model: MAE
    settings: MAESettings

    @classmethod
    def load(cls, home: Path, settings: MAESettings, weights: Path) -> MAERun:
        return cls(
            load_weights(_model(settings), weights, f"the model {settings.model.name}"), settings, weights
        )

    def evaluate(self) -> dict[str, Any]:
        return _scores(self.model, tested_batches(self.settings, self.model), self.settings)

    def table(self, scores: dict[str, Any]) -> Table:
        return scores_table(scores)

    def draw(self, path: Path) -> None:
        """Write a PNG of the first test pictures: as they are, what is seen, and what is made of that."""
        model, settings = self.model, self.settings
        batch = next(iter(placed(model, tested_batches(settings, model))))
        pixels = batch.pixels[:8]
        generator = torch.Generator().manual_seed(0)
        keep, mask = _masks(model, pixels, settings, generator)
        with torch.no_grad():
            predicted = model(pixels, keep)
        seen, made = fill_in(model, pixels, predicted, mask, normalized=settings.objective.normalize)
        picture_sheet(path, {"picture": pixels, "seen": seen, "reconstructed": made})
