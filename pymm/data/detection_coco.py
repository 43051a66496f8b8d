"""Annotations in COCO's format: where a folder keeps them, and what they say."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pymm.data._errors import fail

# A folder's annotations: COCO's own place, and those that tools write; the first that is there.
PLACES = (
    "annotations/instances*.json",
    "instances*.json",
    "*/instances*.json",
    "_annotations.coco.json",
    "*/_annotations.coco.json",
)
TESTED = ("val", "test")


class CocoObject(NamedTuple):
    """`label` counts the categories, by number, from 1; `box` is left, top, right, bottom."""

    label: int
    box: tuple[float, float, float, float]
    crowd: bool


class CocoFile(NamedTuple):
    """Categories, and of each picture its file, its name and its objects."""

    categories: list[str]
    files: list[Path]
    names: list[str]
    objects: list[list[CocoObject]]


def coco_files(source: Path) -> dict[str, Path]:
    """The annotations of a folder in COCO's format by their part's name; empty where it is none."""
    if source.suffix == ".json" and source.is_file():
        return {_part_of(source, nested=False): source}
    for place in PLACES:
        found = sorted(source.glob(place))
        if found:
            return {_part_of(file, nested=place.startswith("*")): file for file in found}
    return {}


def _part_of(file: Path, nested: bool) -> str:
    return file.parent.name if nested else file.stem.removeprefix("instances").lstrip("_")


def read_coco(where: str, part: str, file: Path) -> CocoFile:
    """What one file of annotations says; errors begin with `where`.

    Raises:
        ValueError: when it is damaged or says something else, or its pictures are nowhere near it.
    """
    try:
        data = json.loads(file.read_bytes())
        named = sorted((int(one["id"]), str(one["name"])) for one in data["categories"])
        pictures = {one["id"]: str(one["file_name"]) for one in data["images"]}
        objects = _objects(data["annotations"], {number: i for i, (number, _) in enumerate(named, start=1)})
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        expected = "COCO's images, annotations and categories"
        fail(where, str(file), expected, f"{type(error).__name__}: {error}")
    categories = [name for _, name in named]
    if len(set(categories)) < len(categories):
        fail(where, f"categories of {file}", "of distinct names", f"{len(categories)} with some alike")
    strange = objects.keys() - pictures.keys()
    if strange:
        fail(where, f"annotations of {file}", "of its images", f"some of image {min(strange, key=str)!r}")
    folder = _folder(where, part, file, list(pictures.values()))
    names = list(pictures.values())
    return CocoFile(categories, [folder / name for name in names], names, [objects[i] for i in pictures])


def _objects(annotations: Sequence[Any], labels: dict[int, int]) -> defaultdict[Any, list[CocoObject]]:
    found: defaultdict[Any, list[CocoObject]] = defaultdict(list)
    for one in annotations:
        x, y, width, height = map(float, one["bbox"])
        if not all(map(math.isfinite, (x, y, width, height))):
            raise ValueError(f"bbox {one['bbox']}")
        label = labels[one["category_id"]]
        found[one["image_id"]].append(
            CocoObject(label, (x, y, x + width, y + height), bool(one.get("iscrowd", 0)))
        )
    return found


def _folder(where: str, part: str, file: Path, names: Sequence[str]) -> Path:
    """Where the pictures are: under the part's name or beside the annotations, with or without `images`."""
    home = file.parent.parent if file.parent.name == "annotations" else file.parent
    tried = [home / part, home / "images" / part, home / "images", home]
    found = next((folder for folder in tried if not names or (folder / names[0]).is_file()), None)
    if found is None:
        places = ", ".join(map(str, dict.fromkeys(tried)))
        fail(where, f"pictures of {file}", f"in one of {places}", "none there")
    return found
