"""Labelled pictures from scikit-learn's digits, IDX files, the emoji pack, shards and folders."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image

from pymm.data._errors import fail
from pymm.data.emoji import STYLES, emoji_shards
from pymm.data.images import BadImage, decode_image
from pymm.data.report import Report
from pymm.data.samples import IMAGE_SUFFIXES, Limits, stable_hash
from pymm.data.shards import SUFFIXES, list_shards, read_samples

WHERE = "read_pictures"
Part = Literal["train", "test", "all"]
Picture = bytes | Path | np.ndarray[Any, Any]
FASHION = (
    "T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Pictures:
    """Labelled pictures, not yet decoded.

    Attributes:
        classes: their names.
        labels: the class of each picture, in [0, len(classes)).
        pictures: each encoded, as a file that is read when it is needed, or uint8 `(h, w)`.
        names: each picture's, which decides on which side of a split it falls.
        report: what was skipped.
    """

    classes: tuple[str, ...]
    labels: Sequence[int]
    pictures: Sequence[Picture]
    names: Sequence[str]
    report: Report = field(default_factory=Report)

    def __len__(self) -> int:
        return len(self.labels)

    def where(self, keep: Callable[[str], bool]) -> Pictures:
        """Only the pictures whose names are kept."""
        rows = [i for i, name in enumerate(self.names) if keep(name)]
        return replace(
            self,
            labels=[self.labels[i] for i in rows],
            pictures=[self.pictures[i] for i in rows],
            names=[self.names[i] for i in rows],
        )

    def labelled_as(self, classes: Sequence[str]) -> Pictures:
        """The same pictures with their labels among other classes, which hold all of theirs.

        Raises:
            ValueError: naming a class that is not among them.
        """
        place = {name: i for i, name in enumerate(classes)}
        for label in sorted(set(self.labels)):
            if self.classes[label] not in place:
                known = f"one of the {len(classes)} that are known"
                fail(WHERE, "class of a picture", known, repr(self.classes[label]))
        return replace(
            self, classes=tuple(classes), labels=[place[self.classes[label]] for label in self.labels]
        )


def join_pictures(several: Sequence[Pictures]) -> Pictures:
    """All pictures of several collections, under the classes of the first.

    Raises:
        ValueError: when another one has a class that the first has not.
    """
    first = several[0]
    several = [one.labelled_as(first.classes) for one in several]
    report = Report()
    for one in several:
        report.add(one.report)
    return Pictures(
        first.classes,
        [label for one in several for label in one.labels],
        [picture for one in several for picture in one.pictures],
        [name for one in several for name in one.names],
        report,
    )


def decode_picture(picture: Picture, max_pixels: int) -> Image.Image:
    """A picture of `Pictures` as an image.

    Raises:
        BadImage: as `decode_image`, and "unreadable file".
    """
    if isinstance(picture, np.ndarray):
        return Image.fromarray(picture).convert("RGB")
    if isinstance(picture, Path):
        try:
            picture = picture.read_bytes()
        except OSError as error:
            raise BadImage("unreadable file") from error
    return decode_image(picture, max_pixels)


def read_pictures(
    source: str,
    part: Part = "train",
    *,
    label: str | None = None,
    test_share: float = 0.2,
    split_seed: int = 0,
    limits: Limits | None = None,
) -> Pictures:
    """The pictures that a source names, or its part for training or for testing; always the same ones.

    - `"digits"`: 1797 grey 8×8 digits of scikit-learn.
    - `"fashion-mnist:DIR"`, `"mnist:DIR"`: a folder with the four IDX files, also compressed by gzip; the
      10,000 pictures of `t10k` are the test part.
    - `"emoji:STYLE,STYLE"`: the embedded pack with its groups as classes. The styles that are not named are
      the test part.
    - a folder of folders, one per class. Where it holds `train` and `test` (or `val`) instead, these are the
      parts.
    - WebDataset shards (see `list_shards`) whose samples have a member `.cls`, or `.json` with the class.

    A source without a test part of its own is split by a hash of each picture's name and `split_seed`.

    Args:
        source: one of these.
        part: `"all"` is both.
        label: field of the JSON that is the class; by default `"group"` for emoji, else `.cls` or `"label"`.
            An empty one asks for no class: the pictures of shards are then all of one.
        test_share: about that share is tested where the source does not say it, in (0, 1).
        split_seed: another seed, another split.
        limits: sizes beyond which a member of a shard is skipped.

    Raises:
        ValueError: when the source is none of these, a file is damaged, or the part has no picture.
        FileNotFoundError: when there is no such file.
        ImportError: when the digits are asked for and scikit-learn is not installed.
    """
    if not 0 < test_share < 1:
        fail(WHERE, "test_share", "in (0, 1)", test_share)
    kind, _, rest = source.partition(":")
    limits = limits or Limits()
    if source == "digits":
        pictures, own = _digits(), None
    elif kind in ("fashion-mnist", "mnist"):
        pictures, own = _idx(Path(rest), FASHION if kind == "fashion-mnist" else DIGITS), "t10k/"
    elif kind == "emoji":
        pictures, own = _emoji(rest, label or "group", limits)
    elif Path(source).is_dir() and not any(p.name.endswith(SUFFIXES) for p in Path(source).iterdir()):
        pictures, own = _folder(Path(source))
    else:
        pictures, own = _shards(list_shards(source), label, limits), None
    if part != "all":
        pictures = pictures.where(
            lambda name: (part == "test") == is_tested(name, own, test_share, split_seed)
        )
    if not len(pictures):
        fail(WHERE, "source", f"one with pictures in its {part} part", repr(source))
    return pictures


def is_tested(name: str, own: str | None, share: float, seed: int) -> bool:
    """Whether a picture is tested: its name begins with `own`, or, without one, its hash says so."""
    if own is not None:
        return name.startswith(own)
    return stable_hash("split", seed, name) < share * 2**63


def _digits() -> Pictures:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError("the digits need scikit-learn: pip install 'pymm[data]'") from error
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    names = [f"{i:04}" for i in range(len(images))]
    return Pictures(DIGITS, data.target.tolist(), list(images), names)


def _idx(folder: Path, classes: tuple[str, ...]) -> Pictures:
    pictures: list[Picture] = []
    labels: list[int] = []
    names: list[str] = []
    for part in ("train", "t10k"):
        images = _read_idx(folder / f"{part}-images-idx3-ubyte", 3)
        found = _read_idx(folder / f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(found):
            fail(WHERE, f"labels of {part} in {folder}", f"{len(images)}, as many as images", len(found))
        if len(found) and found.max() >= len(classes):
            fail(WHERE, f"labels of {part} in {folder}", f"below {len(classes)}", found.max())
        pictures += list(images)
        labels += found.tolist()
        names += [f"{part}/{i:05}" for i in range(len(found))]
    return Pictures(classes, labels, pictures, names)


def _read_idx(path: Path, dimensions: int) -> np.ndarray[Any, Any]:
    """The array of an IDX file of bytes, which may be compressed: two zeros, 8, the number of dimensions,
    the sizes as big-endian int32, the bytes."""
    compressed = path.with_name(path.name + ".gz")
    if not path.exists() and not compressed.exists():
        raise FileNotFoundError(f"{WHERE}: {path} does not exist, nor {compressed.name}")
    try:
        data = path.read_bytes() if path.exists() else gzip.decompress(compressed.read_bytes())
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(f"{WHERE}: {compressed} is damaged: {error}") from error
    start = 4 + 4 * dimensions
    if len(data) < start or data[:4] != bytes((0, 0, 8, dimensions)):
        expected = f"an IDX file of bytes in {dimensions} dimensions"
        fail(WHERE, str(path), expected, f"one that begins with {data[:4].hex() or 'nothing'}")
    sizes = np.frombuffer(data[4:start], ">i4").tolist()
    if min(sizes) < 0 or int(np.prod(sizes)) != len(data) - start:
        fail(WHERE, str(path), f"{' × '.join(map(str, sizes))} bytes after its header", len(data) - start)
    return np.frombuffer(data, np.uint8, offset=start).reshape(sizes)


def _emoji(styles: str, label: str, limits: Limits) -> tuple[Pictures, str | None]:
    named = styles.split(",")
    others = [style for style in STYLES if style not in named]
    read = [_shards([str(path)], label, limits) for path in emoji_shards([*named, *others])]
    parts = ["train"] * len(named) + ["test"] * len(others)
    # Without a style to test, the two parts hold different concepts: a name is a concept's.
    named_by_part = [
        replace(one, names=[f"{part}/{name}" for name in one.names])
        for part, one in zip(parts, read, strict=True)
    ]
    return join_pictures(named_by_part), "test/" if others else None


def _folder(folder: Path) -> tuple[Pictures, str | None]:
    inner = {p.name: p for p in folder.iterdir() if p.is_dir()}
    test = next((name for name in ("test", "val") if name in inner), None)
    roots = [folder] if "train" not in inner or test is None else [inner["train"], inner[test]]
    classes = tuple(sorted({p.name for root in roots for p in root.iterdir() if p.is_dir()}))
    files = [
        (classes.index(kind.name), file)
        for root in roots
        for kind in sorted(p for p in root.iterdir() if p.is_dir())
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower().lstrip(".") in IMAGE_SUFFIXES and file.is_file()
    ]
    if not files:
        endings = ", ".join(IMAGE_SUFFIXES)
        fail(WHERE, "source", f"a folder of folders of pictures ({endings})", f"none in {folder}")
    names = [file.relative_to(folder).as_posix() for _, file in files]
    pictures = Pictures(classes, [i for i, _ in files], [file for _, file in files], names)
    return pictures, None if len(roots) == 1 else f"{test}/"


def _shards(shards: list[str], label: str | None, limits: Limits) -> Pictures:
    report = Report()
    found = list(labelled_samples(shards, label, limits, report))
    classes = ordered_classes(one.kind for one in found)
    place = {kind: i for i, kind in enumerate(classes)}
    return Pictures(
        classes,
        [place[one.kind] for one in found],
        [one.image for one in found],
        [one.key for one in found],
        report,
    )


class LabelledSample(NamedTuple):
    """A picture of a shard, encoded, with its class; `where` names it."""

    key: str
    kind: str
    image: bytes
    where: str


def labelled_samples(
    shards: Sequence[str],
    label: str | None,
    limits: Limits,
    report: Report,
    keep: Callable[[str], bool] = lambda key: True,
) -> Iterator[LabelledSample]:
    """The pictures of shards whose keys are kept, one after another; `label` as for `read_pictures`."""
    for sample in read_samples(shards, report, limits.max_member_bytes):
        key = sample["__key__"]
        if not keep(key):
            continue
        where = f"{sample['__url__']}: {key}"
        image = next((sample[s] for s in sample if s.rsplit(".", 1)[-1] in IMAGE_SUFFIXES), None)
        kind = _class_of(sample, label)
        if image is None or kind is None:
            report.skip("no image" if image is None else "no class", where)
        else:
            yield LabelledSample(key, kind, image, where)


def ordered_classes(kinds: Iterable[str]) -> tuple[str, ...]:
    """Each class once, numbers in the order of numbers."""
    return tuple(sorted(set(kinds), key=lambda k: (len(k), k) if k.isdigit() else (0, k)))


def _class_of(sample: Mapping[str, Any], label: str | None) -> str | None:
    if label == "":
        return "picture"
    try:
        if label is None and "cls" in sample:
            return str(sample["cls"].decode().strip()) or None
        value = json.loads(sample["json"])[label or "label"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    return str(value) if isinstance(value, (str, int)) and str(value) else None
