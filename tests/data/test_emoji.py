"""The embedded pack is whole, and its split depends on nothing but the seed."""

from __future__ import annotations

import json
import tarfile

import pytest

from pymm.data import emoji_concepts, emoji_shards, unseen_concepts
from pymm.data.emoji import FOLDER, STYLES


def test_the_styles_draw_the_same_concepts_in_the_same_order() -> None:
    assert len(emoji_concepts()) == len(set(emoji_concepts())) == 1852
    captions = []
    for shard in emoji_shards():
        with tarfile.open(shard) as tar:
            members = tar.getmembers()
            assert [m.name for m in members] == [
                name for key in emoji_concepts() for name in (f"{key}.webp", f"{key}.json")
            ]
            captions.append([json.load(tar.extractfile(m))["caption"] for m in members[1::2]])  # type: ignore[arg-type]
    assert captions[0] == captions[1] == captions[2]
    assert len(set(captions[0])) == 1852


def test_licences_lie_beside_the_shards() -> None:
    text = (FOLDER / "LICENSES.md").read_text()
    for word in (
        "Apache License 2.0",
        "CC-BY-4.0",
        "Copyright (c) Microsoft Corporation",
        "Unicode",
        *STYLES,
    ):
        assert word in text


def test_unknown_style() -> None:
    with pytest.raises(ValueError, match="style must be one of noto, twemoji, fluent, got 'apple'"):
        emoji_shards(["apple"])


def test_the_split_is_exact_and_fixed() -> None:
    unseen = unseen_concepts()
    assert len(unseen) == 185
    assert unseen < set(emoji_concepts())
    assert unseen == unseen_concepts(0.1, 0, reversed(emoji_concepts()))
    assert unseen == unseen_concepts(0.1, 0, [*emoji_concepts(), *emoji_concepts()])
    assert sorted(unseen)[:3] == ["0038-20e3", "1f191", "1f1e6-1f1f2"]


def test_other_seeds_and_fractions() -> None:
    assert len(unseen_concepts(0.1, 0) & unseen_concepts(0.1, 1)) < 60
    assert unseen_concepts(0.05) < unseen_concepts(0.1)
    assert unseen_concepts(0.0) == frozenset()
    assert unseen_concepts(1.0) == frozenset(emoji_concepts())
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\]"):
        unseen_concepts(1.1)
