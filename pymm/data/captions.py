"""Which text goes with an image: its name, one of its tags, or a template around them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, NamedTuple

from pymm.data._errors import fail

FIELDS = ("caption", "tag")


class Texts(NamedTuple):
    """What a sample offers; every one of these yields tokens."""

    caption: str
    tags: tuple[str, ...]


class Captions:
    """Draws captions.

    Args:
        mode: `"name"`: the caption. `"name_or_tags"`: the caption or one of the tags, each equally likely. A
            template with `{caption}` and/or `{tag}` (one tag at random, the caption where there is none), as
            `"a picture of a {caption}"`. Or a sequence of these, of which one is drawn each time.
        usable: whether a text yields at least one token.

    Raises:
        ValueError: for an unknown mode or field.
    """

    def __init__(self, mode: str | Sequence[str], usable: Callable[[str], bool]) -> None:
        modes = (mode,) if isinstance(mode, str) else tuple(mode)
        if not modes:
            fail("captions", "caption_mode", "at least one mode", "none")
        self.templates = [None if one == "name_or_tags" else _parse(one) for one in modes]
        self.usable = usable
        self.needs_tags = any(t is None or any(f == "tag" for _, f in t) for t in self.templates)

    def texts(self, metadata: Mapping[str, Any]) -> Texts | None:
        """The usable texts of a sample; a caption that yields no token gives way to the first tag that does.

        None when nothing is left, so that no row is ever empty.
        """
        caption = metadata.get("caption")
        if not (isinstance(caption, str) and self.usable(caption)):
            caption = None
        tags: tuple[str, ...] = ()
        listed = metadata.get("tags")
        if (self.needs_tags or caption is None) and isinstance(listed, list):
            tags = tuple(tag for tag in listed if isinstance(tag, str) and self.usable(tag))
        if caption is not None:
            return Texts(caption, tags)
        return Texts(tags[0], tags) if tags else None

    def draw(self, texts: Texts, rng: random.Random) -> str:
        template = self.templates[0] if len(self.templates) == 1 else rng.choice(self.templates)
        if template is None:
            return rng.choice((texts.caption, *texts.tags))
        parts = []
        for literal, field in template:
            parts.append(literal)
            if field == "caption":
                parts.append(texts.caption)
            elif field == "tag":
                parts.append(rng.choice(texts.tags or (texts.caption,)))
        return "".join(parts)


def _parse(mode: str) -> list[tuple[str, str | None]]:
    """A template's literals and fields; "name" is the template that is nothing but the caption."""
    expected = '"name", "name_or_tags" or a template with {caption} or {tag}'
    try:
        parsed = list(Formatter().parse("{caption}" if mode == "name" else mode))
    except ValueError:
        fail("captions", "caption_mode", expected, repr(mode))
    if not any(field in FIELDS for _, field, _, _ in parsed):
        fail("captions", "caption_mode", expected, repr(mode))
    for _, field, spec, conversion in parsed:
        if field is not None and (field not in FIELDS or spec or conversion):
            fail("captions", "caption_mode", expected, repr(mode))
    return [(literal, field) for literal, field, _, _ in parsed]
