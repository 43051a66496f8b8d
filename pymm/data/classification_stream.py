"""Batches of labelled pictures from shards that need not fit into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from pymm.data._errors import fail
from pymm.data.classification import LabelledBatch, channelled
from pymm.data.classification_sources import (
    LabelledSample,
    Part,
    is_tested,
    labelled_samples,
    ordered_classes,
)
from pymm.data.decoding import StreamDecoder, decoded_in_order
from pymm.data.images import BadImage, open_image
from pymm.data.remote import local_path
from pymm.data.report import Report
from pymm.data.samples import Limits, stable_hash
from pymm.data.shards import SUFFIXES, list_shards
from pymm.data.stream import ShardStream
from pymm.data.transforms import Transform

WHERE = "PictureStream"
HELD_BYTES = 1 << 28  # shards of more, and shards elsewhere, are streamed unless another wish is told


def is_large(source: str) -> bool:
    """Whether a source is shards that are better not read at once: many bytes, or on another machine."""
    if source == "digits" or source.startswith(("emoji:", "mnist:", "fashion-mnist:", "scenes:")):
        return False
    folder = Path(source)
    if folder.is_dir() and not any(p.name.endswith(SUFFIXES) for p in folder.iterdir()):
        return False
    paths = [local_path(shard) for shard in list_shards(source)]
    return sum(HELD_BYTES if p is None else p.stat().st_size for p in paths) >= HELD_BYTES


def classes_of(source: str, label: str | None = None, limits: Limits | None = None) -> tuple[str, ...]:
    """The classes in shards, for which all of them are read once.

    Args:
        source, label: as for `pymm.data.read_pictures`.
        limits: sizes beyond which a member is skipped.

    Raises:
        ValueError: when there is none.
    """
    report = Report()
    samples = labelled_samples(list_shards(source), label, limits or Limits(), report)
    classes = ordered_classes(sample.kind for sample in samples)
    if not classes:
        fail(WHERE, "source", "shards of pictures with classes", f"none in {source!r} ({report})")
    return classes


class PictureStream:
    """Batches of the labelled pictures of shards, a function of the seed and the epoch alone.

    The shards are read once per epoch and shuffled twice: the shards, then the pictures in a buffer. Which of
    them make up a batch is settled before any is decoded, so skipping batches decodes nothing.

    Args:
        source: shards, see `list_shards`.
        classes: names of the labels; pictures of others are skipped.
        transform: `TrainTransform`, `EvalTransform` or another `Transform`.
        batch_size: rows per batch, > 0.
        part: the same pictures as of `read_pictures`; `"all"` is both parts.
        label, test_share, split_seed: as there.
        channels: 3, or 1 for luminance.
        seed: of shuffling and augmentation.
        shuffle: False keeps the order of the shards.
        shuffle_buffer: pictures held, still encoded, to draw from.
        drop_last: True: every batch has `batch_size` rows, and where a picture does not decode, another one
            of its batch is repeated. False: every good picture comes once, batches may be short.
        workers: processes that decode and transform; 0 does it in this one.
        rank, world_size: this process's share of a distributed run, which is dealt out by shards.
        batches_per_epoch: ends an epoch after so many batches, going through the shards again when they are
            too short. Required in distributed runs, whose ranks would else end apart.
        limits: sizes beyond which a picture is skipped.

    Raises:
        ValueError: for a wrong argument.
        FileNotFoundError: when the source matches nothing.

    `report` counts what the latest epoch read and skipped, and why.
    """

    def __init__(
        self,
        source: str,
        classes: Sequence[str],
        *,
        transform: Transform,
        batch_size: int,
        part: Part = "train",
        label: str | None = None,
        test_share: float = 0.2,
        split_seed: int = 0,
        channels: int = 3,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 2000,
        drop_last: bool = True,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batches_per_epoch: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("shuffle_buffer", shuffle_buffer)):
            if value < 1:
                fail(WHERE, name, "positive", value)
        if channels not in (1, 3):
            fail(WHERE, "channels", "1 or 3", channels)
        if not 0 <= rank < world_size:
            fail(WHERE, "rank", f"in [0, world_size = {world_size})", rank)
        if not 0 < test_share < 1:
            fail(WHERE, "test_share", "in (0, 1)", test_share)
        self.classes, self.part, self.label = tuple(classes), part, label
        self.test_share, self.split_seed = test_share, split_seed
        self.transform, self.channels, self.seed, self.workers = transform, channels, seed, workers
        self.rank, self.drop_last, self.limits = rank, drop_last, limits or Limits()
        self.report = Report()
        self._place = {kind: i for i, kind in enumerate(self.classes)}
        self._stream = ShardStream(
            WHERE,
            source,
            list_shards(source),
            self._read,
            batch_size,
            seed,
            shuffle,
            shuffle_buffer,
            drop_last,
            batches_per_epoch,
            rank,
            world_size,
        )

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[LabelledBatch]:
        """The batches of one epoch, without the first `skip`.

        Raises:
            ValueError: when there is none, or no picture of a batch decodes: a continued run counts batches.
            OSError: when a shard cannot be opened or read.
        """
        report = self.report = Report()

        def jobs() -> Iterator[tuple[list[LabelledSample], Any]]:
            for step, rows in enumerate(self._stream.batches(epoch, report)):
                if step >= skip:
                    seed = stable_hash(self.seed, "augment", epoch, step, self.rank)
                    yield rows, ([(one.image, one.where) for one in rows], seed)

        decoder = StreamDecoder(self.transform, self.limits.max_pixels, self.drop_last)
        for rows, decoded in decoded_in_order(decoder, jobs, self.workers):
            for reason, where in decoded.failures:
                report.skip(reason, where)
            if decoded.pixels is None:
                if self.drop_last:
                    fail(WHERE, "source", "pictures of which some of every batch decode", str(report))
                continue
            ids = torch.tensor([self._place[rows[i].kind] for i in decoded.kept], dtype=torch.int64)
            report.read += len(ids)
            report.repeated += len(decoded.kept) - len(set(decoded.kept))
            yield LabelledBatch(channelled(decoded.pixels, self.channels), ids)

    def _read(self, shards: Sequence[str], report: Report) -> Iterator[LabelledSample]:
        for sample in labelled_samples(shards, self.label, self.limits, report, self._is_of_part):
            if sample.kind not in self._place:
                report.skip("unknown class", sample.where)
                continue
            try:
                open_image(sample.image, self.limits.max_pixels)
            except BadImage as error:
                report.skip(str(error), sample.where)
                continue
            yield sample

    def _is_of_part(self, key: str) -> bool:
        if self.part == "all":
            return True
        return is_tested(key, None, self.test_share, self.split_seed) == (self.part == "test")
