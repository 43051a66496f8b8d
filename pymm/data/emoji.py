"""The embedded pack: 1852 emoji in three drawing styles, with their English names."""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Sequence
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from pymm.data._errors import fail

STYLES = ("noto", "twemoji", "fluent")
FOLDER = Path(__file__).parent / "emoji_pack"


def emoji_shards(styles: Sequence[str] = STYLES) -> list[Path]:
    """The WebDataset shards of the given styles, one each; all styles draw the same concepts in the same
    order.

    A sample is `<code points>.webp` (64×64, RGBA) and `<code points>.json` with `caption`, `tags`, `group`,
    `subgroup`, `unicode` and `style`. Licences and attribution: `pymm/data/emoji_pack/LICENSES.md`.

    Raises:
        ValueError: for an unknown style.
    """
    for style in styles:
        if style not in STYLES:
            fail("emoji_shards", "style", f"one of {', '.join(STYLES)}", repr(style))
    return [FOLDER / f"{style}.tar" for style in styles]


@lru_cache(maxsize=1)
def emoji_concepts() -> tuple[str, ...]:
    """The keys of the pack's 1852 concepts (code points, `"1f600"`), in the order of the shards."""
    with tarfile.open(FOLDER / f"{STYLES[0]}.tar") as tar:
        return tuple(name.removesuffix(".json") for name in tar.getnames() if name.endswith(".json"))


def unseen_concepts(
    fraction: float = 0.1, seed: int = 0, keys: Iterable[str] | None = None
) -> frozenset[str]:
    """The concepts that training leaves out, so that evaluation can ask for what was never seen.

    Keys are ranked by a hash of seed and key and the first `round(fraction · N)` are taken: the choice
    depends on the set of keys only, never on their order.

    Args:
        fraction: in [0, 1].
        seed: another seed, another choice.
        keys: the concepts; those of the pack by default, of which 0.1 are 185 of 1852.

    Raises:
        ValueError: when `fraction` is outside [0, 1].
    """
    if not 0 <= fraction <= 1:
        fail("unseen_concepts", "fraction", "in [0, 1]", fraction)
    concepts = set(emoji_concepts() if keys is None else keys)
    ranked = sorted(concepts, key=lambda key: blake2b(f"{seed}:{key}".encode()).digest())
    return frozenset(ranked[: round(fraction * len(concepts))])
