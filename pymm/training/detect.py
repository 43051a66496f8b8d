"""Training a detector on synthetic scenes, and loading what a run left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from pymm.data.scenes_dataset import SceneDetection, collate
from pymm.data.scenes_picture import draw_boxes
from pymm.evaluation.detection import detect, evaluate_detector
from pymm.models import RCNN, create_model
from pymm.objectives import DetectionObjective
from pymm.training.accumulate import Forward, mean_loss
from pymm.training.detect_settings import DetectSettings
from pymm.training.errors import SettingsError
from pymm.training.loop import RunResult, Trainer
from pymm.training.runs import Run, begin_run, load_weights

SHOWN, ENLARGED, COLUMNS = 12, 2, 4  # pictures of `draw`
SURE = 0.5  # the lowest score that `draw` shows


@dataclass
class SceneBatch:
    """Scenes of one size: `pixels (B, 3, H, W)` uint8, boxes and labels of each, numbers `ids (B,)`."""

    pixels: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    ids: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> SceneBatch:
        """The same batch on `device`."""
        return replace(
            self,
            pixels=self.pixels.to(device, non_blocking=non_blocking),
            boxes=[b.to(device, non_blocking=non_blocking) for b in self.boxes],
            labels=[label.to(device, non_blocking=non_blocking) for label in self.labels],
            ids=self.ids.to(device, non_blocking=non_blocking),
        )


class SceneLoader:
    """Batches of scenes, a function of the seed and the epoch alone; `rows` are this process's of each."""

    def __init__(
        self,
        scenes: SceneDetection,
        batch_size: int,
        rows: slice | range,
        seed: int,
        limit: int | None = None,
    ) -> None:
        if len(scenes) < batch_size:
            expected = f"at least {batch_size} scenes, one batch"
            raise SettingsError(f"settings: data.source must have {expected}, got {len(scenes)}")
        self.scenes, self.batch_size, self.seed = scenes, batch_size, seed
        self.rows = slice(rows.start, rows.stop)
        batches = len(scenes) // batch_size
        self.batches = batches if limit is None else min(limit, batches)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[SceneBatch]:
        """The batches of one epoch, without the first `skip`."""
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.scenes))
        for i in range(skip, self.batches):
            chosen = order[i * self.batch_size : (i + 1) * self.batch_size][self.rows]
            batch = collate([self.scenes[int(index)] for index in chosen])
            yield SceneBatch(batch.pixels, batch.boxes, batch.labels, torch.from_numpy(chosen.copy()))


def train_detect(
    settings: DetectSettings, *, on_step: Callable[[dict[str, Any]], None] | None = None
) -> RunResult:
    """Train Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) on synthetic scenes, or go on with a run.

    `settings.run.out` receives `settings.json`, `log.jsonl`, `checkpoints/` and, at the end,
    `model.safetensors`; `load_run` reads them. Under torchrun the processes share every batch.

    Args:
        settings: the model, the data and the run.
        on_step: called in the main process after each step with the line that the log would hold.

    Returns:
        How the run ended.

    Raises:
        SettingsError: for settings that do not fit the model or the run in that directory.
        ValueError: for an unknown model, or scenes that cannot be made.
        TrainingError: as `Trainer.fit`.
    """
    with begin_run(settings) as world:
        scenes = SceneDetection(settings.data.source)
        tested = held_out_scenes(settings)
        model = build_detector(settings, len(scenes.classes))

        def score(scored: nn.Module, step: int) -> dict[str, Any]:
            assert isinstance(scored, RCNN)
            return evaluate_detector(scored, tested, settings.evaluation.batch_size)

        objective = DetectionObjective(**asdict(settings.objective))
        forward = detection_loss(objective, settings.data.flip)
        trainer = Trainer(model, mean_loss, settings, forward=forward, evaluate=score, on_step=on_step)
        data = settings.data
        rows = world.rows(data.batch_size)
        loader = SceneLoader(scenes, data.batch_size, rows, settings.run.seed, data.batches_per_epoch)
        return trainer.fit(loader)


def build_detector(settings: DetectSettings, classes: int) -> RCNN:
    """The detector of the settings for so many classes, the background included.

    Raises:
        ValueError: when there is no such model.
        SettingsError: when it does not propose its own regions.
    """
    asked = settings.model
    torch.manual_seed(settings.run.seed)
    model = create_model(asked.name, num_classes=classes, image_size=asked.image_size)
    if not isinstance(model, RCNN) or model.proposals is None:
        expected = "a detector that proposes regions (pymm list 'fasterrcnn*')"
        raise SettingsError(f"settings: model.name must be {expected}, got {asked.name!r}")
    return model


def held_out_scenes(settings: DetectSettings) -> SceneDetection:
    """What a run is tested on: scenes of its kind that it has not seen."""
    asked = settings.evaluation
    trained = SceneDetection(settings.data.source)
    if asked.start < len(trained):
        expected = f"beyond the {len(trained)} scenes that are trained on"
        raise SettingsError(f"settings: evaluation.start must be {expected}, got {asked.start}")
    return SceneDetection(trained.scenes.settings, asked.count, asked.start)


def detection_loss(objective: DetectionObjective, flip: float) -> Forward:
    """The sum of the losses of a batch, whose pictures are turned left to right with a probability.

    What is drawn comes from torch's generator.
    """

    def forward(model: nn.Module, batch: SceneBatch) -> tuple[Tensor]:
        assert isinstance(model, RCNN)
        pixels, boxes = batch.pixels.clone(), list(batch.boxes)
        width = pixels.shape[3]
        for i in (torch.rand(len(boxes)) < flip).nonzero()[:, 0].tolist():
            pixels[i] = batch.pixels[i].flip(2)
            boxes[i] = flipped(boxes[i], width)
        losses = objective(model, pixels, boxes, batch.labels)
        return (torch.stack(list(losses.values())).sum(),)

    return forward


def flipped(boxes: Tensor, width: int) -> Tensor:
    """`(G, 4)` where they are in the picture turned left to right."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


@dataclass(frozen=True)
class DetectRun(Run):
    """A run of a detector."""

    model: RCNN
    settings: DetectSettings

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label, the background first."""
        return SceneDetection(self.settings.data.source).classes

    @classmethod
    def load(cls, home: Path, settings: DetectSettings, weights: Path) -> DetectRun:
        model = build_detector(settings, len(SceneDetection(settings.data.source).classes))
        return cls(load_weights(model, weights, f"the model {settings.model.name}"), settings, weights)

    def evaluate(self) -> dict[str, Any]:
        asked = self.settings.evaluation
        return evaluate_detector(self.model, held_out_scenes(self.settings), asked.batch_size)

    def table(self, scores: dict[str, Any]) -> Table:
        """Average precisions, with those of the classes that come out worst."""
        table = Table(title_justify="left")
        table.add_column("synthetic scenes")
        for heading in ("average precision", "objects"):
            table.add_column(heading, justify="right")
        for name, words in (("ap", "IoU 0.5 to 0.95"), ("ap50", "IoU 0.5"), ("ap75", "IoU 0.75")):
            table.add_row(words, f"{scores[name]:.3f}", str(scores["objects"]))
        worst = sorted(scores["per_class"].items(), key=lambda one: one[1]["ap"])
        for name, one in worst[:10]:
            table.add_row(f"  {name}", f"{one['ap']:.3f}", str(one["objects"]))
        return table

    def draw(self, path: Path) -> None:
        """Write the first tested scenes with what is found in them as a PNG."""
        tested = held_out_scenes(self.settings)
        tested.count = min(SHOWN, tested.count)
        pictures = []
        for sample, d in zip(
            (tested[i] for i in range(len(tested))), detect(self.model, tested), strict=True
        ):
            sure = d.scores >= SURE
            names = [tested.classes[label] for label in d.labels[sure].tolist()]
            image = Image.fromarray(sample.pixels.permute(1, 2, 0).numpy())
            boxes, scores = d.boxes[sure].tolist(), d.scores[sure].tolist()
            pictures.append(draw_boxes(image, boxes, names, scores, ENLARGED))
        side = pictures[0].width
        page = Image.new("RGB", (COLUMNS * side, -(-len(pictures) // COLUMNS) * side), "white")
        for i, picture in enumerate(pictures):
            page.paste(picture, (i % COLUMNS * side, i // COLUMNS * side))
        page.save(path)
