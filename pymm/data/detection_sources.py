"""Pictures with boxes from shards of scenes and from folders in COCO's format."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pymm.data._errors import fail
from pymm.data.classification_sources import Part, decode_picture, is_tested
from pymm.data.detection_coco import PLACES, TESTED, CocoFile, coco_files, read_coco
from pymm.data.report import Report
from pymm.data.samples import IMAGE_SUFFIXES, Limits
from pymm.data.scenes_dataset import BACKGROUND, Detection, Truth
from pymm.data.shards import SUFFIXES, list_shards, read_samples

WHERE = "read_boxed_pictures"


@dataclass(frozen=True)
class BoxedPictures(Dataset[Detection]):
    """Pictures with boxes, not yet decoded.

    Attributes:
        classes: names by label, the background first.
        pictures: each encoded, or as a file that is read when it is needed.
        names: each picture's, which decides on which side of a split it falls.
        objects: rows of `boxes`, `labels` and `crowd`, first and one past the last, of each picture.
        boxes: `(S, 4)` float64, left, top, right, bottom in pixels, of all pictures.
        labels: `(S,)` int64 in [1, K].
        crowd: `(S,)` bool.
        visible: `(S,)` float32, the share of each object that is not hidden, as far as it is known.
        report: what was skipped.
        max_pixels: see `Limits`.
    """

    classes: tuple[str, ...]
    pictures: Sequence[bytes | Path]
    names: Sequence[str]
    objects: Sequence[tuple[int, int]]
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    visible: Tensor
    report: Report = field(default_factory=Report)
    max_pixels: int = Limits.max_pixels

    def __len__(self) -> int:
        return len(self.pictures)

    def truth(self, index: int) -> Truth:
        """What the source says of a picture."""
        rows = slice(*self.objects[index])
        return Truth(self.boxes[rows], self.labels[rows], self.crowd[rows])

    def name(self, index: int) -> str:
        """What a picture is called."""
        return self.names[index]

    def __getitem__(self, index: int) -> Detection:
        """A picture with the boxes to be learned: no crowds, and what of a box is inside the picture.

        Raises:
            BadImage: when it does not decode.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"BoxedPictures: index must be in [0, {len(self)}), got {index}")
        image = decode_picture(self.pictures[index], self.max_pixels).convert("RGB")
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
        rows = slice(*self.objects[index])
        limit = torch.tensor([image.width, image.height] * 2, dtype=torch.float64)
        boxes = self.boxes[rows].clamp_min(0).minimum(limit).float()
        kept = (boxes[:, 2:] > boxes[:, :2]).all(1) & ~self.crowd[rows]
        return Detection(pixels, boxes[kept], self.labels[rows][kept], self.visible[rows][kept])

    def where(self, keep: Callable[[str], bool]) -> BoxedPictures:
        """Only the pictures whose names are kept."""
        at = [i for i, name in enumerate(self.names) if keep(name)]
        return replace(
            self,
            pictures=[self.pictures[i] for i in at],
            names=[self.names[i] for i in at],
            objects=[self.objects[i] for i in at],
        )

    def labelled_as(self, classes: Sequence[str]) -> BoxedPictures:
        """The same pictures with their labels among other classes, which hold all of theirs.

        Raises:
            ValueError: naming a class that is not among them.
        """
        if tuple(classes) == self.classes:
            return self
        place = {name: label for label, name in enumerate(classes)}
        among = torch.zeros(len(self.classes), dtype=torch.int64)
        for label in self.labels.unique().tolist():
            name = self.classes[label]
            if name not in place:
                known = f"one of the {len(classes) - 1} that are known"
                fail(WHERE, "class of an object", known, repr(name))
            among[label] = place[name]
        return replace(self, classes=tuple(classes), labels=among[self.labels])


def read_boxed_pictures(
    source: str,
    part: Part = "train",
    *,
    test_share: float = 0.2,
    split_seed: int = 0,
    limits: Limits | None = None,
) -> BoxedPictures:
    """The pictures with boxes that a source names, or its part for training or for testing.

    - A folder in COCO's format (Lin et al. 2014, arXiv:1405.0312): `annotations/instances_train2017.json`
      and `instances_val2017.json` with the pictures in `train2017` and `val2017`, or `images/...`. The
      annotations may also lie in the folder itself or, with their pictures, in `train` and `valid` (`val`,
      `test`), also as `_annotations.coco.json`. One file alone, which may be named instead of its folder, is
      split, as below. Pictures are read when it is their turn.
    - WebDataset shards (see `list_shards`) whose samples have a picture and a `.json` with `objects`, each
      with `name` and `box`, left, top, right, bottom in pixels, as `pymm data scenes` writes them. The
      pictures stay in memory, encoded.

    A source without a test part of its own is split by a hash of each picture's name and `split_seed`.

    Args:
        source: one of these.
        part: `"all"` is both.
        test_share: about that share is tested where the source does not say it, in (0, 1).
        split_seed: another seed, another split.
        limits: sizes beyond which a picture is skipped; `cache_bytes` of pictures are kept of shards at most.

    Raises:
        ValueError: when the source is none of these, a file is damaged, or the part has no picture.
        FileNotFoundError: when there is no such file.
    """
    if not 0 < test_share < 1:
        fail(WHERE, "test_share", "in (0, 1)", test_share)
    limits = limits or Limits()
    folder = Path(source)
    files = coco_files(folder)
    if files:
        pictures, own = _coco(files, part, limits)
    elif folder.is_dir() and not any(p.name.endswith(SUFFIXES) for p in folder.iterdir()):
        expected = f"shards, or a folder with {', '.join(PLACES[:-1])} or {PLACES[-1]}"
        fail(WHERE, "source", expected, f"{source} without")
    else:
        pictures, own = _shards(list_shards(source), limits), False
    if part != "all" and not own:
        pictures = pictures.where(
            lambda name: (part == "test") == is_tested(name, None, test_share, split_seed)
        )
    if not len(pictures):
        fail(WHERE, "source", f"one with pictures in its {part} part", repr(source))
    return pictures


def _shards(shards: list[str], limits: Limits) -> BoxedPictures:
    report = Report()
    pictures: list[bytes] = []
    names: list[str] = []
    found: list[list[tuple[str, list[float], float]]] = []
    taken = 0
    for sample in read_samples(shards, report, limits.max_member_bytes):
        where = f"{sample['__url__']}: {sample['__key__']}"
        image = next((sample[s] for s in sample if s.rsplit(".", 1)[-1] in IMAGE_SUFFIXES), None)
        objects = _objects(sample)
        if image is None or objects is None:
            report.skip("no image" if image is None else "no objects", where)
            continue
        taken += len(image)
        if taken > limits.cache_bytes:
            expected = f"at most {limits.cache_bytes} bytes of pictures (limits.cache_bytes)"
            fail(WHERE, "source", expected, f"more at picture number {len(pictures) + 1}")
        pictures.append(image)
        names.append(sample["__key__"])
        found.append(objects)
    classes = (BACKGROUND, *sorted({name for objects in found for name, _, _ in objects}))
    label = {name: i for i, name in enumerate(classes)}
    rows = [one for objects in found for one in objects]
    return BoxedPictures(
        classes,
        pictures,
        names,
        _spans([len(objects) for objects in found]),
        torch.tensor([box for _, box, _ in rows], dtype=torch.float64).view(-1, 4),
        torch.tensor([label[name] for name, _, _ in rows], dtype=torch.int64),
        torch.zeros(len(rows), dtype=torch.bool),
        torch.tensor([visible for _, _, visible in rows], dtype=torch.float32),
        report,
        limits.max_pixels,
    )


def _objects(sample: Mapping[str, Any]) -> list[tuple[str, list[float], float]] | None:
    """Name, box and visible share of each object of a shard's sample; None where it does not say them."""
    try:
        found = []
        for one in json.loads(sample["json"])["objects"]:
            box = [float(side) for side in one["box"]]
            visible = float(one.get("visible", 1.0))
            if len(box) != 4 or not all(map(math.isfinite, (*box, visible))):
                return None
            if not isinstance(one["name"], str) or one["name"] in ("", BACKGROUND):
                return None
            found.append((one["name"], box, visible))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError):
        return None
    return found


def _spans(counts: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum(counts, dtype=np.int64).tolist()
    return [(end - count, end) for count, end in zip(counts, ends, strict=True)]


def _coco(files: Mapping[str, Path], part: Part, limits: Limits) -> tuple[BoxedPictures, bool]:
    """A part of the annotations, and whether they say themselves which pictures that is."""
    starts = {"train": ("train",), "test": TESTED, "all": ("",)}
    if len(files) == 1:
        chosen = list(files)
    else:
        chosen = [name for start in starts[part] for name in files if name.startswith(start)]
    if not chosen:
        expected = f"annotations of a part {' or '.join(starts[part])}"
        fail(WHERE, "source", expected, ", ".join(map(str, files.values())))
    if part != "all":
        chosen = chosen[:1]
    read = [_of_coco(read_coco(WHERE, name, files[name]), limits) for name in chosen]
    return _joined(read), len(files) > 1


def _of_coco(file: CocoFile, limits: Limits) -> BoxedPictures:
    rows = [one for objects in file.objects for one in objects]
    return BoxedPictures(
        (BACKGROUND, *file.categories),
        file.files,
        file.names,
        _spans([len(objects) for objects in file.objects]),
        torch.tensor([one.box for one in rows], dtype=torch.float64).view(-1, 4),
        torch.tensor([one.label for one in rows], dtype=torch.int64),
        torch.tensor([one.crowd for one in rows], dtype=torch.bool),
        torch.ones(len(rows)),
        max_pixels=limits.max_pixels,
    )


def _joined(several: Sequence[BoxedPictures]) -> BoxedPictures:
    """All pictures of several parts, under the classes of the first."""
    first = several[0]
    if len(several) == 1:
        return first
    several = [one.labelled_as(first.classes) for one in several]
    starts = np.cumsum([0, *(len(one.labels) for one in several)]).tolist()
    return replace(
        first,
        pictures=[picture for one in several for picture in one.pictures],
        names=[name for one in several for name in one.names],
        objects=[
            (low + start, high + start)
            for one, start in zip(several, starts[:-1], strict=True)
            for low, high in one.objects
        ],
        boxes=torch.cat([one.boxes for one in several]),
        labels=torch.cat([one.labels for one in several]),
        crowd=torch.cat([one.crowd for one in several]),
        visible=torch.cat([one.visible for one in several]),
    )
