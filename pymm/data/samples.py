"""A shard's raw sample to a candidate: everything that can be known about it without decoding the image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

from pymm.data._errors import fail
from pymm.data.captions import Captions, Texts
from pymm.data.images import BadImage, open_image
from pymm.data.report import Report
from pymm.data.shards import read_samples

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
IDS = ("key", "caption", "sample")
Select = Callable[[str, Mapping[str, Any]], bool]


@dataclass(frozen=True)
class Limits:
    """What a sample may cost.

    Attributes:
        max_pixels: width × height of an image, checked before it is decoded.
        max_member_bytes: size of a member of a shard, checked before it is read.
        cache_bytes: decoded images kept in memory.
    """

    max_pixels: int = 1 << 26
    max_member_bytes: int = 1 << 27
    cache_bytes: int = 1 << 30

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_member_bytes", "cache_bytes"):
            if getattr(self, name) < 1:
                fail("Limits", name, "positive", getattr(self, name))


class Candidate(NamedTuple):
    key: str
    id: int
    where: str
    texts: Texts
    image: bytes


def stable_hash(*parts: object) -> int:
    """A number in [0, 2⁶³) that is the same on every machine and in every run."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


@dataclass
class SampleReader:
    """Reads candidates from shards; see `ImageTextLoader` for the arguments."""

    captions: Captions
    select: Select | None
    ids: str
    limits: Limits

    def __post_init__(self) -> None:
        if self.ids not in IDS:
            fail("ImageTextLoader", "ids", f"one of {', '.join(IDS)}", repr(self.ids))

    def __call__(self, shards: Sequence[str], report: Report) -> Iterator[Candidate]:
        for sample in read_samples(shards, report, self.limits.max_member_bytes):
            candidate = self._candidate(sample, report)
            if candidate is not None:
                yield candidate

    def _candidate(self, sample: Mapping[str, Any], report: Report) -> Candidate | None:
        key, shard = sample["__key__"], sample["__url__"]
        where = f"{shard}: {key}"
        image = next((sample[s] for s in sample if s.rsplit(".", 1)[-1] in IMAGE_SUFFIXES), None)
        try:
            metadata = _metadata(sample)
            if metadata is not None and self.select is not None and not self.select(key, metadata):
                report.left_out += 1
                return None
            if image is None:
                raise _Unusable("no image")
            if metadata is None:
                raise _Unusable("no caption")
            texts = self.captions.texts(metadata)
            if texts is None:
                raise _Unusable("empty caption")
            open_image(image, self.limits.max_pixels)
        except (_Unusable, BadImage) as error:
            report.skip(str(error), where)
            return None
        parts = {"key": (key,), "caption": (texts.caption,), "sample": (shard, key)}[self.ids]
        return Candidate(key, stable_hash(*parts), where, texts, image)


class _Unusable(Exception):
    """A sample that cannot be used; the text is the reason that the report counts."""


def _metadata(sample: Mapping[str, Any]) -> dict[str, Any] | None:
    """The caption and what came with it: `.json` with a `caption`, or `.txt`; None where there is neither."""
    metadata: dict[str, Any] = {}
    if "json" in sample:
        try:
            metadata = json.loads(sample["json"])
        except (ValueError, RecursionError):
            raise _Unusable("invalid JSON") from None
        if not isinstance(metadata, dict):
            raise _Unusable("invalid JSON")
    if not isinstance(metadata.get("caption"), str) and "txt" in sample:
        try:
            metadata["caption"] = sample["txt"].decode("utf-8")
        except UnicodeDecodeError:
            raise _Unusable("caption that is no UTF-8") from None
    return metadata if metadata else None
