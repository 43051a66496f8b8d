"""What a classifier is trained and tested on: pictures that are held, or a stream of shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pymm.data import EvalTransform, PictureLoader, Pictures, PictureStream, TrainTransform, read_pictures
from pymm.data.classification_sources import Part, join_pictures
from pymm.data.classification_stream import classes_of, is_large
from pymm.training import distributed
from pymm.training.checkpoint import list_checkpoints
from pymm.training.classify_settings import ClassifySettings, PictureSettings
from pymm.training.distributed import World
from pymm.training.rundir import checkpoints_of
from pymm.training.runs import read_classes

Batches = PictureLoader | PictureStream


@dataclass(frozen=True)
class ClassifyData:
    """The data of a run.

    Attributes:
        classes: names of the logits.
        trained: `(model, world)` -> this process's share of the training batches.
        tested: `(model)` -> every tested picture once, in order.
    """

    classes: tuple[str, ...]
    trained: Callable[[Any, World], Batches]
    tested: Callable[[Any], Batches]


def classify_data(settings: ClassifySettings) -> ClassifyData:
    """The data of the settings. A stream's classes are those of the run, where it has begun.

    Raises:
        ValueError: when there is no picture, or a tested one is of another class.
        FileNotFoundError: when there is no such source.
    """
    if not is_streamed(settings.data):
        pictures = pictures_of(settings.data, "train")
        return ClassifyData(
            pictures.classes,
            lambda model, world: PictureLoader(pictures, **_training(settings, model, world)),
            tested_of(settings, pictures.classes),
        )
    classes = distributed.share(_stream_classes(settings) if distributed.current_world().is_main else None)

    def trained(model: Any, world: World) -> Batches:
        options = _training(settings, model, world) | {"shuffle_buffer": settings.data.shuffle_buffer}
        return _stream(settings.data, classes, "train", options)

    return ClassifyData(classes, trained, tested_of(settings, classes))


def _stream_classes(settings: ClassifySettings) -> tuple[str, ...]:
    home = Path(settings.run.out)
    if list_checkpoints(checkpoints_of(home)):
        return read_classes(home)
    return classes_of(settings.data.source, settings.data.label)


def is_streamed(data: PictureSettings) -> bool:
    """Whether the shards that settings name are read anew in every epoch."""
    return data.stream == "yes" or (data.stream == "auto" and is_large(data.source))


def _stream(
    data: PictureSettings, classes: Sequence[str], part: Part, options: dict[str, Any]
) -> PictureStream:
    return PictureStream(
        data.source,
        classes,
        part=part,
        label=data.label,
        test_share=data.test_share,
        split_seed=data.split_seed,
        **options,
    )


def _training(settings: ClassifySettings, model: Any, world: World) -> dict[str, Any]:
    data = settings.data
    share = world.rows(data.batch_size)
    return {
        "transform": TrainTransform(size=model.image_size, output="uint8", **asdict(data.augment)),
        "batch_size": share.stop - share.start,
        "channels": len(model.mean),
        "seed": settings.run.seed,
        "workers": data.workers,
        "rank": world.rank,
        "world_size": world.size,
        "batches_per_epoch": data.batches_per_epoch,
    }


def tested_of(settings: ClassifySettings, classes: Sequence[str]) -> Callable[[Any], Batches]:
    """`(model)` -> what a run is tested on, labelled with its classes; what is held is read once, now."""
    if settings.evaluation.source or not is_streamed(settings.data):
        pictures = tested_pictures(settings, classes)
        return lambda model: tested_batches(model, pictures, settings)
    return lambda model: _stream(settings.data, classes, "test", _testing(settings, model))


def _testing(settings: ClassifySettings, model: Any) -> dict[str, Any]:
    background = settings.data.augment.background
    return {
        "transform": EvalTransform(size=model.image_size, output="uint8", background=background),
        "batch_size": settings.evaluation.batch_size,
        "channels": len(model.mean),
        "shuffle": False,
        "drop_last": False,
    }


def pictures_of(data: PictureSettings, part: Part) -> Pictures:
    """A part of the pictures that settings name."""
    return read_pictures(
        data.source, part, label=data.label, test_share=data.test_share, split_seed=data.split_seed
    )


def tested_pictures(settings: ClassifySettings, classes: Sequence[str]) -> Pictures:
    """What a run is tested on, labelled with its classes."""
    sources, label = settings.evaluation.source, settings.data.label
    if not sources:
        return pictures_of(settings.data, "test").labelled_as(classes)
    read = [read_pictures(source, "all", label=label).labelled_as(classes) for source in sources]
    return join_pictures(read)


def tested_batches(model: Any, pictures: Pictures, settings: ClassifySettings) -> PictureLoader:
    """Every picture once, in order, as the model takes it."""
    return PictureLoader(pictures, **_testing(settings, model))
