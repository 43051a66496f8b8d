"""Pretraining BEiT on the tokens of an image tokenizer, and loading what a run left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.data import LabelledBatch, PictureLoader, block_mask
from pymm.models import BEiT, ImageTokenizer
from pymm.objectives import MaskedTokens
from pymm.training.errors import SettingsError
from pymm.training.loop import RunResult
from pymm.training.pretrain import OnStep, averaged, new_model, pretrain, scores_table, tested_batches
from pymm.training.pretrain_settings import BEiTSettings
from pymm.training.runs import Run, load_run, load_weights
from pymm.training.tokenizer import TokenizerRun


class BEiTPretraining(nn.Module):
    """A BEiT, and the mask token and head that only its pretraining needs.

    Bao et al. 2022, arXiv:2106.08254.

    Args:
        model: of a row for pretraining.
        vocabulary: V, of the tokenizer.
    """

    def __init__(self, model: BEiT, vocabulary: int) -> None:
        super().__init__()
        self.model, self.objective = model, MaskedTokens(model.num_features, vocabulary)

    def forward(self, pixels: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """`pixels (B, 3, H, W)`, `tokens (B, N)`, `mask (B, N)` -> the result of `MaskedTokens`."""
        features = self.model.forward_features(pixels, mask=mask, mask_token=self.objective.mask_token)
        result: tuple[Tensor, Tensor] = self.objective(features, tokens, mask)
        return result


def train_beit(settings: BEiTSettings, *, on_step: OnStep = None) -> RunResult:
    """Pretrain BEiT (Bao et al. 2022, arXiv:2106.08254), or go on with a run.

    `settings.run.out` receives `settings.json`, `log.jsonl`, `checkpoints/` and, at the end,
    `model.safetensors`; `load_run` reads them, and `pymm train classify --init` begins with the model.

    Args:
        settings: the model, its tokenizer, the data and the run.
        on_step: called in the main process after each step with the line that the log would hold.

    Returns:
        How the run ended.

    Raises:
        SettingsError: for settings that do not fit the model, the tokenizer or the run in that directory.
        FileNotFoundError: when there is no such tokenizer.
        ValueError: for an unknown model, or data that yields nothing.
        TrainingError: as `Trainer.fit`.
    """
    tokenizer = _tokenizer(settings)
    model = _model(settings, tokenizer, settings.run.seed)

    def forward(trained: Any, batch: LabelledBatch) -> tuple[Tensor]:
        losses, _ = trained(batch.pixels, *_asked(trained, tokenizer, batch.pixels, settings, None))
        return (losses,)

    def score(scored: Any, batches: PictureLoader) -> dict[str, Any]:
        return _scores(scored, tokenizer, batches, settings)

    return pretrain(settings, model, model.model, forward, score, on_step)


def _tokenizer(settings: BEiTSettings) -> ImageTokenizer:
    run = load_run(settings.model.tokenizer)
    if not isinstance(run, TokenizerRun):
        where = settings.model.tokenizer
        raise SettingsError(f"settings: model.tokenizer must be a run of the task tokenizer, got {where}")
    return run.model.requires_grad_(False)


def _model(settings: BEiTSettings, tokenizer: ImageTokenizer, seed: int = 0) -> BEiTPretraining:
    asked = settings.model
    model = new_model(BEiT, asked.name, asked.image_size, seed, "beit_*_pretraining")
    if len(model.biases) != 1:
        raise SettingsError(
            f"settings: model.name must be one of `pymm list 'beit_*_pretraining'`, got {asked.name!r}"
        )
    return BEiTPretraining(model, tokenizer.vocab_size)


def _asked(
    model: BEiTPretraining,
    tokenizer: ImageTokenizer,
    pixels: Tensor,
    settings: BEiTSettings,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """The tokens of all patches, and which of them are hidden."""
    grid = [size // model.model.embed.patch_size for size in pixels.shape[2:]]
    size = [side * tokenizer.stride for side in grid]
    small = pixels
    if list(pixels.shape[2:]) != size:  # a token for each patch, as BEiT takes smaller pictures for DALL-E's
        small = F.interpolate(pixels.float(), size, mode="bilinear", antialias=True)
        small = small.round().clamp(0, 255).to(torch.uint8)
    mask = block_mask(len(pixels), (grid[0], grid[1]), settings.objective.mask_ratio, generator=generator)
    return tokenizer.to(pixels.device).tokenize(small), mask.to(pixels.device)


def _scores(
    model: BEiTPretraining, tokenizer: ImageTokenizer, batches: PictureLoader, settings: BEiTSettings
) -> dict[str, Any]:
    """Loss and accuracy on pictures that were not trained on, always behind the same masks.

    Beside the accuracy is that of naming always the token that is the most frequent of them all.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)

    def measure(batch: LabelledBatch) -> dict[str, Tensor]:
        tokens, mask = _asked(model, tokenizer, batch.pixels, settings, generator)
        hidden.add_(torch.bincount(tokens[mask].cpu(), minlength=len(hidden)))
        losses, right = model(batch.pixels, tokens, mask)
        return {"loss": losses, "accuracy": right}

    scores: dict[str, Any] = averaged(model, batches, measure)
    return {**scores, "accuracy_of_the_most_frequent": (hidden.max() / hidden.sum()).item()}


@dataclass(frozen=True)
class BEiTRun(Run):
    """A run of BEiT's pretraining; `model.model` is the BEiT."""

    model: BEiTPretraining
    settings: BEiTSettings
    tokenizer: ImageTokenizer

    @classmethod
    def load(cls, home: Path, settings: BEiTSettings, weights: Path) -> BEiTRun:
        tokenizer = _tokenizer(settings)
        model = _model(settings, tokenizer)
        loaded = load_weights(model, weights, f"the model {settings.model.name}")
        return cls(loaded, settings, weights, tokenizer)

    def evaluate(self) -> dict[str, Any]:
        batches = tested_batches(self.settings, self.model.model)
        return _scores(self.model, self.tokenizer, batches, self.settings)

    def table(self, scores: dict[str, Any]) -> Table:
        return scores_table(scores)
