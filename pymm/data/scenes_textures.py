"""Backgrounds of scenes, drawn by rule."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from PIL import Image

TEXTURES = ("plain", "gradient", "noise", "stripes", "checks", "dots")
# Contrast between a texture's two colours: enough to be seen, less than an object has.
NEAR = 70


def texture(kind: str, size: int, draw: np.random.RandomState) -> Image.Image:
    """An RGB square of one of `TEXTURES`, its two colours, direction and period drawn."""
    first = draw.randint(40, 256, 3).astype(float)
    second = (first + draw.uniform(-NEAR, NEAR, 3)).clip(0, 255)
    mix = _pattern(kind, size, draw)[..., None]
    pixels = first * (1 - mix) + second * mix
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _pattern(kind: str, size: int, draw: np.random.RandomState) -> np.ndarray[Any, Any]:
    """`(size, size)` in [0, 1]: where the second colour is."""
    if kind == "plain":
        return np.zeros((size, size))
    if kind == "noise":
        return _noise(size, draw)
    angle = draw.uniform(0, math.pi)
    period = size * draw.uniform(0.08, 0.3)
    y, x = np.mgrid[:size, :size].astype(float)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    if kind == "gradient":
        return (u - u.min()) / (u.max() - u.min())
    if kind == "stripes":
        return (np.floor(2 * u / period) % 2).astype(float)
    if kind == "checks":
        return ((np.floor(2 * u / period) + np.floor(2 * v / period)) % 2).astype(float)
    near = (u % period - period / 2) ** 2 + (v % period - period / 2) ** 2
    return (near < (0.3 * period) ** 2).astype(float)


def _noise(size: int, draw: np.random.RandomState) -> np.ndarray[Any, Any]:
    """Value noise: random grids of 4, 8, 16 ... cells, smoothly enlarged, each half as strong as the last."""
    total, strength, weight, cells = np.zeros((size, size)), 1.0, 0.0, 4
    while cells <= size // 2:
        grid = Image.fromarray(draw.rand(cells, cells).astype(np.float32))
        total += strength * np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC))
        weight += strength
        strength, cells = strength / 2, cells * 2
    return (total / weight).clip(0, 1)
