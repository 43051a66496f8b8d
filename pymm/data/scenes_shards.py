"""Scenes as WebDataset shards: written to a folder, or made while they are read."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.progress import track

from pymm.data._errors import fail
from pymm.data.scenes import PREFIX, Scenes, SceneSettings

PER_SHARD = 1000
SETTINGS = "scenes.json"
Job = tuple[Path, range, SceneSettings, str]


@dataclass(frozen=True)
class WriteSettings:
    """Make synthetic scenes with boxes, captions and questions, and write them as WebDataset shards."""

    out: str
    """Folder for the shards; shards that are there already, of the same settings, are kept."""
    count: int = 10_000
    """Scenes."""
    start: int = 0
    """Index of the first scene."""
    per_shard: int = PER_SHARD
    """Scenes in a shard."""
    format: Literal["webp", "png"] = "webp"
    """Lossless both."""
    workers: int = 1
    """Processes; the shards are the same ones."""
    sheet: str | None = None
    """Also draw the first twelve scenes with their boxes into this picture."""
    scenes: tyro.conf.OmitArgPrefixes[SceneSettings] = field(default_factory=SceneSettings)

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("start", 0), ("per_shard", 1), ("workers", 1)):
            if getattr(self, name) < least:
                fail("scenes", name, f"at least {least}", getattr(self, name))


def run(settings: WriteSettings) -> int:
    """The command `pymm data scenes`."""
    written = write_scenes(settings)
    print(f"{settings.out}: {settings.count} synthetic scenes, {len(written)} new shards")
    if settings.sheet is not None:
        from pymm.data.scenes_picture import sheet

        sheet(Scenes(settings.scenes), settings.start).save(settings.sheet)
        print(settings.sheet)
    return 0


def write_scenes(settings: WriteSettings) -> list[Path]:
    """Write the shards that are not there yet, each whole or not at all.

    Returns:
        The new shards.

    Raises:
        ValueError: when the folder holds scenes of other settings.
    """
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    told = asdict(settings.scenes) | {
        "start": settings.start,
        "per_shard": settings.per_shard,
        "format": settings.format,
    }
    text = json.dumps(told, indent=1)
    note = folder / SETTINGS
    if note.exists() and note.read_text() != text:
        fail("scenes", "out", "a new folder, or one of the same settings", f"other settings in {note}")
    if not note.exists():
        _write(note, text.encode())
    jobs = [job for job in _jobs(settings) if not job[0].exists()]
    tracked = _made(jobs, settings.workers)
    return list(track(tracked, "scenes", total=len(jobs)))


def _jobs(settings: WriteSettings) -> list[Job]:
    stop = settings.start + settings.count
    jobs: list[Job] = []
    for first in range(settings.start, stop, settings.per_shard):
        indices = range(first, min(first + settings.per_shard, stop))
        name = f"scenes-{first:08d}-{len(indices)}.tar"  # a shard cut short by `count` is not taken for whole
        jobs.append((Path(settings.out) / name, indices, settings.scenes, settings.format))
    return jobs


def _made(jobs: list[Job], workers: int) -> Iterator[Path]:
    if workers == 1 or len(jobs) < 2:
        yield from map(_shard, jobs)
        return
    with get_context("spawn").Pool(min(workers, len(jobs))) as pool:  # a fork would inherit torch's threads
        yield from pool.imap(_shard, jobs)


def _shard(job: Job) -> Path:
    path, indices, settings, form = job
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in _members(Scenes(settings), indices, form):
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    _write(path, out.getvalue())
    return path


def _members(scenes: Scenes, indices: Iterable[int], form: str) -> Iterator[tuple[str, bytes]]:
    for index in indices:
        scene = scenes[index]
        image = io.BytesIO()
        options: dict[str, Any] = {"lossless": True, "method": 1} if form == "webp" else {"compress_level": 1}
        scene.image.save(image, form, **options)
        yield f"{scene.key}.{form}", image.getvalue()
        yield f"{scene.key}.json", json.dumps(scene.metadata()).encode()


def _write(path: Path, data: bytes) -> None:
    """Beside the file and renamed, so that a broken-off run leaves no half of a shard."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def virtual_shards(source: str) -> list[str]:
    """A `"scenes:..."` source as shards of a thousand scenes, each a source of its own with a range in it."""
    _, count = SceneSettings.parse(source)
    bare = ",".join(item for item in source.removeprefix(PREFIX).split(",") if not item.startswith("count="))
    return [f"{PREFIX}{first}+{min(PER_SHARD, count - first)}:{bare}" for first in range(0, count, PER_SHARD)]


def virtual_files(shard: str) -> Iterator[dict[str, Any]]:
    """The members of one of `virtual_shards`, made now, in webdataset's form."""
    place, _, rest = shard.removeprefix(PREFIX).partition(":")
    first, _, count = place.partition("+")
    settings, _ = SceneSettings.parse(PREFIX + rest)
    indices = range(int(first), int(first) + int(count))
    for name, data in _members(Scenes(settings), indices, "png"):
        yield {"fname": name, "data": data, "__url__": shard}
