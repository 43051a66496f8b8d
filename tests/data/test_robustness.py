"""Damaged data is skipped, counted by reason and reported; it is never fatal and never silent."""

from __future__ import annotations

import gzip
import io
import logging
import random
import tarfile
from pathlib import Path

import pytest
import torch

from pymm.data import Limits
from tests.data.shards import keys, loader, picture, png_header, sample, samples, tar_bytes, write

GOOD = [*samples(0, 2)]
MORE = [*samples(2, 4)]
WHOLE = ["s000", "s001", "s002", "s003"]
JPEG = picture(1, (64, 64), format="JPEG")
NESTED = b"[" * 100_000

BROKEN = {
    "not an image": [*sample("bad", 9)[1:], ("bad.png", b"these are letters")],
    "damaged image": [("bad.jpg", JPEG[: len(JPEG) // 2]), ("bad.json", b'{"caption": "half"}')],
    "too many pixels": [("bad.png", png_header(60_000, 60_000)), ("bad.json", b'{"caption": "bomb"}')],
    "no image": [("bad.json", b'{"caption": "alone"}')],
    "no caption": [("bad.png", picture(5))],
    "invalid JSON": [("bad.png", picture(5)), ("bad.json", b'{"caption": "cut')],
    "invalid JSON ": [("bad.png", picture(5)), ("bad.json", b'["a list"]')],
    "invalid JSON  ": [("bad.png", picture(5)), ("bad.json", NESTED)],
    "caption that is no UTF-8": [("bad.png", picture(5)), ("bad.txt", b"\xff\xfe\xfd")],
    "empty caption": [("bad.png", picture(5)), ("bad.json", b'{"caption": " &nbsp;\\t", "tags": [" ", 3]}')],
    "empty caption ": [("bad.png", picture(5)), ("bad.json", b'{"caption": 12}')],
    "member too large": [("bad.png", bytes(300_000)), ("bad.json", b'{"caption": "large"}')],
    "member without key and extension": [("README", b"?")],
    "duplicate member": [
        ("bad.png", picture(5)),
        ("bad.json", b'{"caption": "a cat"}'),
        ("bad.png", b"again"),
    ],
}


@pytest.mark.parametrize("cache", ["none", "decoded"])
@pytest.mark.parametrize("reason", BROKEN)
def test_each_damage_is_skipped_and_counted(
    tmp_path: Path, reason: str, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "a.tar", [*GOOD, *BROKEN[reason], *MORE])
    batches = loader(tmp_path, cache=cache, limits=Limits(max_member_bytes=200_000))
    with caplog.at_level(logging.WARNING, "pymm.data"):
        found = list(batches.epoch(0))
    expected = [*WHOLE[:2], "bad", *WHOLE[2:]] if reason == "duplicate member" else WHOLE
    reason = reason.strip()
    assert keys(found) == expected
    also = {"member too large": {"no image": 1}}.get(reason, {})
    assert batches.report.skipped == {reason: 1, **also}
    assert batches.report.read == len(expected)
    assert reason in caplog.text
    assert reason in str(batches.report)
    assert "a.tar" in batches.report.examples[reason]
    assert all(torch.isfinite(batch.pixels).all() for batch in found)


def test_a_bomb_is_refused_before_it_is_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    write(tmp_path / "a.tar", [*GOOD, *sample("big", 5)])
    loaded = []
    load = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: (loaded.append(self.size), load(self))[1])
    batches = loader(tmp_path, limits=Limits(max_pixels=119))
    with pytest.raises(ValueError, match="3 too many pixels"):
        list(batches.epoch(0))
    assert not loaded


def test_programs_are_never_asked_to_decode(tmp_path: Path) -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    write(tmp_path / "a.tar", [*GOOD, ("x.png", postscript), ("x.txt", b"a page")])
    batches = loader(tmp_path)
    assert keys(batches.epoch(0)) == WHOLE[:2]
    assert batches.report.skipped == {"not an image": 1}


def test_links_are_not_followed(tmp_path: Path) -> None:
    out = io.BytesIO(tar_bytes(GOOD))
    with tarfile.open(fileobj=out, mode="a") as tar:
        link = tarfile.TarInfo("x.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    (tmp_path / "a.tar").write_bytes(out.getvalue())
    batches = loader(tmp_path)
    assert keys(batches.epoch(0)) == WHOLE[:2]
    assert batches.report.skipped == {"member that is no file": 1}


def offset_of(archive: bytes, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return tar.getmember(name).offset


def test_a_shard_cut_inside_a_member_keeps_what_came_before(tmp_path: Path) -> None:
    archive = tar_bytes([*GOOD, *MORE])
    (tmp_path / "a.tar").write_bytes(archive[: offset_of(archive, "s002.png") + 512 + 100])
    write(tmp_path / "b.tar", MORE)
    batches = loader(tmp_path)
    assert keys(batches.epoch(0)) == WHOLE
    assert batches.report.skipped == {"truncated or damaged shard": 1}
    assert "a.tar" in batches.report.examples["truncated or damaged shard"]


@pytest.mark.parametrize("where", ["between members", "inside a header", "compressed"])
def test_other_cuts_are_not_silent_either(tmp_path: Path, where: str) -> None:
    archive = tar_bytes([*GOOD, *MORE])
    cut = offset_of(archive, "s002.png") + (100 if where == "inside a header" else 0)
    if where == "compressed":
        packed = gzip.compress(archive)
        (tmp_path / "a.tar.gz").write_bytes(packed[: len(packed) * 2 // 3])
    else:
        (tmp_path / "a.tar").write_bytes(archive[:cut])
    batches = loader(tmp_path)
    found = keys(batches.epoch(0))
    assert found == WHOLE[: len(found)]
    assert len(found) == 2 or where == "compressed"
    assert batches.report.skipped["truncated or damaged shard"] == 1


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    archive = bytearray(tar_bytes([*GOOD, *MORE]))
    at = offset_of(bytes(archive), "s002.png")
    archive[at + 20 : at + 40] = b"\x00rubbish, 20 bytes\x00\x00"
    (tmp_path / "a.tar").write_bytes(archive)
    batches = loader(tmp_path)
    assert keys(batches.epoch(0)) == WHOLE[:2]
    assert batches.report.skipped == {"truncated or damaged shard": 1}


def test_random_damage_is_never_fatal(tmp_path: Path) -> None:
    """Flipped bytes anywhere after the first header: each is read, skipped or reported."""
    archive = tar_bytes([*GOOD, *MORE])
    rng = random.Random(0)
    write(tmp_path / "0.tar", [*sample("t000", 0), *sample("t001", 1)])
    write(tmp_path / "a.tar", GOOD)
    batches = loader(tmp_path)
    for _ in range(150):
        damaged = bytearray(archive)
        for _ in range(rng.choice([1, 3, 30])):
            damaged[rng.randrange(512, len(damaged))] = rng.randrange(256)
        (tmp_path / "a.tar").write_bytes(damaged)
        # The first sample of another shard always comes through, so there is no excuse for an error.
        found = keys(batches.epoch(0))
        assert found[:2] == ["t000", "t001"]
        assert len(found) == batches.report.read


def test_a_negative_size_does_not_go_round_in_circles(tmp_path: Path) -> None:
    archive = bytearray(tar_bytes([*GOOD, *MORE]))
    at = offset_of(bytes(archive), "s002.png")
    header = archive[at : at + 512]
    header[124:136] = b"\xff" * 10 + b"\xfc\x00"  # base 256, below zero
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    archive[at : at + 512] = header
    (tmp_path / "a.tar").write_bytes(archive)
    batches = loader(tmp_path)
    assert keys(batches.epoch(0)) == WHOLE[:2]
    assert batches.report.skipped == {"truncated or damaged shard": 1}


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", [("a.txt", b"alone"), ("b.txt", b"alone")])
    for cache in ("none", "decoded"):
        with pytest.raises(ValueError, match=r"usable samples per rank, got 0 from .*2 no image"):
            list(loader(tmp_path, cache=cache).epoch(0))
    write(tmp_path / "a.tar", GOOD)
    for cache in ("none", "decoded"):
        with pytest.raises(ValueError, match=r"at least 3 usable samples per rank, got 2"):
            list(loader(tmp_path, cache=cache, batch_size=3, drop_last=True).epoch(0))


def test_no_image_that_decodes_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", BROKEN["damaged image"])
    for settings in ({}, {"drop_last": True, "batch_size": 1}, {"cache": "decoded"}):
        with pytest.raises(ValueError, match=r"1 damaged image"):
            list(loader(tmp_path, **settings).epoch(0))


def test_a_caption_without_tokens_gives_way_to_a_tag(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", sample("a", 1, " \u00a0", tags=["", "cat", "dog"]))
    batch = next(loader(tmp_path).epoch(0))
    assert batch.captions == ["cat"]
    assert not loader(tmp_path).report.skipped


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_their_size_where_images_do_not_decode(tmp_path: Path, workers: int) -> None:
    bad = [
        [(f"x{i}.jpg", data), (f"x{i}.txt", b"x")]
        for i, (_, data) in enumerate([BROKEN["damaged image"][0]] * 5)
    ]
    # Batches of three: one bad of three, three bad ones, one bad of three, the last one incomplete.
    order = [*samples(0, 2), *bad[0], *bad[1], *bad[2], *bad[3], *samples(2, 3), *bad[4], *samples(3, 6)]
    write(tmp_path / "a.tar", order)
    batches = loader(tmp_path, batch_size=3, drop_last=True, workers=workers)
    found = [batch.keys for batch in batches.epoch(0)]
    assert found == [["s000", "s001", "s000"], ["s002", "s003", "s002"], ["s002", "s003", "s002"]]
    assert batches.report.repeated == 1 + 1 + 3
    assert batches.report.skipped == {"damaged image": 5}
    for skip in range(4):
        assert [batch.keys for batch in batches.epoch(0, skip)] == found[skip:]
    short = loader(tmp_path, batch_size=3, workers=workers)
    assert [batch.keys for batch in short.epoch(0)] == [["s000", "s001"], ["s002", "s003"], ["s004", "s005"]]
    assert short.report.repeated == 0


def test_a_cache_has_a_limit(tmp_path: Path) -> None:
    write(tmp_path / "a.tar", samples(0, 9))
    batches = loader(tmp_path, cache="decoded", limits=Limits(cache_bytes=5 * 8 * 8 * 3))
    with pytest.raises(ValueError, match=r"at most 960 bytes decoded .* more at its image number 6"):
        list(batches.epoch(0))
