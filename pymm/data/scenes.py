"""Synthetic scenes: emoji cut-outs on textured backgrounds, with everything that is in them known.

A scene is a function of the settings and its index alone, whatever the order or the number of processes.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import Any, Literal

import numpy as np
from PIL import Image

from pymm.data._errors import fail
from pymm.data.emoji import STYLES, unseen_concepts
from pymm.data.scenes_cutouts import Concept, concepts, cutout, dominant_colour
from pymm.data.scenes_language import Question, captions, confusable, questions, relations
from pymm.data.scenes_textures import TEXTURES, texture

# Of faces, people, signs and flags too many differ in a detail that a small picture does not show.
GROUPS = ("animals & nature", "food & drink", "travel & places", "activities", "objects")
PARTS = ("all", "seen", "unseen")
TRIES = 40
OPAQUE = 128
PREFIX = "scenes:"
WHERE = "SceneSettings"


@dataclass(frozen=True)
class SceneSettings:
    """What scenes are made of."""

    seed: int = 0
    """Another seed, other scenes."""
    size: int = 128
    """Height and width in pixels."""
    objects: tuple[int, int] = (1, 5)
    """Fewest and most objects; a scene without room has fewer than it drew."""
    scale: tuple[float, float] = (0.2, 0.45)
    """Range of an object's long side as a share of the picture's."""
    overlap: float = 0.3
    """Largest share of an object that others in front of it may hide, at most 0.9."""
    repeat: float = 0.3
    """Probability that an object shows a concept that the scene has already."""
    rotate: float = 15.0
    """Largest angle in degrees, either way."""
    backgrounds: tuple[str, ...] = TEXTURES
    """Kinds of texture: plain, gradient, noise, stripes, checks, dots."""
    styles: tuple[str, ...] = STYLES
    """Drawing styles: noto, twemoji, fluent; one is drawn for every object."""
    groups: tuple[str, ...] = GROUPS
    """Groups of the emoji pack that the concepts come from."""
    classes: int | None = None
    """Take so many concepts of the groups, chosen by a hash; None takes all."""
    part: Literal["all", "seen", "unseen"] = "all"
    """Concepts to show: all, those left for training, or the held-out ones."""
    holdout: float = 0.1
    """Share of the concepts that is held out."""
    holdout_seed: int = 0
    """Another seed, other held-out concepts."""

    def __post_init__(self) -> None:
        _require(self.size >= 16, "size", "at least 16", self.size)
        low, high = self.objects
        _require(1 <= low <= high, "objects", "two counts, 1 <= fewest <= most", self.objects)
        small, large = self.scale
        _require(0 < small <= large <= 1, "scale", "a range in (0, 1]", self.scale)
        _require(0 <= self.overlap <= 0.9, "overlap", "in [0, 0.9]", self.overlap)
        _require(0 <= self.repeat <= 1, "repeat", "in [0, 1]", self.repeat)
        _require(0 <= self.rotate <= 180, "rotate", "in [0, 180]", self.rotate)
        _require(0 <= self.holdout < 1, "holdout", "in [0, 1)", self.holdout)
        _require(self.classes is None or self.classes >= 1, "classes", "at least 1", self.classes)
        for name, known in (
            ("backgrounds", TEXTURES),
            ("styles", STYLES),
            ("groups", tuple(dict.fromkeys(c.group for c in concepts()))),
        ):
            chosen = getattr(self, name)
            ok = len(chosen) > 0 and set(chosen) <= set(known)
            _require(ok, name, f"some of {', '.join(known)}", chosen)
        _require(self.part in PARTS, "part", f"one of {', '.join(PARTS)}", repr(self.part))

    @classmethod
    def parse(cls, text: str) -> tuple[SceneSettings, int]:
        """Settings and the number of scenes from `"scenes:count=1000,size=96,objects=1+4,part=seen"`.

        Items of a tuple are joined by `+`; what is not named keeps its default, and `count` is 1000.

        Raises:
            ValueError: for an unknown name or a value that does not fit.
        """
        known: dict[str, Any] = {f.name: f.default for f in dataclasses.fields(cls)}
        values: dict[str, Any] = {}
        for item in filter(None, text.removeprefix(PREFIX).split(",")):
            name, _, value = item.partition("=")
            if name != "count" and name not in known:
                fail("scenes", "source", f"made of count, {', '.join(known)}", repr(item))
            default = known.get(name, 1)
            try:
                if isinstance(default, tuple):
                    kind = type(default[0])
                    values[name] = tuple(kind(part) for part in value.split("+"))
                else:
                    values[name] = (int if default is None else type(default))(value)
            except ValueError:
                fail("scenes", "source", f"{name} like {default!r}", repr(item))
        count = values.pop("count", 1000)
        _require(count >= 1, "count", "at least 1", count)
        return cls(**values), count


@dataclass(frozen=True)
class SceneObject:
    """One object of a scene.

    Attributes:
        key, name, group: of the concept.
        style: the drawing style.
        colour: what most of its pixels are, None where no colour leads.
        box: `(left, top, right, bottom)` in pixels, right and bottom exclusive; tight around the pixels at
            least half opaque, hidden ones included.
        visible: share of those pixels that nothing in front hides.
    """

    key: str
    name: str
    group: str
    style: str
    colour: str | None
    box: tuple[int, int, int, int]
    visible: float


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it, objects from the farthest to the nearest.

    Attributes:
        index: of the scene among those of its settings.
        image: RGB.
        objects: see `SceneObject`.
        captions: several true sentences.
        relations: `(i, "left of", j)` of objects whose boxes lie apart in that direction.
        questions: with types and answers.
    """

    index: int
    image: Image.Image
    objects: tuple[SceneObject, ...]
    captions: tuple[str, ...]
    relations: tuple[tuple[int, str, int], ...]
    questions: tuple[Question, ...]

    @property
    def key(self) -> str:
        return f"scene{self.index:08d}"

    def metadata(self) -> dict[str, Any]:
        """What the shards' JSON holds: `caption`, the other captions as `tags`, and the scene graph."""
        return {
            "caption": self.captions[0],
            "tags": list(self.captions[1:]),
            "synthetic": True,
            "width": self.image.width,
            "height": self.image.height,
            "objects": [dataclasses.asdict(one) | {"box": list(one.box)} for one in self.objects],
            "relations": [list(one) for one in self.relations],
            "questions": [dataclasses.asdict(one) for one in self.questions],
        }


class Scenes:
    """Scenes by index: `scenes[7]` is made when it is asked for.

    Args:
        settings: see `SceneSettings`.

    Raises:
        ValueError: when the settings leave no concept.
    """

    def __init__(self, settings: SceneSettings | None = None) -> None:
        self.settings = settings or SceneSettings()
        if not self.shown:
            fail("Scenes", "settings", "such that a concept is left", f"{self.settings}")

    @cached_property
    def vocabulary(self) -> tuple[Concept, ...]:
        """The concepts of all parts, in the pack's order: what a detector's classes are."""
        chosen = [c for c in concepts() if c.group in self.settings.groups]
        wanted = self.settings.classes
        if wanted is not None and wanted > len(chosen):
            fail(WHERE, "classes", f"at most {len(chosen)}, the concepts of the groups", wanted)
        if wanted is not None:
            kept = unseen_concepts(wanted / len(chosen), 1, [c.key for c in chosen])
            chosen = [c for c in chosen if c.key in kept]
        return tuple(chosen)

    @cached_property
    def shown(self) -> tuple[Concept, ...]:
        """The concepts that the scenes show."""
        s = self.settings
        held = unseen_concepts(s.holdout, s.holdout_seed, [c.key for c in self.vocabulary])
        return tuple(c for c in self.vocabulary if s.part == "all" or (c.key in held) == (s.part == "unseen"))

    def __getitem__(self, index: int) -> Scene:
        if index < 0:
            fail("Scenes", "index", "at least 0", index)
        draw = _generator(self.settings.seed, index, "picture")
        image, objects = self._compose(draw)
        # Sentences draw from a generator of their own: a new kind of them changes no picture.
        draw = _generator(self.settings.seed, index, "language")
        related = relations(objects)
        said = captions(objects, related, draw)
        asked = questions(objects, related, [c.name for c in self.vocabulary], draw)
        return Scene(index, image, objects, said, related, asked)

    def _compose(self, draw: np.random.RandomState) -> tuple[Image.Image, tuple[SceneObject, ...]]:
        s = self.settings
        kind = s.backgrounds[draw.randint(len(s.backgrounds))]
        image = texture(kind, s.size, draw).convert("RGBa")
        placed: list[tuple[Concept, str, str | None, tuple[int, int, int, int]]] = []
        masks: list[np.ndarray[Any, Any]] = []  # of the whole objects
        visible: list[np.ndarray[Any, Any]] = []  # of what is left to see
        for _ in range(draw.randint(s.objects[0], s.objects[1] + 1)):
            concept = self._concept(draw, [one[0] for one in placed])
            style = s.styles[draw.randint(len(s.styles))]
            for _ in range(TRIES):
                picture = _transformed(cutout(style, concept.key), s, draw)
                left, top = (draw.randint(s.size - side + 1) for side in picture.size)
                mask = np.zeros((s.size, s.size), dtype=bool)
                opaque = np.asarray(picture.getchannel("a")) >= OPAQUE
                mask[top : top + picture.height, left : left + picture.width] = opaque
                # Two of one concept that lie on each other could be counted as one.
                same = any(
                    old.key == concept.key and (m & mask).any()
                    for (old, *_), m in zip(placed, masks, strict=True)
                )
                left_over = [v & ~mask for v in visible]
                shares = [v.sum() / m.sum() for v, m in zip(left_over, masks, strict=True)]
                if not same and mask.any() and all(share >= 1 - s.overlap for share in shares):
                    break
            else:
                continue
            _paste(image, picture, left, top)
            visible = [*left_over, mask]
            masks.append(mask)
            placed.append((concept, style, dominant_colour(style, concept.key), _box(mask)))
        objects = tuple(
            SceneObject(c.key, c.name, c.group, style, colour, box, float(v.sum() / m.sum()))
            for (c, style, colour, box), v, m in zip(placed, visible, masks, strict=True)
        )
        return image.convert("RGB"), objects

    def _concept(self, draw: np.random.RandomState, there: list[Concept]) -> Concept:
        """One that is there already, or one whose name cannot be taken for another's that is there."""
        again = draw.rand() < self.settings.repeat
        if there and again:
            return there[draw.randint(len(there))]
        names = {c.name for c in there}
        for _ in range(TRIES):
            concept = self.shown[draw.randint(len(self.shown))]
            if concept.name not in names and not any(confusable(concept.name, name) for name in names):
                return concept
        return there[0] if there else self.shown[0]


def _generator(*parts: object) -> np.random.RandomState:
    """The legacy generator, whose numbers NumPy keeps as they are from version to version."""
    digest = blake2b(repr(parts).encode(), digest_size=16).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4"))


def _transformed(picture: Image.Image, s: SceneSettings, draw: np.random.RandomState) -> Image.Image:
    """The cut-out at a random size and angle, cut to its pixels."""
    longest = s.size * draw.uniform(*s.scale)
    angle = draw.uniform(-s.rotate, s.rotate)
    factor = longest / max(picture.size)
    width, height = (max(1, round(side * factor)) for side in picture.size)
    turned = picture.resize((width, height), Image.Resampling.BICUBIC).rotate(
        angle, Image.Resampling.BICUBIC, expand=True
    )
    turned = turned.crop(turned.getchannel("a").getbbox() or (0, 0, 1, 1))
    if max(turned.size) > s.size:  # a turned square is larger than the picture
        turned.thumbnail((s.size, s.size), Image.Resampling.BICUBIC)
    return turned


def _paste(image: Image.Image, picture: Image.Image, left: int, top: int) -> None:
    """Put a picture with premultiplied alpha over the image."""
    box = (left, top, left + picture.width, top + picture.height)
    under = np.asarray(image.crop(box), dtype=np.float32)
    over = np.asarray(picture, dtype=np.float32)
    mixed = over + under * (1 - over[:, :, 3:] / 255)
    image.paste(_premultiplied(mixed.round().clip(0, 255).astype(np.uint8)), box)


def _premultiplied(array: np.ndarray[Any, Any]) -> Image.Image:
    size = (array.shape[1], array.shape[0])
    return Image.frombuffer("RGBa", size, array.tobytes(), "raw", "RGBa", 0, 1)


def _box(mask: np.ndarray[Any, Any]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _require(ok: bool, name: str, expected: str, got: object) -> None:
    if not ok:
        fail(WHERE, name, expected, got)
