"""Batches of pictures with boxes, the same ones on every run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pymm.data._errors import fail
from pymm.data.decoding import decoded_in_order
from pymm.data.images import BadImage
from pymm.data.report import Report
from pymm.data.scenes_dataset import Detection, Truth

WHERE = "DetectionLoader"


class DetectionSource(Protocol):
    """What a detector is trained and tested on: `SceneDetection`, `BoxedPictures`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Names by label, the background first."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Detection: ...

    def truth(self, index: int) -> Truth:
        """What the score of a picture is computed from."""

    def name(self, index: int) -> str:
        """What a picture is called."""


@dataclass
class BoxedBatch:
    """Pictures, each `(3, h, w)` uint8, with boxes `(G, 4)` and labels `(G,)` of each; numbers `ids (B,)`."""

    pixels: list[Tensor]
    boxes: list[Tensor]
    labels: list[Tensor]
    ids: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> BoxedBatch:
        """The same batch with its tensors on `device`."""

        def moved(tensors: list[Tensor]) -> list[Tensor]:
            return [t.to(device, non_blocking=non_blocking) for t in tensors]

        return replace(
            self,
            pixels=moved(self.pixels),
            boxes=moved(self.boxes),
            labels=moved(self.labels),
            ids=self.ids.to(device, non_blocking=non_blocking),
        )


class _Read(NamedTuple):
    samples: list[Detection]
    kept: list[int]
    failures: list[tuple[str, str]]


class _Reader(Dataset[_Read]):
    """Reads the pictures of a batch; good ones are repeated in the place of those that do not decode."""

    def __init__(self, source: DetectionSource) -> None:
        self.source = source

    def __getitem__(self, rows: list[int]) -> _Read:
        found: dict[int, Detection] = {}
        failures = []
        for row in rows:
            try:
                found[row] = self.source[row]
            except BadImage as error:
                failures.append((str(error), self.source.name(row)))
        kept = list(found)
        if kept:
            kept += [kept[i % len(found)] for i in range(len(failures))]
        return _Read([found[row] for row in kept], kept, failures)


class DetectionLoader:
    """Batches of pictures with boxes, a function of the seed and the epoch alone.

    Args:
        source: the pictures.
        batch_size: pictures per batch, over all processes; the incomplete last batch is left out.
        rows: this process's of each batch.
        seed: of the order.
        batches_per_epoch: ends an epoch earlier.
        workers: processes that decode; 0 does it in this one. The batches are the same ones.

    Raises:
        ValueError: for fewer pictures than one batch needs.

    `report` counts what the latest epoch read and skipped, and why.
    """

    def __init__(
        self,
        source: DetectionSource,
        batch_size: int,
        rows: slice | range,
        seed: int,
        batches_per_epoch: int | None = None,
        workers: int = 0,
    ) -> None:
        if len(source) < batch_size:
            fail(WHERE, "source", f"at least {batch_size} pictures, one batch", len(source))
        self.source, self.batch_size, self.seed, self.workers = source, batch_size, seed, workers
        self.rows = slice(rows.start, rows.stop)
        batches = len(source) // batch_size
        self.batches = batches if batches_per_epoch is None else min(batches_per_epoch, batches)
        self.report = Report()

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[BoxedBatch]:
        """The batches of one epoch, without the first `skip`.

        Raises:
            ValueError: when no picture of a batch decodes: a continued run counts batches.
        """
        report = self.report = Report()
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.source))

        def jobs() -> Iterator[tuple[None, list[int]]]:
            for i in range(skip, self.batches):
                yield None, order[i * self.batch_size : (i + 1) * self.batch_size][self.rows].tolist()

        for _, read in decoded_in_order(_Reader(self.source), jobs, self.workers):
            for reason, where in read.failures:
                report.skip(reason, where)
            report.repeated += len(read.failures)
            if not read.samples:
                fail(WHERE, "source", "pictures of which some of every batch decode", str(report))
            report.read += len(read.kept)
            yield BoxedBatch(
                [one.pixels for one in read.samples],
                [one.boxes for one in read.samples],
                [one.labels for one in read.samples],
                torch.tensor(read.kept, dtype=torch.int64),
            )
