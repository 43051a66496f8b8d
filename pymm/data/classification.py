"""Batches of labelled pictures, the same ones on every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pymm.data._errors import fail
from pymm.data.classification_sources import Pictures, decode_picture
from pymm.data.decoding import Decoded, DecodedCache, StreamDecoder, decoded_in_order
from pymm.data.report import Report
from pymm.data.samples import Limits, stable_hash
from pymm.data.transforms import Transform

WHERE = "PictureLoader"
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow's mode L


@dataclass
class LabelledBatch:
    """Pixels `(B, C, H, W)` and classes `ids (B,)`, int64."""

    pixels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> LabelledBatch:
        """The same batch with its tensors on `device`."""
        pixels, ids = (t.to(device, non_blocking=non_blocking) for t in (self.pixels, self.ids))
        return replace(self, pixels=pixels, ids=ids)


class PictureLoader:
    """Batches of labelled pictures, a function of the seed and the epoch alone.

    Pictures in memory are decoded once and kept as bytes; files are decoded when it is their turn.

    Args:
        pictures: see `pymm.data.read_pictures`.
        transform: `TrainTransform`, `EvalTransform` or another `Transform`.
        batch_size: rows per batch, > 0.
        channels: 3, or 1 for luminance.
        seed: of shuffling and augmentation.
        shuffle: False keeps the order.
        drop_last: True: every batch has `batch_size` rows, and where a file does not decode, another one of
            its batch is repeated. False: every good picture comes once, batches may be short.
        workers: processes that decode and transform; 0 does it in this one.
        rank, world_size: this process's share of a distributed run.
        batches_per_epoch: ends an epoch earlier.
        limits: sizes beyond which a picture is skipped or a cache refused.

    Raises:
        ValueError: for a wrong argument, or fewer pictures than a batch needs.

    `report` counts what the latest epoch read and skipped, and why.
    """

    def __init__(
        self,
        pictures: Pictures,
        *,
        transform: Transform,
        batch_size: int,
        channels: int = 3,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batches_per_epoch: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        if batch_size < 1:
            fail(WHERE, "batch_size", "positive", batch_size)
        if channels not in (1, 3):
            fail(WHERE, "channels", "1 or 3", channels)
        if not 0 <= rank < world_size:
            fail(WHERE, "rank", f"in [0, world_size = {world_size})", rank)
        share = len(pictures) // world_size
        if drop_last and share < batch_size:
            got = f"{share} of {len(pictures)}"
            fail(WHERE, "pictures", f"at least {batch_size} per process, one batch", got)
        self.pictures, self.transform = pictures, transform
        self.batch_size, self.channels = batch_size, channels
        self.seed, self.shuffle, self.drop_last, self.workers = seed, shuffle, drop_last, workers
        self.rank, self.world_size, self.limits = rank, world_size, limits or Limits()
        self.limit = batches_per_epoch
        self.report = Report()
        self._cache: DecodedCache[int] | None = None

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[LabelledBatch]:
        """The batches of one epoch, without the first `skip`.

        Raises:
            ValueError: when pictures do not decode, or those in memory take more than `limits.cache_bytes`.
        """
        report = self.report = Report()
        files = any(isinstance(picture, Path) for picture in self.pictures.pictures)
        decoder: Dataset[Decoded]
        if files:
            labels = list(self.pictures.labels)
            decoder = StreamDecoder(self.transform, self.limits.max_pixels, self.drop_last, decode_picture)
        else:
            cache = self._load()
            report.add(cache.report)
            labels, decoder = cache.rows, cache.decoder(self.transform)

        def jobs() -> Iterator[tuple[list[int], Any]]:
            for step, rows in enumerate(self._rows(len(labels), epoch)):
                if step >= skip:
                    job: Any = rows
                    if files:
                        at = rows.tolist()
                        job = [(self.pictures.pictures[i], self.pictures.names[i]) for i in at]
                    yield rows.tolist(), (job, stable_hash(self.seed, "augment", epoch, step, self.rank))

        for rows, decoded in decoded_in_order(decoder, jobs, self.workers):
            for reason, where in decoded.failures:
                report.skip(reason, where)
            if decoded.pixels is None:
                if self.drop_last:  # a continued run counts batches: none may be left out
                    got = f"none of {len(rows)} ({report})"
                    fail(WHERE, "pictures", "some of every batch that decode", got)
                continue
            ids = torch.tensor([labels[rows[i]] for i in decoded.kept], dtype=torch.int64)
            report.read += len(ids)
            yield LabelledBatch(channelled(decoded.pixels, self.channels), ids)
        if report.read == 0 and skip == 0:
            fail(WHERE, "pictures", "at least one batch that decodes", str(report))

    def _rows(self, n: int, epoch: int) -> Iterator[Tensor]:
        """Which pictures make up which batch of this process."""
        generator = torch.Generator().manual_seed(stable_hash(self.seed, "order", epoch))
        order = torch.randperm(n, generator=generator) if self.shuffle else torch.arange(n)
        share = order[self.rank :: self.world_size]
        if self.drop_last:
            share = share[: n // self.world_size]
        for step, rows in enumerate(share.split(self.batch_size)):
            if step == self.limit or (self.drop_last and len(rows) < self.batch_size):
                return
            yield rows

    def _load(self) -> DecodedCache[int]:
        if self._cache is None:
            report = Report()
            report.add(self.pictures.report)
            p = self.pictures
            samples = zip(p.labels, p.pictures, p.names, strict=True)
            self._cache = DecodedCache.read(
                samples, self.transform, self.limits, report, decode_picture, WHERE
            )
        return self._cache


def channelled(pixels: Tensor, channels: int) -> Tensor:
    """`(B, 3, H, W)` as it is, or its luminance for one channel."""
    if channels == 3:
        return pixels
    grey = (pixels.float() * torch.tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)
    return grey.round().to(torch.uint8) if pixels.dtype == torch.uint8 else grey
