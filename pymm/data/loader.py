"""Batches of images and captions from WebDataset shards, the same ones on every run."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.data import Dataset

from pymm.data._errors import fail
from pymm.data.captions import Captions, Texts
from pymm.data.decoding import Decoded, DecodedCache, StreamDecoder, decoded_in_order
from pymm.data.report import Report, logger
from pymm.data.samples import Candidate, Limits, SampleReader, Select, stable_hash
from pymm.data.shards import list_shards
from pymm.data.stream import ShardStream, nothing
from pymm.data.tokenizer import Tokenizer
from pymm.data.transforms import Transform

WHERE = "ImageTextLoader"
KEPT_TEXTS = 1 << 16


@dataclass
class Batch:
    """One step's images and texts.

    Attributes:
        pixels: `(B, 3, H, W)`, float32 or uint8, as the transform gives them.
        tokens: `(B, L)` int64.
        ids: `(B,)` int64, equal for samples of one concept.
        keys: the samples' keys.
        captions: the texts behind the tokens.
    """

    pixels: Tensor
    tokens: Tensor
    ids: Tensor
    keys: list[str]
    captions: list[str]

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The same batch with its tensors on `device`."""
        pixels, tokens, ids = (
            t.to(device, non_blocking=non_blocking) for t in (self.pixels, self.tokens, self.ids)
        )
        return replace(self, pixels=pixels, tokens=tokens, ids=ids)


class _Row(NamedTuple):
    key: str
    id: int
    texts: Texts


class _Plan(NamedTuple):
    """A batch before its images are decoded."""

    step: int
    rows: list[_Row]
    images: Any  # encoded bytes with where they came from, or indices into the cache


class ImageTextLoader:
    """Batches of images and captions, a function of the seed and the epoch alone.

    Shards are read once per epoch. A cached source is shuffled as a whole. A streamed one is shuffled twice:
    its shards, then its samples in a buffer. Which samples make up a batch is settled before any image is
    decoded, so skipping batches decodes nothing.

    Args:
        source: see `pymm.data.shards.list_shards`; `"emoji:twemoji,fluent"` is the embedded pack.
        transform: `TrainTransform`, `EvalTransform` or another `Transform`.
        tokenizer: turns captions into rows.
        batch_size: rows per batch, > 0.
        seed: of shuffling, captions and augmentation.
        shuffle: False keeps the order of the shards.
        shuffle_buffer: samples held, still encoded, to draw from when streaming.
        drop_last: True: every batch has `batch_size` rows; the incomplete last one is left out, and where an
            image turns out not to decode, another one of its batch is repeated (counted in the report).
            False: every good sample comes exactly once, batches may be short.
        caption_mode: see `pymm.data.captions.Captions`.
        context_length: tokens per row; the tokenizer's by default.
        select: `select(key, metadata) -> bool` keeps a sample or leaves it out.
        ids: what makes two samples the same concept: equal `"key"`, equal `"caption"`, or nothing
            (`"sample"`), for shards whose keys start again in each.
        cache: `"decoded"`: decode every image once and keep it as bytes, for small sets. `"none"`: stream.
            `"auto"`: decoded for the embedded pack and synthetic scenes, else none.
        limits: sizes beyond which a sample is skipped or a cache refused.
        workers: processes that decode and transform; 0 does it in this one. The batches are the same ones.
        rank, world_size: this process's share of a distributed run. A cached source is dealt out by samples,
            a stream by shards.
        batches_per_epoch: end an epoch after so many batches, going through the source again, shuffled anew,
            when it is too short. Required for streams in distributed runs, whose ranks would else end apart.
        pin_memory: give pixels in page-locked memory, for `to(device, non_blocking=True)`.

    Raises:
        ValueError: for a wrong argument or a source that is refused.
        FileNotFoundError: when the source matches nothing.

    `report` counts what the latest epoch read and skipped, and why.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        *,
        transform: Transform,
        tokenizer: Tokenizer,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        shuffle_buffer: int = 2000,
        drop_last: bool = True,
        caption_mode: str | Sequence[str] = "name",
        context_length: int | None = None,
        select: Select | None = None,
        ids: Literal["key", "caption", "sample"] = "key",
        cache: Literal["auto", "decoded", "none"] = "auto",
        limits: Limits | None = None,
        workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batches_per_epoch: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("shuffle_buffer", shuffle_buffer)):
            if value < 1:
                fail(WHERE, name, "positive", value)
        if workers < 0:
            fail(WHERE, "workers", "at least 0", workers)
        if not 0 <= rank < world_size:
            fail(WHERE, "rank", f"in [0, world_size = {world_size})", rank)
        if batches_per_epoch is not None and batches_per_epoch < 1:
            fail(WHERE, "batches_per_epoch", "positive", batches_per_epoch)
        if cache not in ("auto", "decoded", "none"):
            fail(WHERE, "cache", '"auto", "decoded" or "none"', repr(cache))
        self.source, self.shards = source, list_shards(source)
        if cache == "auto":
            cache = (
                "decoded" if isinstance(source, str) and source.startswith(("emoji:", "scenes:")) else "none"
            )
        self.transform, self.tokenizer, self.batch_size, self.seed = transform, tokenizer, batch_size, seed
        self.shuffle, self.shuffle_buffer, self.drop_last = shuffle, shuffle_buffer, drop_last
        self.context_length = tokenizer.context_length if context_length is None else context_length
        self.limits = limits or Limits()
        self.workers, self.rank, self.world_size = workers, rank, world_size
        self.limit, self.pin_memory = batches_per_epoch, pin_memory
        self.captions = Captions(caption_mode, lambda text: len(self._encode(text)) > 0)
        self.reader = SampleReader(self.captions, select, ids, self.limits)
        self.report = Report()
        self._texts: dict[str, list[int]] = {}
        self._cached = cache == "decoded"
        self._stream: ShardStream[Candidate] | None = None
        if not self._cached:
            self._stream = ShardStream(
                WHERE,
                source,
                self.shards,
                self.reader,
                batch_size,
                seed,
                shuffle,
                shuffle_buffer,
                drop_last,
                batches_per_epoch,
                rank,
                world_size,
            )
        self._cache: DecodedCache[_Row] | None = None
        self._told: set[str] = set()

    @property
    def batches_per_epoch(self) -> int | None:
        """Batches of an epoch, for which a cached source is read; None where only streaming would tell."""
        if self.limit is not None or not self._cached:
            return self.limit
        return _batches(self._share(self._load()), self.batch_size, self.drop_last)

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Batch]:
        """The batches of one epoch, without the first `skip`.

        The batches are those of `epoch(epoch)` from number `skip` on, to the bit.

        Raises:
            ValueError: when the source yields no batch at all: nothing usable in it, or fewer samples than
                one batch needs.
            OSError: when a shard cannot be opened or read.
        """
        if epoch < 0 or skip < 0:
            fail(WHERE, "epoch and skip", "at least 0", (epoch, skip))
        return self._epoch(epoch, skip)

    def _epoch(self, epoch: int, skip: int) -> Iterator[Batch]:
        report = self.report = Report()
        plan_epoch = self._cached_plans if self._cached else self._stream_plans
        plans = plan_epoch(epoch, skip, report)
        missing = 0
        for plan, decoded in self._decode(plans, epoch):
            for reason, where in decoded.failures:
                report.skip(reason, where)
            self._tell(report)
            if decoded.pixels is None:
                missing += self.drop_last  # no image of it decodes: its place is taken by the next batch
                continue
            batch = self._batch(plan, decoded, epoch)
            report.repeated += len(decoded.kept) - len(set(decoded.kept)) + missing * len(batch)
            for _ in range(1 + missing):
                report.read += len(batch)
                yield batch
            missing = 0
        self._tell(report)
        if report.read == 0 and skip == 0:
            self._nothing(report, 0)

    # Which samples make up which batch

    def _cached_plans(self, epoch: int, skip: int, report: Report) -> Iterator[_Plan]:
        cache = self._load()
        report.add(cache.report)
        share = self._share(cache)
        per_pass = _batches(share, self.batch_size, self.drop_last)
        if per_pass == 0:
            self._nothing(report, share)
        steps = per_pass if self.limit is None else self.limit
        order: Tensor | None = None
        for step in range(skip, steps):
            turn, at = divmod(step, per_pass)
            if order is None or at == 0:
                order = self._order(epoch, turn, len(cache.rows))[self.rank :: self.world_size][:share]
            indices = order[at * self.batch_size : (at + 1) * self.batch_size]
            yield _Plan(step, [cache.rows[i] for i in indices.tolist()], indices)

    def _order(self, epoch: int, turn: int, n: int) -> Tensor:
        if not self.shuffle:
            return torch.arange(n)
        return torch.randperm(n, generator=self._generator("order", epoch, turn))

    def _share(self, cache: DecodedCache[_Row]) -> int:
        """Samples of this rank; with full batches wanted, the same number for every rank."""
        n, world = len(cache.rows), self.world_size
        return n // world if self.drop_last else len(range(self.rank, n, world))

    def _stream_plans(self, epoch: int, skip: int, report: Report) -> Iterator[_Plan]:
        assert self._stream is not None
        for step, rows in enumerate(self._stream.batches(epoch, report)):
            if step >= skip:
                yield _stream_plan(step, rows)

    def _nothing(self, report: Report, usable: int) -> NoReturn:
        nothing(WHERE, self.source, self.batch_size if self.drop_last else 1, usable, report)

    # From plans to batches

    def _decode(self, plans: Iterator[_Plan], epoch: int) -> Iterator[tuple[_Plan, Decoded]]:
        def jobs() -> Iterator[tuple[_Plan, Any]]:
            for plan in plans:
                seed = stable_hash(self.seed, "augment", epoch, plan.step, self.rank)
                yield plan, (plan.images, seed)

        decoder: Dataset[Decoded]
        if self._cached:
            decoder = self._load().decoder(self.transform)
        else:
            decoder = StreamDecoder(self.transform, self.limits.max_pixels, refill=self.drop_last)
        return decoded_in_order(decoder, jobs, self.workers)

    def _batch(self, plan: _Plan, decoded: Decoded, epoch: int) -> Batch:
        assert decoded.pixels is not None
        rng = random.Random(stable_hash(self.seed, "captions", epoch, plan.step, self.rank))
        drawn = [self.captions.draw(row.texts, rng) for row in plan.rows]
        rows = [plan.rows[i] for i in decoded.kept]
        captions = [drawn[i] for i in decoded.kept]
        pixels, tokens = decoded.pixels, self._tokens(captions)
        ids = torch.tensor([row.id for row in rows], dtype=torch.int64)
        if self.pin_memory:
            pixels, tokens, ids = pixels.pin_memory(), tokens.pin_memory(), ids.pin_memory()
        return Batch(pixels, tokens, ids, [row.key for row in rows], captions)

    def _tokens(self, captions: list[str]) -> Tensor:
        length = self.context_length
        tokens = torch.zeros(len(captions), length, dtype=torch.int64)
        for row, caption in enumerate(captions):
            ids = [self.tokenizer.start, *self._encode(caption)[: length - 2], self.tokenizer.end]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens

    def _encode(self, text: str) -> list[int]:
        ids = self._texts.get(text)
        if ids is None:
            if len(self._texts) >= KEPT_TEXTS:
                self._texts.clear()
            ids = self._texts[text] = self.tokenizer.encode(text)
        return ids

    def _load(self) -> DecodedCache[_Row]:
        if self._cache is None:
            report = Report()
            candidates = self.reader(self.shards, report)
            self._cache = DecodedCache.read(
                ((_Row(c.key, c.id, c.texts), c.image, c.where) for c in candidates),
                self.transform,
                self.limits,
                report,
            )
        return self._cache

    def _generator(self, *parts: object) -> torch.Generator:
        return torch.Generator().manual_seed(stable_hash(self.seed, *parts))

    def _tell(self, report: Report) -> None:
        """Log every reason the first time it comes up; the counts go on in the report."""
        for reason in report.skipped.keys() - self._told:
            self._told.add(reason)
            logger.warning(
                "skipped: %s (%s); further ones are counted in report", reason, report.examples[reason]
            )


def _stream_plan(step: int, rows: list[Candidate]) -> _Plan:
    return _Plan(step, [_Row(c.key, c.id, c.texts) for c in rows], [(c.image, c.where) for c in rows])


def _batches(samples: int, batch_size: int, drop_last: bool) -> int:
    return samples // batch_size if drop_last else -(-samples // batch_size)
