"""Captions: which are possible, and that each of them comes up."""

from __future__ import annotations

import random

import pytest

from pymm.data.captions import Captions, Texts


def drawn(mode: str | list[str], texts: Texts) -> set[str]:
    captions, rng = Captions(mode, bool), random.Random(0)
    return {captions.draw(texts, rng) for _ in range(200)}


def test_every_mode_draws_all_it_may_and_no_more() -> None:
    texts = Texts("cat", ("pet", "feline"))
    assert drawn("name", texts) == {"cat"}
    assert drawn("name_or_tags", texts) == {"cat", "pet", "feline"}
    assert drawn("a picture of a {caption}", texts) == {"a picture of a cat"}
    assert drawn("{caption} and {tag}, {{x}}", texts) == {"cat and pet, {x}", "cat and feline, {x}"}
    assert drawn(["name", "one {tag}"], texts) == {"cat", "one pet", "one feline"}
    assert drawn("one {tag}", Texts("cat", ())) == {"one cat"}
    assert drawn("name", Texts("{tag} {0.__class__}", ())) == {"{tag} {0.__class__}"}


def test_what_a_sample_offers() -> None:
    captions = Captions("name_or_tags", lambda text: bool(text.strip()))
    assert captions.texts({"caption": "cat", "tags": ["pet", " ", 3]}) == Texts("cat", ("pet",))
    assert captions.texts({"caption": " ", "tags": ["", "pet", "feline"]}) == Texts("pet", ("pet", "feline"))
    assert captions.texts({"caption": " ", "tags": "pet"}) is None
    assert captions.texts({"caption": None}) is None
    assert Captions("name", bool).texts({"caption": "cat", "tags": ["pet"]}) == Texts("cat", ())


@pytest.mark.parametrize(
    "mode",
    ["", "names", "no field", "{}", "{0}", "{caption", "{caption.x}", "{caption!r}", "{caption:>9}", []],
)
def test_wrong_modes(mode: str) -> None:
    with pytest.raises(ValueError, match="captions: caption_mode must be"):
        Captions(mode, bool)
