"""Labelled pictures from shards that are not held."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pymm.data import EvalTransform, PictureLoader, PictureStream, TrainTransform, read_pictures
from pymm.data import classification_stream as streams
from pymm.data.classification_stream import classes_of, is_large
from tests.data.shards import picture, png_header, write

CLASSES = ("2", "9", "10")
TRAIN = TrainTransform(8, crop_scale=(0.3, 1.0), flip=0.5, brightness=0.4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five shards of nine; of each, one picture's pixels are cut off and one claims too many."""
    root = tmp_path_factory.mktemp("stream")
    for shard in range(5):
        members: list[tuple[str, bytes]] = []
        for i in range(9 * shard, 9 * shard + 9):
            image = picture(i)
            if i % 9 == 4:
                image = image[:90]
            if i % 9 == 7:
                image = png_header(1 << 15, 1 << 15)
            members += [(f"s{i:03}.png", image), (f"s{i:03}.cls", CLASSES[i % 3].encode())]
        write(root / f"{shard}.tar", members)
    return root


@pytest.fixture
def stream(folder: Path) -> Callable[..., PictureStream]:
    def made(**options: Any) -> PictureStream:
        defaults = {"transform": TRAIN, "batch_size": 4, "seed": 3, "shuffle_buffer": 7, "test_share": 0.3}
        return PictureStream(str(folder), CLASSES, **(defaults | options))

    return made


def pixels_and_ids(batches: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(b.pixels, b.ids) for b in batches]


def same(a: Any, b: Any) -> bool:
    pairs = zip(pixels_and_ids(a), pixels_and_ids(b), strict=True)
    return all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in pairs)


def test_classes(folder: Path, tmp_path: Path) -> None:
    assert classes_of(str(folder)) == CLASSES  # in the order of numbers
    assert classes_of(str(folder)) == read_pictures(str(folder), "all").classes
    write(tmp_path / "none.tar", [("a.png", picture(0))])
    with pytest.raises(ValueError, match=r"must be shards of pictures with classes, .*1 no class"):
        classes_of(str(tmp_path))


@pytest.mark.parametrize("part", ["train", "test", "all"])
def test_the_pictures_are_those_that_are_held(folder: Path, stream: Any, part: Any) -> None:
    options: dict[str, Any] = {
        "transform": EvalTransform(8),
        "shuffle": False,
        "drop_last": False,
        "batch_size": 4,
    }
    held = PictureLoader(read_pictures(str(folder), part, test_share=0.3), **options)
    streamed = stream(part=part, **options)
    a, b = pixels_and_ids(held.epoch(0)), pixels_and_ids(streamed.epoch(0))
    assert torch.equal(torch.cat([p for p, _ in a]), torch.cat([p for p, _ in b]))
    assert torch.equal(torch.cat([i for _, i in a]), torch.cat([i for _, i in b]))
    assert streamed.report.read == held.report.read == sum(len(i) for _, i in b)
    assert streamed.report.skipped == held.report.skipped


def test_batches_do_not_depend_on_skip_workers_or_the_past(stream: Any) -> None:
    reference = list(stream().epoch(2))
    assert len(reference) >= 5
    assert all(len(b) == 4 for b in reference)
    used = stream()
    next(used.epoch(0))
    for skip in range(len(reference) + 1):
        assert same(used.epoch(2, skip), reference[skip:])
    assert same(stream(workers=1).epoch(2, 1), reference[1:])
    assert not same(used.epoch(1), reference)
    assert not same(stream(seed=4).epoch(2), reference)


def test_skipping_decodes_nothing(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    transform = TrainTransform.__call__

    def counted(self: TrainTransform, images: Any, generator: torch.Generator) -> torch.Tensor:
        seen.append(len(images))
        return transform(self, images, generator)

    batches = stream()
    total = len(list(batches.epoch(0)))
    monkeypatch.setattr(TrainTransform, "__call__", counted)
    assert len(list(batches.epoch(0, total - 1))) == 1
    assert seen == [4]


def test_no_more_is_held_than_the_buffer(stream: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    samples = streams.labelled_samples

    def counted(*args: Any) -> Any:
        for sample in samples(*args):
            read.append(sample.key)
            yield sample

    monkeypatch.setattr(streams, "labelled_samples", counted)
    epoch = stream(shuffle_buffer=3, part="all").epoch(0)
    next(epoch)
    assert len(read) <= 3 + 2 * 4 + 2  # the buffer, what fills it again, and what is skipped
    list(epoch)
    assert len(read) == 45


def test_ranks_share_the_shards_and_end_together(stream: Any) -> None:
    parts = [stream(part="all", world_size=2, rank=i, batches_per_epoch=9) for i in range(2)]
    batches = [list(part.epoch(0)) for part in parts]
    assert [len(b) for b in batches] == [9, 9]  # more than there are: the shards are gone through again
    one_pass = [{tuple(p.flatten().tolist()) for b in each[:3] for p in b.pixels} for each in batches]
    assert not one_pass[0] & one_pass[1]
    with pytest.raises(ValueError, match="batches_per_epoch must be given for a stream in a distributed run"):
        stream(world_size=2)
    with pytest.raises(ValueError, match="source must be at least 6 shards, one per rank, got 5"):
        stream(world_size=6, batches_per_epoch=1)


def test_a_class_that_is_not_known_is_skipped(folder: Path) -> None:
    known = PictureStream(str(folder), CLASSES[:2], transform=TRAIN, batch_size=4, part="all")
    assert {int(i) for b in known.epoch(0) for i in b.ids} == {0, 1}
    assert known.report.skipped["unknown class"] == 15


def test_luminance(stream: Any) -> None:
    assert next(stream(channels=1).epoch(0)).pixels.shape == (4, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"shuffle_buffer": 0}, "shuffle_buffer must be positive, got 0"),
        ({"channels": 2}, "channels must be 1 or 3, got 2"),
        ({"rank": 1}, r"rank must be in \[0, world_size = 1\), got 1"),
        ({"test_share": 0.0}, r"test_share must be in \(0, 1\), got 0.0"),
    ],
)
def test_wrong_arguments(stream: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^PictureStream: {message}"):
        stream(**options)


def test_too_few_for_a_batch(stream: Any) -> None:
    with pytest.raises(ValueError, match="source must be one with at least 99 usable samples per rank"):
        list(stream(batch_size=99).epoch(0))


def test_what_is_large(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_large(str(folder))
    assert is_large("https://example.invalid/{0..3}.tar")
    for source in ("digits", "emoji:noto", "mnist:/nowhere", str(tmp_path)):
        assert not is_large(source)
    monkeypatch.setattr(streams, "HELD_BYTES", 1000)
    assert is_large(str(folder))
