from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pymm.data import EvalTransform, PictureLoader, Pictures, TrainTransform, read_pictures
from pymm.data.emoji import emoji_concepts
from tests.data.shards import write


def png(value: int, side: int = 6) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.full((side, side, 3), value, np.uint8)).save(out, "PNG")
    return out.getvalue()


def write_idx(path: Path, array: np.ndarray[Any, Any], compress: bool) -> None:
    header = bytes((0, 0, 8, array.ndim)) + np.array(array.shape, ">i4").tobytes()
    data = header + array.astype(np.uint8).tobytes()
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    """Twelve and five pictures whose pixels are their labels."""
    for part, n, compress in (("train", 12, True), ("t10k", 5, False)):
        labels = np.arange(n) % 10
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels, compress)
        images = np.tile(labels[:, None, None], (1, 4, 4))
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images, compress)
    return tmp_path


def test_idx_files_plain_and_compressed(idx: Path) -> None:
    source = f"fashion-mnist:{idx}"
    train, test = read_pictures(source), read_pictures(source, "test")
    assert (len(train), len(test), len(read_pictures(source, "all"))) == (12, 5, 17)
    assert train.classes[9] == "ankle boot"
    for one in (train, test):
        assert [int(p[0, 0]) for p in one.pictures] == list(one.labels)  # type: ignore[call-overload]
    assert read_pictures(f"mnist:{idx}").classes == tuple("0123456789")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "an IDX file of bytes in 1 dimensions, got one that begins with nothing"),
        (
            bytes((0, 0, 8, 3)) + bytes(8),
            "an IDX file of bytes in 1 dimensions, got one that begins with 00000803",
        ),
        (bytes((0, 0, 8, 1, 0, 0, 0, 5, 1)), "5 bytes after its header, got 1"),
        (bytes((0, 0, 8, 1, 0, 0, 0, 1, 1)), "5, as many as images, got 1"),
        (bytes((0, 0, 8, 1, 0, 0, 0, 5)) + bytes((0, 1, 2, 3, 10)), "below 10, got 10"),
    ],
)
def test_wrong_idx_files_are_named(idx: Path, data: bytes, message: str) -> None:
    (idx / "t10k-labels-idx1-ubyte").write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_pictures(f"mnist:{idx}")


def test_damaged_and_missing_idx_files(idx: Path) -> None:
    file = idx / "train-labels-idx1-ubyte.gz"
    whole = file.read_bytes()
    for data in (whole[:20], b"no gzip", whole[:-9] + bytes(9)):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte\.gz is damaged"):
            read_pictures(f"mnist:{idx}")
    file.unlink()
    with pytest.raises(FileNotFoundError, match="train-labels-idx1-ubyte does not exist, nor"):
        read_pictures(f"mnist:{idx}")


def test_digits_are_split_the_same_way_every_time() -> None:
    pytest.importorskip("sklearn")
    train, test = read_pictures("digits"), read_pictures("digits", "test")
    assert len(train) + len(test) == 1797
    assert not set(train.names) & set(test.names)
    assert 0.17 < len(test) / 1797 < 0.23
    assert set(train.labels) == set(test.labels) == set(range(10))
    assert test.names == read_pictures("digits", "test").names
    assert test.names != read_pictures("digits", "test", split_seed=1).names
    assert len(read_pictures("digits", "test", test_share=0.5)) > 2 * len(test)
    assert max(int(p.max()) for p in train.pictures) == 255  # type: ignore[union-attr]


def test_emoji_are_tested_in_the_styles_not_named() -> None:
    train, test = (read_pictures("emoji:twemoji,fluent", part) for part in ("train", "test"))
    n = len(emoji_concepts())
    assert (len(train), len(test), len(train.classes)) == (2 * n, n, 9)
    assert train.classes == test.classes
    assert list(train.labels[:n]) == list(train.labels[n:]) == list(test.labels)
    assert "flags" in train.classes
    assert len(read_pictures("emoji:noto", label="subgroup").classes) == 97


def test_without_a_style_to_test_the_concepts_are_split() -> None:
    train, test = (read_pictures("emoji:noto,twemoji,fluent", part) for part in ("train", "test"))
    concepts = [{name.rpartition("/")[2] for name in one.names} for one in (train, test)]
    assert not concepts[0] & concepts[1]
    assert len(train) == 3 * len(concepts[0])
    assert len(test) == 3 * len(concepts[1])


def folder(root: Path, counts: dict[str, int]) -> None:
    for value, (kind, n) in enumerate(counts.items(), 1):
        (root / kind).mkdir(parents=True, exist_ok=True)
        for i in range(n):
            (root / kind / f"{i}.png").write_bytes(png(20 * value))
        (root / kind / "notes.txt").write_text("no picture")


def test_folders(tmp_path: Path) -> None:
    folder(tmp_path, {"cat": 30, "dog": 20})
    parts = {part: read_pictures(str(tmp_path), part) for part in ("train", "test", "all")}  # type: ignore[arg-type]
    assert parts["all"].classes == ("cat", "dog")
    assert len(parts["train"]) + len(parts["test"]) == len(parts["all"]) == 50
    assert all(Path(str(p)).parent.name == ("cat", "dog")[i] for p, i in zip(
        parts["all"].pictures, parts["all"].labels, strict=True))  # fmt: skip
    folder(tmp_path / "own" / "train", {"cat": 3, "dog": 2})
    folder(tmp_path / "own" / "val", {"dog": 1})
    own = {part: read_pictures(str(tmp_path / "own"), part) for part in ("train", "test")}  # type: ignore[arg-type]
    assert (len(own["train"]), list(own["test"].labels)) == (5, [1])


def test_shards_with_cls_or_json(tmp_path: Path) -> None:
    members = [(f"{i}.png", png(i)) for i in range(10)] + [(f"{i}.cls", b"%d" % (10 - i)) for i in range(10)]
    write(tmp_path / "a.tar", sorted(members))
    read = read_pictures(str(tmp_path / "a.tar"), "all")
    assert read.classes == tuple(str(i) for i in range(1, 11))  # numbers in the order of numbers
    assert list(read.labels) == list(range(9, -1, -1))
    metadata = [b'{"kind": "b"}', b'{"kind": "a"}', b'{"kind": ["c"]}', b"{", b'{"other": 1}']
    members = [m for i, text in enumerate(metadata) for m in ((f"{i}.png", png(i)), (f"{i}.json", text))]
    write(tmp_path / "b.tar", members)
    read = read_pictures(str(tmp_path / "b.tar"), "all", label="kind")
    assert (read.classes, list(read.labels)) == (("a", "b"), [1, 0])
    assert read.report.skipped == {"no class": 3}
    with pytest.raises(ValueError, match="source must be one with pictures in its all part"):
        read_pictures(str(tmp_path / "b.tar"), "all", label="nothing")


@pytest.mark.parametrize("source", ["nowhere", "fashion-mnist:/nowhere", "/nowhere/*.tar"])
def test_sources_that_are_not_there(source: str) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_pictures(source)


def test_wrong_sources(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="style must be one of"):
        read_pictures("emoji:apple")
    with pytest.raises(ValueError, match=r"test_share must be in \(0, 1\), got 1"):
        read_pictures("digits", test_share=1)
    with pytest.raises(ValueError, match="a folder of folders of pictures"):
        read_pictures(str(tmp_path))
    one = Pictures(("a",), [0], [b""], ["x"])
    with pytest.raises(ValueError, match="class of a picture must be one of the 1 that are known, got 'a'"):
        one.labelled_as(["b"])


# Batches


def numbered(n: int, **options: Any) -> PictureLoader:
    """Pictures whose grey is their number."""
    arrays = [np.full((6, 6), i, np.uint8) for i in range(n)]
    pictures = Pictures(tuple(map(str, range(n))), range(n), arrays, [str(i) for i in range(n)])
    return PictureLoader(pictures, transform=EvalTransform(size=6, output="uint8"), **options)


def test_every_picture_comes_once_with_its_label() -> None:
    for options in ({"channels": 3}, {"channels": 1}, {"workers": 1}):
        batches = list(numbered(10, batch_size=4, drop_last=False, **options).epoch(0))
        assert [len(b) for b in batches] == [4, 4, 2]
        assert all(b.pixels.shape[1:] == (options.get("channels", 3), 6, 6) for b in batches)
        assert all(torch.equal(b.pixels[:, 0, 0, 0].long(), b.ids) for b in batches)
        assert sorted(torch.cat([b.ids for b in batches]).tolist()) == list(range(10))


def test_an_epoch_is_a_function_of_its_number() -> None:
    loader = numbered(13, batch_size=4)
    first = [b.ids.tolist() for b in loader.epoch(3)]
    assert [len(b) for b in first] == [4, 4, 4]
    assert [b.ids.tolist() for b in loader.epoch(3, skip=1)] == first[1:]
    assert [b.ids.tolist() for b in loader.epoch(4)] != first
    assert [b.ids.tolist() for b in numbered(13, batch_size=4, seed=1).epoch(3)] != first
    assert len(list(numbered(13, batch_size=4, batches_per_epoch=2).epoch(0))) == 2


def test_processes_share_an_epoch() -> None:
    shares = [numbered(13, batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    seen = [i for loader in shares for b in loader.epoch(0) for i in b.ids.tolist()]
    assert len(seen) == len(set(seen)) == 12
    assert len({len(list(loader.epoch(0))) for loader in shares}) == 1


def test_files_are_read_when_it_is_their_turn_and_damaged_ones_replaced(tmp_path: Path) -> None:
    folder(tmp_path, {"a": 4, "b": 4})
    (tmp_path / "a" / "0.png").write_bytes(png(20)[:40])
    pictures = read_pictures(str(tmp_path), "all")
    transform = TrainTransform(size=6, crop_scale=(1, 1), crop_ratio=(1, 1), output="uint8")
    loader = PictureLoader(pictures, transform=transform, batch_size=4)
    batches = list(loader.epoch(0))
    assert [len(b) for b in batches] == [4, 4]
    assert all(torch.equal(b.pixels[:, 0, 0, 0].long(), 20 * (1 + b.ids)) for b in batches)
    assert loader.report.skipped.total() == 1
    alone = PictureLoader(pictures, transform=transform, batch_size=1)
    with pytest.raises(ValueError, match="pictures must be some of every batch that decode, got none of 1"):
        list(alone.epoch(0))


def test_wrong_loaders() -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size must be positive"),
        ({"batch_size": 1, "channels": 2}, "channels must be 1 or 3"),
        ({"batch_size": 1, "rank": 1}, r"rank must be in \[0, world_size = 1\)"),
        ({"batch_size": 5}, "at least 5 per process, one batch, got 4 of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            numbered(4, **options)


def test_json_of_the_pack_has_the_labels() -> None:
    """The groups are those of the metadata, for every concept."""
    from pymm.data.emoji import emoji_shards
    from pymm.data.report import Report
    from pymm.data.shards import read_samples

    read = read_pictures("emoji:noto", "train")
    groups = [
        json.loads(s["json"])["group"]
        for s in read_samples(map(str, emoji_shards(["noto"])), Report(), 1 << 20)
    ]
    assert [read.classes[i] for i in read.labels] == groups
