"""What a CLIP run is made of, from its settings: model, tokenizer, batches, evaluation."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pymm.data import (
    EvalTransform,
    ImageTextLoader,
    Limits,
    Report,
    Tokenizer,
    TrainTransform,
    list_shards,
    unseen_concepts,
)
from pymm.data.captions import Captions
from pymm.data.samples import SampleReader, Select
from pymm.data.tokenizer import FILE as TOKENIZER
from pymm.data.tokenizer import clean
from pymm.evaluation import evaluate_clip
from pymm.models import CLIP, TextTransformer, create_model
from pymm.training.distributed import World
from pymm.training.errors import SettingsError
from pymm.training.files import write_atomically
from pymm.training.settings import ClipSettings, DataSettings, ModelSettings

TOKENIZER_SAMPLES = (
    200_000  # the captions that a vocabulary is learned from: enough for any, and read in seconds
)


def build_model(settings: ModelSettings, seed: int = 0) -> CLIP:
    """The CLIP model of the settings, with weights drawn from the seed.

    Raises:
        ValueError: when there is no such model.
        SettingsError: when it is no CLIP.
    """
    torch.manual_seed(seed)
    model = create_model(settings.name, image_size=settings.image_size)
    if not isinstance(model, CLIP):
        raise SettingsError(
            f"settings: model.name must be a CLIP model (pymm list 'clip_*'), got {settings.name!r}"
        )
    return model


def build_loader(
    settings: ClipSettings, model: CLIP, tokenizer: Tokenizer, world: World | None = None
) -> ImageTextLoader:
    """This process's share of the training batches. Pixels are uint8: the model normalizes."""
    data, world = settings.data, world or World()
    share = world.rows(data.batch_size)
    return ImageTextLoader(
        _source(data.source),
        transform=TrainTransform(size=model.image_size, output="uint8", **asdict(data.augment)),
        tokenizer=tokenizer,
        batch_size=share.stop - share.start,
        seed=settings.run.seed,
        caption_mode=data.captions,
        select=_select(data),
        workers=data.workers,
        rank=world.rank,
        world_size=world.size,
        batches_per_epoch=data.batches_per_epoch,
        pin_memory=settings.run.device.startswith("cuda"),
    )


def evaluate(model: CLIP, tokenizer: Tokenizer, settings: ClipSettings) -> dict[str, Any]:
    """Name the pictures of `settings.evaluation.source` among all their captions.

    Returns:
        What `pymm.evaluation.evaluate_clip` returns; unseen are the concepts that `data.holdout` left out.

    Raises:
        SettingsError: when the settings name no source.
    """
    asked = settings.evaluation
    if not asked.source:
        raise SettingsError("settings: evaluation.source must be at least one source, got none")
    pictures = ImageTextLoader(
        _source(asked.source),
        transform=EvalTransform(size=model.image_size, output="uint8"),
        tokenizer=tokenizer,
        batch_size=asked.batch_size,
        shuffle=False,
        drop_last=False,
        caption_mode="name",
    )
    unseen = unseen_of(settings.data)
    return evaluate_clip(model, tokenizer, pictures, unseen=unseen, templates=asked.templates)


def unseen_of(data: DataSettings) -> frozenset[str]:
    """The keys of the concepts that training leaves out."""
    return unseen_concepts(data.holdout, data.holdout_seed) if data.holdout else frozenset()


def save_new_tokenizer(settings: ClipSettings, model: CLIP) -> None:
    """Make the tokenizer that the settings describe and write it into the run's directory.

    Raises:
        SettingsError: when it does not fit the model.
    """
    data, directory = settings.data, Path(settings.run.out)
    length = model.context_length if data.context_length is None else data.context_length
    if length > model.context_length:
        raise SettingsError(
            f"settings: data.context_length must be at most the model's {model.context_length}, got {length}"
        )
    if data.tokenizer == "train":
        size = model.vocab_size if data.vocab_size is None else data.vocab_size
        tokenizer = Tokenizer.train(_texts(data), size, length)
    elif Path(data.tokenizer).name == "vocab.txt":
        tokenizer = Tokenizer.from_bert(data.tokenizer, length)
    elif data.tokenizer.endswith((".txt", ".gz")):
        tokenizer = Tokenizer.from_clip(data.tokenizer, length)
    else:
        tokenizer = Tokenizer(Tokenizer.load(data.tokenizer).bpe, length)
    if isinstance(model.text, TextTransformer) and not tokenizer.end_is_last:
        raise SettingsError(
            "settings: data.tokenizer must be of CLIP's kind, whose end token comes last, for the model "
            f"{settings.model.name!r}, got one of BERT's kind"
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise SettingsError(
            f"settings: data.tokenizer must have at most the model's {model.vocab_size} tokens, "
            f"got {tokenizer.vocab_size}"
        )
    directory.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as folder:
        write_atomically(directory / TOKENIZER, tokenizer.save(folder).read_bytes())


def _texts(data: DataSettings) -> Iterator[str]:
    """Names, tags, and one drawn caption for each of the first samples."""
    captions = Captions(data.captions, lambda text: bool(clean(text)))
    reader = SampleReader(captions, _select(data), "key", Limits())
    rng = random.Random(0)
    for candidate in islice(reader(list_shards(_source(data.source)), Report()), TOKENIZER_SAMPLES):
        yield candidate.texts.caption
        yield from candidate.texts.tags
        yield captions.draw(candidate.texts, rng)


def _select(data: DataSettings) -> Select | None:
    unseen = unseen_of(data)

    def select(key: str, metadata: Mapping[str, Any]) -> bool:
        return key not in unseen

    return select if unseen else None


def _source(source: tuple[str, ...]) -> str | tuple[str, ...]:
    """One source as itself: the loader keeps the embedded pack decoded when it is the only one."""
    return source[0] if len(source) == 1 else source
