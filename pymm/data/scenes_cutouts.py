"""The embedded pack's emoji as cut-outs: pictures with alpha, and what is known of each."""

from __future__ import annotations

import io
import json
import tarfile
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from pymm.data.emoji import STYLES, emoji_shards

# Upper ends of the hue in degrees, from 0.
HUES = (
    (15, "red"),
    (38, "orange"),
    (70, "yellow"),
    (165, "green"),
    (255, "blue"),
    (300, "purple"),
    (345, "pink"),
    (360, "red"),
)
LEADING = 0.7


class Concept(NamedTuple):
    """What an emoji shows."""

    key: str
    name: str
    group: str


@lru_cache(maxsize=len(STYLES))
def _members(style: str) -> dict[str, bytes]:
    with tarfile.open(emoji_shards([style])[0]) as tar:
        files = ((member.name, tar.extractfile(member)) for member in tar)
        return {name: file.read() for name, file in files if file is not None}


@lru_cache(maxsize=1)
def concepts() -> tuple[Concept, ...]:
    """All concepts of the pack, in its order."""
    found = []
    for name, data in _members(STYLES[0]).items():
        if name.endswith(".json"):
            told: dict[str, Any] = json.loads(data)
            found.append(Concept(name.removesuffix(".json"), told["caption"], told["group"]))
    return tuple(found)


@lru_cache(maxsize=8192)  # more than the pack has
def cutout(style: str, key: str) -> Image.Image:
    """The emoji without its empty margin, in mode RGBa: alpha premultiplied, so that resampling keeps edges
    clean. Not to be changed."""
    image = Image.open(io.BytesIO(_members(style)[f"{key}.webp"])).convert("RGBA")
    return image.crop(image.getchannel("A").getbbox()).convert("RGBa")


@lru_cache(maxsize=8192)
def dominant_colour(style: str, key: str) -> str | None:
    """The basic colour that at least seven tenths of the opaque pixels have; None where no colour leads.

    By hue, saturation and value: dark is black, pale is white or grey, and a dark orange is brown.
    """
    image = cutout(style, key).convert("RGBA")
    pixels = np.asarray(image).reshape(-1, 4)
    hsv = np.asarray(image.convert("RGB").convert("HSV")).reshape(-1, 3)[pixels[:, 3] >= 128].astype(float)
    if not len(hsv):
        return None
    hue, saturation, value = hsv[:, 0] * (360 / 256), hsv[:, 1] / 255, hsv[:, 2] / 255
    at = np.searchsorted([end for end, _ in HUES], hue, side="right")
    names = np.array([name for _, name in HUES], dtype=object)[at]
    names[(hue > 8) & (hue < 42) & ((value < 0.65) | (saturation < 0.7) & (value < 0.85))] = "brown"
    names[saturation < 0.15] = "grey"
    names[(saturation < 0.15) & (value > 0.85)] = "white"
    names[(value < 0.2) | (saturation < 0.3) & (value < 0.35)] = "black"
    found, counts = np.unique(names.astype(str), return_counts=True)
    best = counts.argmax()
    return str(found[best]) if counts[best] >= LEADING * len(hsv) else None
