"""A folder in COCO's format, made for the tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# Numbers with gaps and out of order, as COCO's own are.
CATEGORIES = [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 12, "name": "bird"}]


def write_coco(
    file: Path, pictures: Path, count: int, seed: int = 0, start: int = 100, crowds: bool = True
) -> dict[str, Any]:
    """Pictures of different sizes, each a noisy ground with up to three plain boxes, and their annotations.

    The last picture has no object. With `crowds` every third box is one.
    """
    draw = np.random.default_rng(seed)
    pictures.mkdir(parents=True, exist_ok=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in range(count):
        width, height = (int(side) for side in draw.integers(48, 72, 2))
        pixels = draw.integers(0, 60, (height, width, 3)).astype(np.uint8)
        name = f"{start + i:012d}.png"
        images.append({"id": start + i, "file_name": name, "width": width, "height": height})
        for _ in range(0 if i == count - 1 else int(draw.integers(1, 4))):
            which = int(draw.integers(len(CATEGORIES)))
            w, h = (float(side) for side in draw.integers(12, 30, 2) + draw.integers(0, 100, 2) / 100)
            x, y = float(draw.integers(0, int(width - w))), float(draw.integers(0, int(height - h)))
            pixels[int(y) : int(y + h), int(x) : int(x + w), which] = 255
            number = len(annotations) + 1
            annotations.append(
                {
                    "id": number,
                    "image_id": start + i,
                    "category_id": CATEGORIES[which]["id"],
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": int(crowds and number % 3 == 0),
                }
            )
        Image.fromarray(pixels).save(pictures / name)
    data = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    file.write_text(json.dumps(data))
    return data


def write_parts(folder: Path, counts: Sequence[int], crowds: bool = True) -> list[dict[str, Any]]:
    """COCO's own layout with pictures for training and for testing."""
    return [
        write_coco(
            folder / "annotations" / f"instances_{part}.json", folder / part, count, seed, 100 * seed, crowds
        )
        for seed, (part, count) in enumerate(zip(("train2017", "val2017"), counts, strict=True), start=1)
    ]
