"""Training a classifier from scratch or from a checkpoint, and loading what a run left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.data import LabelledBatch
from pymm.evaluation.classification import (
    confusion_matrix,
    confusion_picture,
    evaluate_classifier,
    predict,
)
from pymm.models.tokened import TokenNetwork
from pymm.training import distributed
from pymm.training.accumulate import Forward, mean_loss
from pymm.training.checkpoint import list_checkpoints
from pymm.training.classify_data import Batches, classify_data, tested_of
from pymm.training.classify_settings import ClassifySettings, CrossEntropySettings
from pymm.training.errors import SettingsError
from pymm.training.loop import RunResult, Trainer
from pymm.training.rundir import checkpoints_of
from pymm.training.runs import Run, begin_run, load_weights, read_classes, write_classes
from pymm.training.transfer import build_backbone, build_from, describe_init, freeze, learning_rates


def train_classify(
    settings: ClassifySettings, *, on_step: Callable[[dict[str, Any]], None] | None = None
) -> RunResult:
    """Train an image model to name classes, from scratch or from a checkpoint, or go on with a run.

    `settings.run.out` receives `settings.json`, `classes.json`, `log.jsonl`, `checkpoints/` and, at the end,
    `model.safetensors`; `load_run` reads them. Under torchrun the processes share every batch.

    Args:
        settings: the model, the data and the run.
        on_step: called in the main process after each step with the line that the log would hold.

    Returns:
        How the run ended.

    Raises:
        SettingsError: for settings that do not fit the model, the checkpoint, or the run in that directory.
        ValueError: for an unknown model, or data that yields nothing.
        FileNotFoundError: when there is no such data or checkpoint.
        TrainingError: as `Trainer.fit`.
    """
    with begin_run(settings) as world:
        data = classify_data(settings)
        model = _model(settings, len(data.classes), world)
        if world.is_main:
            write_classes(Path(settings.run.out), data.classes)

        def score(scored: nn.Module, step: int) -> dict[str, Any]:
            return evaluate_classifier(scored, data.tested(scored), data.classes)

        trainer = Trainer(
            model,
            mean_loss,
            settings,
            forward=cross_entropy(settings.objective, len(data.classes)),
            evaluate=score,
            rates=learning_rates(model, settings.optimizer.layer_decay, settings.optimizer.head_rate),
            on_step=on_step,
        )
        loader = data.trained(model, world)
        result = trainer.fit(loader)
        if loader.report.skipped:
            print(f"data of the last epoch, process {world.rank}: {loader.report}", flush=True)
        return result


def _model(settings: ClassifySettings, classes: int, world: distributed.World) -> nn.Module:
    """The model as training begins. A run that goes on has its weights from its checkpoint."""
    asked, seed = settings.model, settings.run.seed
    started = distributed.share(bool(list_checkpoints(checkpoints_of(Path(settings.run.out)))))
    if asked.init is None or started:
        model = build_backbone(asked.backbone, classes, image_size=asked.image_size, seed=seed)
    else:
        model, report = build_from(
            asked.backbone, classes, asked.init, image_size=asked.image_size, seed=seed
        )
        if world.is_main:
            print(describe_init(asked.init, report), flush=True)
    freeze(model, asked.freeze)
    if asked.drop_path:
        if not isinstance(model, TokenNetwork):
            raise SettingsError(
                f"settings: model.drop_path must be 0 for {asked.backbone}, which is no transformer, "
                f"got {asked.drop_path}"
            )
        model.set_drop_path(asked.drop_path)
    return model


def cross_entropy(settings: CrossEntropySettings, classes: int) -> Forward:
    """The loss of each picture, mixed with others of its batch where the settings say so.

    What is drawn comes from torch's generator.
    """

    def forward(model: nn.Module, batch: LabelledBatch) -> tuple[Tensor]:
        pixels, targets = batch.pixels, F.one_hot(batch.ids, classes).float()
        if settings.mixup or settings.cutmix:
            pixels, targets = mixed(pixels, targets, settings.mixup, settings.cutmix)
        logits = model(pixels).float()
        smoothing = settings.label_smoothing
        return (F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing),)

    return forward


def mixed(pixels: Tensor, targets: Tensor, mixup: float, cutmix: float) -> tuple[Tensor, Tensor]:
    """A batch mixed with itself in reverse order, by mixup or cutmix.

    Args:
        pixels: `(B, C, H, W)`; uint8 stays so, rounded.
        targets: `(B, K)`, mixed in the same shares.
        mixup, cutmix: parameters of the two beta distributions; where both are above 0 a coin decides.
    """
    patch = cutmix > 0 and (mixup == 0 or bool(torch.rand(()) < 0.5))
    alpha = torch.tensor(cutmix if patch else mixup)
    share = torch.distributions.Beta(alpha, alpha).sample().item()
    other = pixels.flip(0)
    if patch:
        height, width = pixels.shape[2:]
        tall, wide = round(height * (1 - share) ** 0.5), round(width * (1 - share) ** 0.5)
        top = int(torch.randint(height - tall + 1, ()))
        left = int(torch.randint(width - wide + 1, ()))
        pixels = pixels.clone()
        pixels[:, :, top : top + tall, left : left + wide] = other[:, :, top : top + tall, left : left + wide]
        share = 1 - tall * wide / (height * width)
    else:
        blended = torch.lerp(other.float(), pixels.float(), share)
        pixels = blended.round().to(pixels.dtype) if pixels.dtype == torch.uint8 else blended.to(pixels)
    return pixels, torch.lerp(targets.flip(0), targets, share)


@dataclass(frozen=True)
class ClassifyRun(Run):
    """A run of a classifier; `classes` are the names of its logits."""

    settings: ClassifySettings
    classes: tuple[str, ...]

    @classmethod
    def load(cls, home: Path, settings: ClassifySettings, weights: Path) -> ClassifyRun:
        classes = read_classes(home)
        asked = settings.model
        model = build_backbone(asked.backbone, len(classes), image_size=asked.image_size)
        return cls(load_weights(model, weights, f"the model {asked.backbone}"), settings, weights, classes)

    def evaluate(self) -> dict[str, Any]:
        return evaluate_classifier(self.model, self._batches(), self.classes)

    def table(self, scores: dict[str, Any]) -> Table:
        """Accuracies, with those of the classes that come out worst."""
        table = Table(title_justify="left")
        table.add_column("")
        for heading in ("accuracy", "pictures"):
            table.add_column(heading, justify="right")
        for name in ("top1", "top5", "mean_class_accuracy", "largest_class"):
            table.add_row(name.replace("_", " "), f"{scores[name]:.3f}", str(scores["pictures"]))
        worst = sorted(scores["per_class"].items(), key=lambda one: one[1]["accuracy"])
        for name, one in worst[:10]:
            table.add_row(f"  {name}", f"{one['accuracy']:.3f}", str(one["pictures"]))
        return table

    def draw(self, path: Path) -> None:
        """Write the confusion of the classes as a PNG."""
        logits, labels = predict(self.model, self._batches())
        title = f"{self.settings.model.backbone} on {len(labels)} pictures"
        confusion_picture(path, confusion_matrix(logits, labels), self.classes, title)

    def _batches(self) -> Batches:
        return tested_of(self.settings, self.classes)(self.model)
