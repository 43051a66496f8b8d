"""Training an image tokenizer, and loading what a run left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from pymm.data import LabelledBatch, PictureLoader
from pymm.evaluation.reconstruction import picture_sheet, to_bytes
from pymm.models import ImageTokenizer
from pymm.objectives import TokenizerObjective
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
from pymm.training.pretrain_settings import TokenizerSettings
from pymm.training.runs import Run, load_weights


def train_tokenizer(settings: TokenizerSettings, *, on_step: OnStep = None) -> RunResult:
    """Train an image tokenizer (van den Oord et al. 2017, arXiv:1711.00937), or go on with a run.

    `settings.run.out` receives `settings.json`, `log.jsonl`, `checkpoints/` and, at the end,
    `model.safetensors`; `load_run` reads them, and `pymm train beit` learns its tokens. Under
    torchrun the codes follow the main process's pictures.

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
    model, objective = _model(settings, settings.run.seed), TokenizerObjective(settings.objective.commitment)

    def forward(trained: Any, batch: LabelledBatch) -> tuple[Tensor]:
        result = trained(batch.pixels)
        return (objective(result.pixels, normalized(trained, batch.pixels), result.commitment),)

    return pretrain(settings, model, model, forward, _scores, on_step)


def _model(settings: TokenizerSettings, seed: int = 0) -> ImageTokenizer:
    asked = settings.model
    return new_model(ImageTokenizer, asked.name, asked.image_size, seed, "vq_tokenizer_*")


def _scores(model: ImageTokenizer, batches: PictureLoader) -> dict[str, Any]:
    """The error of the pixels, beside that of each picture's mean colour, and how many codes are in use.

    `explained` is what is gained on the mean colour, as a share of its error; `perplexity` is the exponential
    of the entropy of the codes.
    """
    uses = torch.zeros(model.vocab_size, dtype=torch.int64)

    def measure(batch: LabelledBatch) -> dict[str, Tensor]:
        result, wanted = model(batch.pixels), normalized(model, batch.pixels)
        uses.add_(torch.bincount(result.tokens.flatten().cpu(), minlength=len(uses)))
        plain = wanted - wanted.mean((2, 3), keepdim=True)
        error = (result.pixels.float() - wanted).square().mean((1, 2, 3))
        return {"squared_error": error, "squared_error_of_the_mean": plain.square().mean((1, 2, 3))}

    scores: dict[str, Any] = averaged(model, batches, measure)
    share = uses.double() / uses.sum()
    entropy = torch.special.entr(share).sum().item()
    explained = 1 - scores["squared_error"] / scores["squared_error_of_the_mean"]
    scores = {"explained": explained, **scores}
    return {**scores, "codes": int((uses > 0).sum()), "perplexity": float(torch.tensor(entropy).exp())}


@dataclass(frozen=True)
class TokenizerRun(Run):
    """A run of an image tokenizer."""

    model: ImageTokenizer
    settings: TokenizerSettings

    @classmethod
    def load(cls, home: Path, settings: TokenizerSettings, weights: Path) -> TokenizerRun:
        return cls(
            load_weights(_model(settings), weights, f"the model {settings.model.name}"), settings, weights
        )

    def evaluate(self) -> dict[str, Any]:
        return _scores(self.model, tested_batches(self.settings, self.model))

    def table(self, scores: dict[str, Any]) -> Table:
        return scores_table(scores)

    def draw(self, path: Path) -> None:
        """Write a PNG of the first test pictures as they are and as their tokens give them back."""
        batch = next(iter(placed(self.model, tested_batches(self.settings, self.model))))
        pixels = batch.pixels[:8]
        with torch.no_grad():
            made = to_bytes(self.model, self.model(pixels).pixels)
        picture_sheet(path, {"picture": pixels, "from its tokens": made})
