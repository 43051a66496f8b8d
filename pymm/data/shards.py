"""WebDataset shards: which ones a source names, and the samples in them."""

from __future__ import annotations

import glob
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import IO, Any

from braceexpand import braceexpand
from webdataset.tariterators import base_plus_ext, group_by_keys

from pymm.data._errors import fail
from pymm.data.emoji import emoji_shards
from pymm.data.remote import HTTP, check_source, filesystem, local_path, open_shard, scheme
from pymm.data.report import Report

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_SHARDS = 10_000_000
DATA_ERRORS = (tarfile.TarError, EOFError, ValueError, ArithmeticError, LookupError)


def list_shards(source: str | Path | Sequence[str | Path]) -> list[str]:
    """The shards that a source names, in a fixed order.

    Args:
        source: a folder (its `.tar`, `.tar.gz`, `.tgz`, `.tar.bz2` and `.tar.xz` files, sorted by name), a
            glob (`*`, `?`, `[...]`, local or in an object store; sorted), braces (`{0000..0099}`), a path, a
            URL (http, https, or an object store through fsspec), a list of all these,
            `"emoji:twemoji,fluent"` for the embedded pack, or `"scenes:count=1000,size=96"` for synthetic
            scenes (see `pymm.data.SceneSettings.parse`).

    Raises:
        ValueError: when a source could reach a shell or uses an unknown scheme.
        FileNotFoundError: when a source matches nothing.
    """
    sources = [source] if isinstance(source, str | Path) else list(source)
    shards = [shard for one in sources for shard in _expand(str(one))]
    if not shards:
        raise FileNotFoundError(f"shards: source {source!r} matches nothing")
    return shards


def _expand(source: str) -> list[str]:
    if source.startswith("emoji:"):
        return [str(path) for path in emoji_shards(source.removeprefix("emoji:").split(","))]
    if source.startswith("scenes:"):
        from pymm.data.scenes_shards import virtual_shards

        return virtual_shards(source)
    check_source(source)
    path = local_path(source)
    if path is not None and path.is_file():
        return [str(path)]
    if path is not None and path.is_dir():
        found = sorted(str(p) for p in path.iterdir() if p.name.endswith(SUFFIXES) and p.is_file())
        if not found:
            raise FileNotFoundError(f"shards: folder {source} holds no {', '.join(SUFFIXES)}")
        return found
    expanded = list(islice(braceexpand(source), MAX_SHARDS + 1))
    if len(expanded) > MAX_SHARDS:
        fail("shards", "source", f"at most {MAX_SHARDS} shards", repr(source))
    return [shard for one in expanded for shard in _glob(one)]


def _glob(source: str) -> list[str]:
    path = local_path(source)
    if path is not None:
        found = sorted(glob.glob(str(path))) if glob.has_magic(source) else [str(path)]
        found = [p for p in found if Path(p).is_file()]
    elif scheme(source) not in HTTP and glob.has_magic(source):  # "?" and "[" are part of a web address
        files = filesystem(source)
        found = sorted(files.unstrip_protocol(p) for p in files.glob(source))
    else:
        found = [source]
    if not found:
        raise FileNotFoundError(f"shards: {source} matches no file")
    return found


class _Header(tarfile.TarInfo):
    """A header that remembers why the archive ended: to tarfile, rubbish and the end look alike."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> _Header:
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0:  # tarfile would walk backwards, for ever
            raise tarfile.InvalidHeaderError("negative size")  # type: ignore[attr-defined]
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.HeaderError as error:
            tar.ending = error
            raise


class _Tar(tarfile.TarFile):
    tarinfo = _Header
    ending: Exception | None = None

    def ended_well(self) -> bool:
        """Whether the end was the end-of-archive block, and no rubbish or plain lack of bytes."""
        return isinstance(self.ending, tarfile.EOFHeaderError)  # type: ignore[attr-defined]


def read_samples(shards: Iterable[str], report: Report, max_member_bytes: int) -> Iterator[dict[str, Any]]:
    """Samples of the shards, one after another: `{"__key__": ..., "__url__": ..., "webp": bytes, ...}`.

    Whatever is wrong with the contents is counted in `report` and left behind. What is wrong with the way to
    them (a missing file, no permission, a line that stays broken) is raised: training on silently less data
    would neither be noticed nor be repeatable.

    Args:
        shards: what `list_shards` gives.
        report: receives the counts.
        max_member_bytes: larger members are skipped unread.

    Raises:
        OSError: a shard cannot be opened or read.
        ValueError: a shard is no tar archive at all.
    """

    shard = ""

    def files() -> Iterator[dict[str, Any]]:
        nonlocal shard
        for shard in shards:
            yield from _files(shard, report, max_member_bytes)

    def duplicate(error: Exception) -> bool:
        if not isinstance(error, ValueError):
            raise error
        name = str(error.args[0]).split(":")[0]
        report.skip("duplicate member", f"{shard}: {name}")
        return True

    yield from group_by_keys(files(), handler=duplicate)


def _files(shard: str, report: Report, max_member_bytes: int) -> Iterator[dict[str, Any]]:
    """The members of one shard in webdataset's form, and the empty dict by which it separates shards."""
    if shard.startswith("scenes:"):
        from pymm.data.scenes_shards import virtual_files

        yield from virtual_files(shard)
        yield {}
        return
    with open_shard(shard) as stream:
        tar = _open_tar(shard, stream)
        while True:
            try:
                header = tar.next()
                if header is None:
                    if not tar.ended_well():
                        report.skip("truncated or damaged shard", f"{shard}: {tar.ending}")
                    break
                tar.members.clear()  # type: ignore[attr-defined]  # else the headers of the whole shard stay in memory
                if header.isdir():
                    continue
                where = f"{shard}: {header.name}"
                if not header.isreg():
                    report.skip("member that is no file", where)
                elif base_plus_ext(header.name)[0] is None:
                    report.skip("member without key and extension", where)
                elif header.size > max_member_bytes:
                    report.skip("member too large", f"{where}, {header.size} bytes")
                else:
                    member = tar.extractfile(header)
                    data = member.read() if member is not None else b""
                    yield {"fname": header.name, "data": data, "__url__": shard}
            except DATA_ERRORS as error:
                report.skip("truncated or damaged shard", f"{shard}: {error}")
                break
    yield {}


def _open_tar(shard: str, stream: IO[bytes]) -> _Tar:
    try:
        tar = _Tar.open(fileobj=stream, mode="r|*")
    except DATA_ERRORS as error:
        raise ValueError(f"shards: {shard} is no tar archive: {error}") from error
    assert isinstance(tar, _Tar)
    return tar
