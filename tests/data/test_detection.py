"""Pictures with boxes from shards and folders, and their batches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pymm.data import (
    BoxedPictures,
    DetectionLoader,
    Limits,
    SceneDetection,
    SceneSettings,
    read_boxed_pictures,
)
from pymm.data.scenes_shards import WriteSettings, write_scenes
from tests.data.coco import CATEGORIES, write_coco, write_parts
from tests.data.shards import picture, write

SCENES = SceneSettings(size=48, classes=5)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_scenes(WriteSettings(str(folder), count=12, per_shard=5, scenes=SCENES))
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("coco")
    return folder, write_parts(folder, (6, 4))


def test_shards_hold_the_scenes(shards: Path) -> None:
    read, made = read_boxed_pictures(str(shards), "all"), SceneDetection(SCENES, count=12)
    assert len(read) == 12
    assert read.report.skipped.total() == 0
    for i in range(12):
        ours, theirs = read[i], made[i]
        assert torch.equal(ours.pixels, theirs.pixels)
        assert torch.equal(ours.boxes, theirs.boxes)
        assert torch.equal(ours.visible, theirs.visible)
        names = [[d.classes[label] for label in one.labels] for d, one in ((read, ours), (made, theirs))]
        assert names[0] == names[1]
        assert torch.equal(read.truth(i).boxes.float(), made.truth(i).boxes)
    same = read.labelled_as(made.classes)
    assert all(torch.equal(same[i].labels, made[i].labels) for i in range(12))


def test_parts_of_shards(shards: Path) -> None:
    parts = [read_boxed_pictures(str(shards), part, test_share=0.4) for part in ("train", "test", "all")]
    train, test, every = ([p.name(i) for i in range(len(p))] for p in parts)
    assert train
    assert test
    assert sorted(train + test) == every
    assert parts[0].classes == parts[1].classes == parts[2].classes
    other = read_boxed_pictures(str(shards), "test", test_share=0.4, split_seed=1)
    assert list(other.names) != test


def test_samples_that_say_no_objects(tmp_path: Path) -> None:
    def sample(key: str, objects: object) -> list[tuple[str, bytes]]:
        return [(f"{key}.png", picture(0)), (f"{key}.json", json.dumps({"objects": objects}).encode())]

    members = [
        *sample("a", [{"name": "cat", "box": [1, 2, 5, 6]}]),
        *sample("b", []),
        *sample("c", [{"name": "cat", "box": [1, 2, 5]}]),
        *sample("d", [{"name": 3, "box": [1, 2, 5, 6]}]),
        *sample("e", [{"box": [1, 2, 5, 6]}]),
        *sample("f", "cat"),
        *sample("g", [{"name": "cat", "box": [1, 2, 5, float("inf")]}]),
        ("h.png", picture(0)),
        ("i.json", b'{"objects": []}'),
    ]
    read = read_boxed_pictures(str(write(tmp_path / "a.tar", members)), "all")
    assert list(read.names) == ["a", "b"]
    assert read.classes == ("background", "cat")
    assert read.report.skipped == {"no objects": 6, "no image": 1}
    assert read[1].boxes.shape == (0, 4)
    with pytest.raises(ValueError, match=r"at most 10 bytes of pictures \(limits.cache_bytes\), got more at"):
        read_boxed_pictures(str(tmp_path / "a.tar"), limits=Limits(cache_bytes=10))


def check_coco(read: BoxedPictures, data: dict[str, Any]) -> None:
    assert read.classes == ("background", "cat", "dog", "bird")  # in the order of their numbers
    names = {one["id"]: one["name"] for one in CATEGORIES}
    assert list(read.names) == [one["file_name"] for one in data["images"]]
    for i, image in enumerate(data["images"]):
        said = [one for one in data["annotations"] if one["image_id"] == image["id"]]
        truth, sample = read.truth(i), read[i]
        assert [read.classes[label] for label in truth.labels] == [names[one["category_id"]] for one in said]
        assert truth.crowd.tolist() == [bool(one["iscrowd"]) for one in said]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (one["bbox"] for one in said)]
        assert truth.boxes.tolist() == boxes
        assert sample.pixels.shape == (3, image["height"], image["width"])
        assert torch.equal(sample.boxes, truth.boxes[~truth.crowd].float())
        for box, label in zip(sample.boxes.long().tolist(), sample.labels.tolist(), strict=True):
            place = [one["name"] for one in CATEGORIES].index(read.classes[label])
            assert (sample.pixels[place, box[1] : box[3], box[0] : box[2]] == 255).all()


def test_coco(coco: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, parts = coco
    check_coco(read_boxed_pictures(str(folder)), parts[0])
    check_coco(read_boxed_pictures(str(folder), "test"), parts[1])
    every = read_boxed_pictures(str(folder), "all")
    assert len(every) == 10
    val = read_boxed_pictures(str(folder / "annotations" / "instances_val2017.json"), "all")
    check_coco(val, parts[1])
    for i in range(4):
        assert torch.equal(every[6 + i].pixels, val[i].pixels)
        assert torch.equal(every.truth(6 + i).boxes, val.truth(i).boxes)


@pytest.mark.parametrize(
    ("file", "pictures"),
    [
        ("annotations/instances_train.json", "images/train"),
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_default.json", "."),
        ("instances_train.json", "train"),
        ("train/_annotations.coco.json", "train"),
        ("_annotations.coco.json", "."),
        ("train/instances.json", "train"),
    ],
)
def test_layouts(tmp_path: Path, file: str, pictures: str) -> None:
    data = write_coco(tmp_path / file, tmp_path / pictures, 6)
    check_coco(read_boxed_pictures(str(tmp_path), "all"), data)
    names = [read_boxed_pictures(str(tmp_path), part, test_share=0.5).names for part in ("train", "test")]
    assert sorted([*names[0], *names[1]]) == [one["file_name"] for one in data["images"]]
    if file.startswith("train/"):
        held = write_coco(tmp_path / file.replace("train", "valid"), tmp_path / "valid", 3, seed=1)
        check_coco(read_boxed_pictures(str(tmp_path)), data)
        check_coco(read_boxed_pictures(str(tmp_path), "test"), held)


def test_boxes_to_learn_have_an_area_inside_the_picture(tmp_path: Path) -> None:
    file = tmp_path / "instances.json"
    data = write_coco(file, tmp_path, 2)
    one = data["annotations"][0] | {"iscrowd": 0}
    width, height = data["images"][0]["width"], data["images"][0]["height"]
    boxes = [[-5, -6, 15, 16], [3, 3, 0, 9], [width - 4, height - 2, 50, 50], [width + 1, 0, 4, 4]]
    file.write_text(json.dumps(data | {"annotations": [one | {"bbox": box} for box in boxes]}))
    read = read_boxed_pictures(str(tmp_path), "all")
    assert read[0].boxes.tolist() == [[0, 0, 10, 10], [width - 4, height - 2, width, height]]
    assert len(read.truth(0).boxes) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: "{", r"COCO's images, annotations and categories, got JSONDecodeError"),
        (lambda data: [], r"COCO's images, annotations and categories, got TypeError"),
        (
            lambda data: {"images": []},
            r"COCO's images, annotations and categories, got KeyError: 'categories'",
        ),
        (lambda data: data | {"categories": CATEGORIES[1:]}, r"got KeyError: 7"),
        (lambda data: data | {"categories": [*CATEGORIES, {"id": 1, "name": "cat"}]}, r"of distinct names"),
        (lambda data: data | {"images": data["images"][1:]}, r"of its images, got some of image 100"),
        (
            lambda data: data | {"images": [one | {"file_name": "x"} for one in data["images"]]},
            r"pictures of .* must be in one of .*, got none there",
        ),
    ],
)
def test_damaged_annotations(tmp_path: Path, change: Any, message: str) -> None:
    file = tmp_path / "instances.json"
    changed = change(write_coco(file, tmp_path, 3, crowds=False))
    # The dog must be there for its category to be missed.
    assert '"category_id": 7' in file.read_text()
    file.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=r"^read_boxed_pictures: .*" + message):
        read_boxed_pictures(str(tmp_path))


def test_sources_that_are_none(tmp_path: Path, coco: tuple[Path, list[dict[str, Any]]]) -> None:
    with pytest.raises(ValueError, match=r"source must be shards, or a folder with annotations/instances\*"):
        read_boxed_pictures(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="matches no file"):
        read_boxed_pictures(str(tmp_path / "none"))
    with pytest.raises(ValueError, match=r"test_share must be in \(0, 1\), got 1"):
        read_boxed_pictures(str(tmp_path), test_share=1)
    every = read_boxed_pictures(str(coco[0]), "all")
    with pytest.raises(
        ValueError, match=r"class of an object must be one of the 1 that are known, got 'dog'"
    ):
        every.where(lambda name: True).labelled_as(("background", "cat"))


def test_batches(coco: tuple[Path, list[dict[str, Any]]], tmp_path: Path) -> None:
    source = read_boxed_pictures(str(coco[0]))
    loader = DetectionLoader(source, 2, range(2), seed=3)
    first = list(loader.epoch(0))
    assert sorted(i for b in first for i in b.ids.tolist()) == list(range(6))
    for b in first:
        for i, pixels, boxes, labels in zip(b.ids.tolist(), b.pixels, b.boxes, b.labels, strict=True):
            assert torch.equal(pixels, source[i].pixels)
            assert torch.equal(boxes, source[i].boxes)
            assert torch.equal(labels, source[i].labels)
    assert [b.ids.tolist() for b in loader.epoch(1)] != [b.ids.tolist() for b in first]
    with_workers = DetectionLoader(source, 2, range(2), seed=3, workers=1)
    for a, b in zip(with_workers.epoch(0, skip=1), first[1:], strict=True):
        assert a.ids.tolist() == b.ids.tolist()
        assert all(torch.equal(x, y) for x, y in zip(a.pixels, b.pixels, strict=True))
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    damaged = replace(source, pictures=[bad, *source.pictures[1:]])
    loader = DetectionLoader(damaged, 2, range(2), seed=3)
    ids = [b.ids.tolist() for b in loader.epoch(0)]
    for old, new in zip(first, ids, strict=True):
        kept = [i for i in old.ids.tolist() if i != 0]
        assert new == (kept if len(kept) == 2 else kept * 2)
    assert loader.report.skipped == {"not an image": 1}
    assert loader.report.examples == {"not an image": source.name(0)}
    with pytest.raises(ValueError, match="source must be pictures of which some of every batch decode"):
        list(DetectionLoader(replace(source, pictures=[bad] * 6), 2, range(2), seed=3).epoch(0))
