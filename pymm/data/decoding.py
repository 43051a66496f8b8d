"""Decoding of planned batches, in this process or in a worker, from a stream or from memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from pymm.data._errors import fail
from pymm.data.images import BadImage, decode_image
from pymm.data.report import Report
from pymm.data.samples import Limits
from pymm.data.transforms import Transform, premultiplied

Row = TypeVar("Row")
Plan = TypeVar("Plan")
Made = TypeVar("Made")
# (what stands for an image, the largest number of pixels) -> the image; raises BadImage.
Decode = Callable[[Any, int], Image.Image]


class Decoded(NamedTuple):
    """Pixels of a batch, None when no image of it could be decoded.

    `kept[i]` is the row of the plan that pixels[i] shows; `failures` are pairs of reason and place.
    """

    pixels: Tensor | None
    kept: list[int]
    failures: list[tuple[str, str]]


class StreamDecoder(Dataset[Decoded]):
    """Decodes a batch of encoded images.

    Args:
        transform: makes the pixels.
        max_pixels: see `Limits`.
        refill: repeat good images of the batch where others do not decode, so that its size stays.
        decode: makes an image of what the jobs hold.
    """

    def __init__(
        self, transform: Transform, max_pixels: int, refill: bool, decode: Decode = decode_image
    ) -> None:
        self.transform, self.max_pixels, self.refill, self.decode = transform, max_pixels, refill, decode

    def __getitem__(self, job: tuple[list[tuple[Any, str]], int]) -> Decoded:
        encoded, seed = job
        images: dict[int, Image.Image] = {}
        failures = []
        for i, (data, where) in enumerate(encoded):
            try:
                images[i] = self.decode(data, self.max_pixels)
            except BadImage as error:
                failures.append((str(error), where))
        if not images:
            return Decoded(None, [], failures)
        kept = list(images)
        if self.refill:
            kept += [kept[i % len(images)] for i in range(len(failures))]
        generator = torch.Generator().manual_seed(seed)
        return Decoded(self.transform([images[i] for i in kept], generator), kept, failures)


class CacheDecoder(Dataset[Decoded]):
    """Makes pixels of images that are decoded already: one stacked tensor, or arrays of different sizes."""

    def __init__(self, transform: Transform, images: Tensor | list[np.ndarray[Any, Any]]) -> None:
        self.transform, self.images = transform, images

    def __getitem__(self, job: tuple[Tensor, int]) -> Decoded:
        indices, seed = job
        picked: Tensor | list[Image.Image]
        if isinstance(self.images, Tensor):
            picked = self.images[indices]
        else:
            picked = [_to_image(self.images[i]) for i in indices.tolist()]
        pixels = self.transform(picked, torch.Generator().manual_seed(seed))
        return Decoded(pixels, list(range(len(indices))), [])


@dataclass
class DecodedCache(Generic[Row]):
    """All usable samples of a source, decoded.

    Attributes:
        rows: what the caller keeps of each sample.
        images: uint8 `(N, C, h, w)` when all have one size, else arrays `(h, w, C)`.
        report: what was skipped on the way.
    """

    rows: list[Row]
    images: Tensor | list[np.ndarray[Any, Any]]
    report: Report

    @classmethod
    def read(
        cls,
        samples: Iterable[tuple[Row, Any, str]],
        transform: Transform,
        limits: Limits,
        report: Report,
        decode: Decode = decode_image,
        asker: str = "ImageTextLoader",
    ) -> DecodedCache[Row]:
        """Decode triples of row, encoded image and place; errors begin with `asker`.

        Raises:
            ValueError: when the images take more than `limits.cache_bytes`.
        """
        rows: list[Row] = []
        arrays: list[np.ndarray[Any, Any]] = []
        taken = 0
        for row, data, where in samples:
            try:
                image = decode(data, limits.max_pixels)
            except BadImage as error:
                report.skip(str(error), where)
                continue
            array = np.asarray(premultiplied(transform.reduce(image)))
            taken += array.nbytes
            if taken > limits.cache_bytes:
                fail(
                    asker,
                    "source",
                    f'at most {limits.cache_bytes} bytes decoded for cache="decoded" (limits.cache_bytes)',
                    f"more at its image number {len(rows) + 1}",
                )
            rows.append(row)
            arrays.append(array)
        if len({array.shape[:2] for array in arrays}) != 1:
            return cls(rows, arrays, report)
        return cls(rows, _stack(arrays), report)

    def decoder(self, transform: Transform) -> CacheDecoder:
        return CacheDecoder(transform, self.images)


def decoded_in_order(
    decoder: Dataset[Made], jobs: Callable[[], Iterator[tuple[Plan, Any]]], workers: int
) -> Iterator[tuple[Plan, Made]]:
    """Decode jobs in order, each given with its plan, which waits here while the images are with a worker.

    Args:
        decoder: takes a job, gives what is made of it.
        jobs: pairs of plan and job.
        workers: processes; 0 decodes in this one.
    """
    if workers == 0:
        for plan, job in jobs():
            yield plan, decoder[job]
        return
    waiting: deque[Plan] = deque()

    def sampled() -> Iterator[Any]:
        for plan, job in jobs():
            waiting.append(plan)
            yield job

    # A generator of its own: drawing the workers' seeds must not move the program's random state.
    loader: DataLoader[Made] = DataLoader(
        decoder, batch_size=None, sampler=_Jobs(sampled), num_workers=workers, generator=torch.Generator()
    )
    for decoded in loader:
        yield waiting.popleft(), decoded


class _Jobs:
    def __init__(self, jobs: Callable[[], Iterator[Any]]) -> None:
        self.jobs = jobs

    def __iter__(self) -> Iterator[Any]:
        return self.jobs()


def _stack(arrays: list[np.ndarray[Any, Any]]) -> Tensor:
    """uint8 `(N, C, h, w)`; opaque images get an alpha channel where another one has it."""
    channels = max(array.shape[2] for array in arrays)
    out = torch.full((len(arrays), channels, *arrays[0].shape[:2]), 255, dtype=torch.uint8)
    for i, array in enumerate(arrays):
        out[i, : array.shape[2]] = torch.tensor(array).permute(2, 0, 1)
    return out


def _to_image(array: np.ndarray[Any, Any]) -> Image.Image:
    height, width, channels = array.shape
    mode = "RGB" if channels == 3 else "RGBa"
    return Image.frombuffer(mode, (width, height), array.tobytes(), "raw", mode, 0, 1)
