"""Shards made for the tests, whole and broken."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from pymm.data import EvalTransform, ImageTextLoader, Tokenizer

TOKENIZER = Tokenizer.train([f"picture number {i} of a red green blue cat" for i in range(100)], 300, 16)
Members = Iterable[tuple[str, bytes]]


def picture(seed: int, size: tuple[int, int] = (12, 10), mode: str = "RGB", format: str = "PNG") -> bytes:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (size[1], size[0], len(mode)), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(out, format)
    return out.getvalue()


def sample(name: str, seed: int, caption: str | None = None, **metadata: object) -> list[tuple[str, bytes]]:
    text = json.dumps({"caption": caption if caption is not None else f"picture {seed}", **metadata})
    return [(f"{name}.png", picture(seed)), (f"{name}.json", text.encode())]


def samples(start: int, stop: int) -> list[tuple[str, bytes]]:
    return [member for i in range(start, stop) for member in sample(f"s{i:03}", i)]


def tar_bytes(members: Members) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def write(path: Path, members: Members) -> Path:
    path.write_bytes(tar_bytes(members))
    return path


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )


def loader(source: object, **settings: object) -> ImageTextLoader:
    defaults: dict[str, object] = {
        "transform": EvalTransform(8),
        "tokenizer": TOKENIZER,
        "batch_size": 4,
        "shuffle": False,
        "drop_last": False,
    }
    return ImageTextLoader(source, **(defaults | settings))  # type: ignore[arg-type]


def keys(batches: Iterable[object]) -> list[str]:
    return [key for batch in batches for key in batch.keys]  # type: ignore[attr-defined]
