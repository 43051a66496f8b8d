"""Which samples of a stream of shards make up which batch: a function of the seed and the epoch alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, NoReturn, TypeVar

from webdataset import shuffle as buffer_shuffle

from pymm.data._errors import fail
from pymm.data.report import Report
from pymm.data.samples import stable_hash

Row = TypeVar("Row")


@dataclass(frozen=True)
class ShardStream(Generic[Row]):
    """Batches of the samples of shards, which are read once per epoch and never held as a whole.

    Attributes:
        asker, source: what errors begin with, and what they name.
        shards: what `list_shards` gives.
        read: `(shards, report)` -> their samples, one after another.
        batch_size: samples per batch.
        seed: of both shufflings: the shards' order, then that of the samples in a buffer.
        shuffle: False keeps the order of the shards.
        shuffle_buffer: samples held, still encoded, to draw from.
        drop_last: the incomplete last batch of an epoch is left out.
        limit: ends an epoch after so many batches, going through the shards again, shuffled anew, when they
            are too short.
        rank, world_size: every so manieth shard is this process's.
    """

    asker: str
    source: object
    shards: Sequence[str]
    read: Callable[[Sequence[str], Report], Iterator[Row]]
    batch_size: int
    seed: int
    shuffle: bool
    shuffle_buffer: int
    drop_last: bool
    limit: int | None
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        if self.world_size > 1:
            if self.limit is None:
                fail(self.asker, "batches_per_epoch", "given for a stream in a distributed run", None)
            if len(self.shards) < self.world_size:
                expected = f"at least {self.world_size} shards, one per rank"
                fail(self.asker, "source", expected, len(self.shards))

    def batches(self, epoch: int, report: Report) -> Iterator[list[Row]]:
        """The batches of one epoch.

        Raises:
            ValueError: when there is none.
        """
        step, turn, seen = 0, 0, 0
        rows: list[Row] = []
        while True:
            before = seen
            for row in self._samples(epoch, turn, report):
                seen += 1
                rows.append(row)
                if len(rows) == self.batch_size:
                    yield rows
                    rows, step = [], step + 1
                    if step == self.limit:
                        return
            if self.limit is None or seen == before:
                break
            turn += 1
        if rows and not self.drop_last:
            yield rows
            step += 1
        if step == 0:
            nothing(self.asker, self.source, self.batch_size if self.drop_last else 1, seen, report)

    def _samples(self, epoch: int, turn: int, report: Report) -> Iterator[Row]:
        shards = list(self.shards)
        if self.shuffle:
            random.Random(stable_hash(self.seed, "shards", epoch, turn)).shuffle(shards)
        samples = self.read(shards[self.rank :: self.world_size], report)
        if self.shuffle:
            rng = random.Random(stable_hash(self.seed, "buffer", epoch, turn, self.rank))
            size = self.shuffle_buffer
            return iter(buffer_shuffle(size, initial=size, rng=rng)(samples))
        return samples


def nothing(asker: str, source: object, least: int, usable: int, report: Report) -> NoReturn:
    """Raise the ValueError of a source that yields no batch."""
    expected = f"one with at least {least} usable samples per rank"
    fail(asker, "source", expected, f"{usable} from {source!r} ({report})")
