"""Training a detector, and loading what a run left behind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor, nn

from pymm.data import BoxedPictures, DetectionLoader, SceneDetection, read_boxed_pictures
from pymm.data.classification_sources import Part
from pymm.data.detection import BoxedBatch, DetectionSource
from pymm.data.scenes_picture import draw_boxes
from pymm.evaluation.detection import evaluate_detector
from pymm.models import RCNN, create_model
from pymm.objectives import DetectionObjective
from pymm.training.accumulate import Forward, mean_loss
from pymm.training.detect_settings import DetectSettings
from pymm.training.errors import SettingsError
from pymm.training.loop import RunResult, Trainer
from pymm.training.runs import CLASSES, Run, begin_run, load_weights, read_classes, write_classes

SCENES = "scenes:"
SHOWN, ENLARGED, COLUMNS, LARGEST = 12, 2, 4, 256  # pictures of `draw`
SURE = 0.5  # the lowest score that `draw` shows


def train_detect(
    settings: DetectSettings, *, on_step: Callable[[dict[str, Any]], None] | None = None
) -> RunResult:
    """Train Faster R-CNN (Ren et al. 2015, arXiv:1506.01497) on pictures with boxes, or go on with a run.

    `settings.run.out` receives `settings.json`, `classes.json`, `log.jsonl`, `checkpoints/` and, at the end,
    `model.safetensors`; `load_run` reads them. Under torchrun the processes share every batch.

    Args:
        settings: the model, the data and the run.
        on_step: called in the main process after each step with the line that the log would hold.

    Returns:
        How the run ended.

    Raises:
        SettingsError: for settings that do not fit the model or the run in that directory.
        ValueError: for an unknown model, or data that yields nothing.
        FileNotFoundError: when there is no such data.
        TrainingError: as `Trainer.fit`.
    """
    with begin_run(settings) as world:
        pictures = trained_pictures(settings)
        tested = tested_pictures(settings, pictures.classes)
        model = build_detector(settings, len(pictures.classes))
        if world.is_main:
            write_classes(Path(settings.run.out), pictures.classes)

        def score(scored: nn.Module, step: int) -> dict[str, Any]:
            assert isinstance(scored, RCNN)
            return evaluate_detector(scored, tested, settings.evaluation.batch_size)

        objective = DetectionObjective(**asdict(settings.objective))
        forward = detection_loss(objective, settings.data.flip)
        trainer = Trainer(model, mean_loss, settings, forward=forward, evaluate=score, on_step=on_step)
        data = settings.data
        loader = DetectionLoader(
            pictures,
            data.batch_size,
            world.rows(data.batch_size),
            settings.run.seed,
            data.batches_per_epoch,
            data.workers,
        )
        result = trainer.fit(loader)
        if loader.report.skipped:
            print(f"data of the last epoch, process {world.rank}: {loader.report}", flush=True)
        return result


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


def trained_pictures(settings: DetectSettings) -> DetectionSource:
    """What a run is trained on."""
    return _pictures(settings, settings.data.source, "train")


def tested_pictures(settings: DetectSettings, classes: Sequence[str]) -> DetectionSource:
    """What a run is tested on, labelled with its classes."""
    other = settings.evaluation.source
    if not other and settings.data.source.startswith(SCENES):
        return held_out_scenes(settings)
    found = _pictures(settings, other or settings.data.source, "all" if other else "test")
    if isinstance(found, BoxedPictures):
        return found.labelled_as(classes)
    if found.classes != tuple(classes):
        expected = "scenes of the classes that are trained on"
        raise SettingsError(f"settings: evaluation.source must be {expected}, got {other!r}")
    return found


def _pictures(settings: DetectSettings, source: str, part: Part) -> DetectionSource:
    if source.startswith(SCENES):
        return SceneDetection(source)
    data = settings.data
    found = read_boxed_pictures(source, part, test_share=data.test_share, split_seed=data.split_seed)
    if found.report.skipped:
        print(f"{source}: {found.report}", flush=True)
    return found


def held_out_scenes(settings: DetectSettings) -> SceneDetection:
    """What a run on scenes is tested on: scenes of its kind that it has not seen."""
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

    def forward(model: nn.Module, batch: BoxedBatch) -> tuple[Tensor]:
        assert isinstance(model, RCNN)
        pixels, boxes = list(batch.pixels), list(batch.boxes)
        for i in (torch.rand(len(boxes)) < flip).nonzero()[:, 0].tolist():
            pixels[i] = pixels[i].flip(2)
            boxes[i] = flipped(boxes[i], pixels[i].shape[2])
        losses = objective(model, pixels, boxes, batch.labels)
        return (torch.stack(list(losses.values())).sum(),)

    return forward


def flipped(boxes: Tensor, width: int) -> Tensor:
    """`(G, 4)` where they are in the picture turned left to right."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.stack([width - x2, y1, width - x1, y2], 1)


@dataclass(frozen=True)
class DetectRun(Run):
    """A run of a detector; `classes` are names by label, the background first."""

    model: RCNN
    settings: DetectSettings
    classes: tuple[str, ...]

    @classmethod
    def load(cls, home: Path, settings: DetectSettings, weights: Path) -> DetectRun:
        source = settings.data.source
        if source.startswith(SCENES) and not (home / CLASSES).exists():  # a run of an earlier release
            classes = SceneDetection(source).classes
        else:
            classes = read_classes(home)
        model = build_detector(settings, len(classes))
        loaded = load_weights(model, weights, f"the model {settings.model.name}")
        return cls(loaded, settings, weights, classes)

    def evaluate(self) -> dict[str, Any]:
        tested = tested_pictures(self.settings, self.classes)
        return evaluate_detector(self.model, tested, self.settings.evaluation.batch_size)

    def table(self, scores: dict[str, Any]) -> Table:
        """Average precisions, with those of the classes that come out worst."""
        table = Table(title_justify="left")
        scenes = (self.settings.evaluation.source or self.settings.data.source).startswith(SCENES)
        table.add_column("synthetic scenes" if scenes else "pictures")
        for heading in ("average precision", "objects"):
            table.add_column(heading, justify="right")
        for name, words in (("ap", "IoU 0.5 to 0.95"), ("ap50", "IoU 0.5"), ("ap75", "IoU 0.75")):
            table.add_row(words, f"{scores[name]:.3f}", str(scores["objects"]))
        worst = sorted(scores["per_class"].items(), key=lambda one: one[1]["ap"])
        for name, one in worst[:10]:
            table.add_row(f"  {name}", f"{one['ap']:.3f}", str(one["objects"]))
        return table

    def draw(self, path: Path) -> None:
        """Write the first tested pictures with what is found in them as a PNG."""
        tested = tested_pictures(self.settings, self.classes)
        first = [tested[i].pixels for i in range(min(SHOWN, len(tested)))]
        drawn = [self._drawn(pixels) for pixels in first]
        width, height = max(one.width for one in drawn), max(one.height for one in drawn)
        page = Image.new("RGB", (COLUMNS * width, -(-len(drawn) // COLUMNS) * height), "white")
        for i, picture in enumerate(drawn):
            page.paste(picture, (i % COLUMNS * width, i // COLUMNS * height))
        page.save(path)

    @torch.no_grad()
    def _drawn(self, pixels: Tensor) -> Image.Image:
        """A picture, at most `LARGEST` pixels a side before it is enlarged, with what is surely in it."""
        device = next(self.model.parameters()).device
        (found,) = self.model([pixels.to(device)])
        sure = found.scores >= SURE
        names = [self.classes[label] for label in found.labels[sure].tolist()]
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        factor = min(1.0, LARGEST / max(image.size))
        image = image.resize((max(1, round(image.width * factor)), max(1, round(image.height * factor))))
        boxes = (found.boxes[sure].cpu() * factor).tolist()
        return draw_boxes(image, boxes, names, found.scores[sure].tolist(), ENLARGED)
