"""What the tasks that learn from pictures alone have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, Protocol, TypeVar

import torch
from rich.table import Table
from torch import Tensor, nn

from pymm.data import EvalTransform, LabelledBatch, PictureLoader, Pictures, TrainTransform, read_pictures
from pymm.data.classification_sources import join_pictures
from pymm.evaluation.encoding import evaluating
from pymm.layers import Normalize
from pymm.models import create_model
from pymm.training.accumulate import Forward, mean_loss
from pymm.training.classify_settings import ClassEvaluationSettings, PictureSettings
from pymm.training.errors import SettingsError
from pymm.training.loop import RunResult, Trainer
from pymm.training.runs import begin_run
from pymm.training.task_settings import RunSettings, require

Model = TypeVar("Model", bound=nn.Module)
OnStep = Callable[[dict[str, Any]], None] | None


class PictureTask(Protocol):
    """The settings that these tasks share."""

    @property
    def data(self) -> PictureSettings: ...
    @property
    def evaluation(self) -> ClassEvaluationSettings: ...
    @property
    def run(self) -> RunSettings: ...


def new_model(kind: type[Model], name: str, image_size: int | None, seed: int, pattern: str) -> Model:
    """The model of a row, with weights drawn from the seed.

    Raises:
        ValueError: when there is no such model.
        SettingsError: when it is of another kind.
    """
    torch.manual_seed(seed)
    model = create_model(name, image_size=image_size)
    if not isinstance(model, kind):
        raise SettingsError(f"settings: model.name must be one of `pymm list '{pattern}'`, got {name!r}")
    return model


def pretrain(
    settings: Any, model: nn.Module, image: Any, forward: Forward, score: Callable[..., Any], on_step: OnStep
) -> RunResult:
    """Train on the training part of the pictures, or go on where a run broke off.

    Args:
        settings: a `TaskSettings` that is a `PictureTask`.
        model: what is trained.
        image: has the `image_size` that pictures are brought to.
        forward: `(model, batch)` -> `(losses,)`.
        score: `(model, batches)` -> scores of the test part.
        on_step: as `Trainer`'s.
    """
    with begin_run(settings) as world:
        data = settings.data
        expected = f'"auto" or "no" for {settings.task}, which holds its pictures'
        require(data.stream != "yes", "data.stream", expected, data.stream)
        share = world.rows(data.batch_size)
        loader = PictureLoader(
            _part(data, "train"),
            transform=TrainTransform(size=image.image_size, output="uint8", **asdict(data.augment)),
            batch_size=share.stop - share.start,
            seed=settings.run.seed,
            workers=data.workers,
            rank=world.rank,
            world_size=world.size,
            batches_per_epoch=data.batches_per_epoch,
        )
        tested = tested_batches(settings, image)

        def evaluate(scored: nn.Module, step: int) -> dict[str, Any]:
            found: dict[str, Any] = score(scored, tested)
            return found

        trainer = Trainer(model, mean_loss, settings, forward=forward, evaluate=evaluate, on_step=on_step)
        result = trainer.fit(loader)
        if loader.report.skipped:
            print(f"data of the last epoch, process {world.rank}: {loader.report}", flush=True)
        return result


def tested_batches(settings: PictureTask, image: Any) -> PictureLoader:
    """Every picture of the test part, or of the sources that the evaluation names, once and in order."""
    data, asked = settings.data, settings.evaluation
    read = [read_pictures(source, "all", label=data.label or "") for source in asked.source]
    return PictureLoader(
        join_pictures(read) if read else _part(data, "test"),
        transform=EvalTransform(size=image.image_size, output="uint8", background=data.augment.background),
        batch_size=asked.batch_size,
        shuffle=False,
        drop_last=False,
    )


def _part(data: PictureSettings, part: Any) -> Pictures:
    """A part of the pictures. Nobody asks what is on them, so shards need not say it."""
    return read_pictures(
        data.source, part, label=data.label or "", test_share=data.test_share, split_seed=data.split_seed
    )


def normalized(model: Any, pixels: Tensor) -> Tensor:
    """Pixels as the model sees them, in float32."""
    return Normalize(model.mean, model.std)(pixels, torch.float32)


def averaged(
    model: nn.Module, batches: PictureLoader, measure: Callable[[LabelledBatch], dict[str, Tensor]]
) -> dict[str, float]:
    """Means over all pictures of what `measure` says of each, `(B,)`, and their number.

    The model is in eval mode meanwhile.
    """
    totals: dict[str, float] = {}
    count = 0
    for batch in placed(model, batches):
        for name, values in measure(batch).items():
            totals[name] = totals.get(name, 0.0) + values.double().sum().item()
        count += len(batch)
    return {**{name: total / count for name, total in totals.items()}, "pictures": count}


def placed(model: nn.Module, batches: PictureLoader) -> Iterator[LabelledBatch]:
    """The batches where the model is, which is in eval mode and without gradients meanwhile."""
    device = next(model.parameters()).device
    with evaluating(model), torch.no_grad():
        for batch in batches.epoch(0):
            yield batch.to(device)


def scores_table(scores: dict[str, Any]) -> Table:
    """The numbers one under the other."""
    table = Table(title_justify="left")
    table.add_column("on the test part")
    table.add_column("", justify="right")
    for name, value in scores.items():
        table.add_row(name.replace("_", " "), str(value) if isinstance(value, int) else f"{value:.4f}")
    return table
