"""What can be said and asked about a scene, each sentence true by its scene graph."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COLOURS = frozenset(
    ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white", "grey")
)
# A name with one of these has its head noun in front of it, where no simple rule finds the plural.
INNER = frozenset(("of", "with", "in", "and", "on", "showing", "no", "not"))
SMALL = INNER | {"a", "the", "small", "large"}
IRREGULAR = {
    "mouse": "mice",
    "goose": "geese",
    "ox": "oxen",
    "leaf": "leaves",
    "wolf": "wolves",
    "knife": "knives",
    "tooth": "teeth",
    "foot": "feet",
    "person": "people",
    "man": "men",
    "woman": "women",
    "child": "children",
    "loaf": "loaves",
    "scarf": "scarves",
}
# Without article and plural.
MASS = re.compile(
    "bread|rice|popcorn|curry|luggage|wood|rock|ice|salt|butter|bacon|spaghetti|sushi|oden|dango|"
    "tofu|honey|fog|rain|snow|fireworks|meat|cheese|broccoli|garlic|ginger|jeans|lightning|dna|milk|"
    "mail|clothes"
)
SAME_PLURAL = frozenset(("fish", "sheep", "deer", "bison", "shrimp", "squid", "series"))
AN = re.compile(r"^(?:[aeio]|u(?!ni|f|k)|hour|x-)", re.IGNORECASE)
Draw = np.random.RandomState
Relation = tuple[int, str, int]
Type = Literal["existence", "count", "relation", "what", "colour"]


class Thing(Protocol):
    """What a sentence needs of an object."""

    @property
    def name(self) -> str: ...
    @property
    def colour(self) -> str | None: ...
    @property
    def box(self) -> tuple[int, int, int, int]: ...


@dataclass(frozen=True)
class Question:
    """A question, its answer, and its type: existence and relation are answered by yes or no, count by a
    number in digits, what by a name, colour by a basic colour."""

    type: Type
    question: str
    answer: str


def confusable(first: str, second: str) -> bool:
    """Whether two names share a word, so that "Is there a cat?" might mean either of them."""
    return bool(_words(first) & _words(second))


def _words(name: str) -> set[str]:
    return {word.removesuffix("s") for word in re.findall(r"\w+", name.lower())} - SMALL - COLOURS


def relations(objects: Sequence[Thing]) -> tuple[Relation, ...]:
    """Where objects lie to each other: `(i, "left of", j)` when i's box ends before j's begins; likewise
    right of, above and below."""
    found: list[Relation] = []
    for i, a in enumerate(objects):
        for j, b in enumerate(objects):
            if i != j:
                if a.box[2] <= b.box[0]:
                    found += [(i, "left of", j), (j, "right of", i)]
                if a.box[3] <= b.box[1]:
                    found += [(i, "above", j), (j, "below", i)]
    return tuple(sorted(found))


def counted(name: str, count: int) -> str:
    """`"a dog"`, `"two dogs"`, `"bread"`; where a plural is not sure, `"two times fork and knife"`."""
    words = name.split()
    last = words[-1].lower()
    headless = bool(INNER & {word.lower() for word in words}) or not last.isalpha()
    bare = MASS.fullmatch(last) is not None or _is_plural(last)
    if count == 1:
        return name if bare else f"{'an' if AN.match(name) else 'a'} {name}"
    number = NUMBERS[count] if count < len(NUMBERS) else str(count)
    if headless or bare:
        return f"{number} times {name}"
    return f"{number} {name[: len(name) - len(last)]}{_plural(words[-1])}"


def _is_there(name: str) -> str:
    return f"{'Are' if _is_plural(name) else 'Is'} there {counted(name, 1)}?"


def _how_many(name: str) -> str:
    two = counted(name, 2)
    if two.startswith("two times "):
        return f"How many times {'are' if _is_plural(name) else 'is'} there {counted(name, 1)}?"
    return f"How many {two.removeprefix('two ')} are there?"


def _is_plural(word: str) -> bool:
    return word.endswith("s") and not word.endswith(("ss", "us", "is", "as"))


def _plural(word: str) -> str:
    if word.lower() in SAME_PLURAL:
        return word
    if word.lower() in IRREGULAR:
        return IRREGULAR[word.lower()]
    if word.endswith(("s", "x", "z", "ch", "sh")) or word in ("tomato", "potato", "mango", "volcano"):
        return word + "es"
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return word[:-1] + "ies"
    return word + "s"


def captions(objects: Sequence[Thing], related: Sequence[Relation], draw: Draw) -> tuple[str, ...]:
    """Several true sentences: all that is there, one relation, one colour, how many things there are."""
    counts = Counter(one.name for one in objects)
    names = list(counts)
    listed = _listed([counted(name, counts[name]) for name in names])
    shuffled = _listed([counted(names[i], counts[names[i]]) for i in draw.permutation(len(names))])
    said = [listed, f"a picture of {shuffled}"]
    clear = [one for one in related if counts[objects[one[0]].name] == counts[objects[one[2]].name] == 1]
    for i in draw.permutation(len(clear))[:2]:
        a, how, b = clear[i]
        said.append(f"{counted(objects[a].name, 1)} {_where(how)} {counted(objects[b].name, 1)}")
    coloured = [one for one in objects if _coloured(one, counts)]
    if coloured:
        one = coloured[draw.randint(len(coloured))]
        verb = "are" if _is_plural(one.name) else "is"
        said.append(f"the {one.name} {verb} {one.colour}")
    total = len(objects)
    said.append("one thing" if total == 1 else f"{NUMBERS[total] if total < len(NUMBERS) else total} things")
    return tuple(dict.fromkeys(said))


def questions(
    objects: Sequence[Thing], related: Sequence[Relation], vocabulary: Sequence[str], draw: Draw
) -> tuple[Question, ...]:
    """Questions of every type that the scene has an answer to; those about one object name one whose name
    comes once."""
    counts = Counter(one.name for one in objects)
    names = list(counts)
    asked: list[Question] = []
    there = names[draw.randint(len(names))]
    asked.append(Question("existence", _is_there(there), "yes"))
    absent = _absent(names, vocabulary, draw)
    if absent is not None:
        asked.append(Question("existence", _is_there(absent), "no"))
    name = names[draw.randint(len(names))]
    asked.append(Question("count", _how_many(name), str(counts[name])))
    asked.append(Question("count", "How many things are there?", str(len(objects))))
    once = [one for one in related if counts[objects[one[0]].name] == counts[objects[one[2]].name] == 1]
    if once:
        a, how, b = once[draw.randint(len(once))]
        yes = bool(draw.randint(2))
        # The opposite of a relation that holds cannot hold.
        said = how if yes else OPPOSITE[how]
        verb = "Are" if _is_plural(objects[a].name) else "Is"
        text = f"{verb} the {objects[a].name} {_where(said)} the {objects[b].name}?"
        asked.append(Question("relation", text, "yes" if yes else "no"))
    asked += _what(objects, related, counts, draw)
    coloured = [one for one in objects if _coloured(one, counts)]
    if coloured:
        one = coloured[draw.randint(len(coloured))]
        verb = "are" if _is_plural(one.name) else "is"
        asked.append(Question("colour", f"What colour {verb} the {one.name}?", str(one.colour)))
    return tuple(asked)


def _what(
    objects: Sequence[Thing], related: Sequence[Relation], counts: Counter[str], draw: Draw
) -> list[Question]:
    """A question for the only thing in a direction: all others lie, by their centres, on the other side."""
    if len(objects) == 1:
        return [Question("what", "What is in the picture?", objects[0].name)]
    sides: dict[str, Callable[[Thing, Thing], bool]] = {
        "left of": lambda a, b: _centre(a, 0) < _centre(b, 0),
        "right of": lambda a, b: _centre(a, 0) > _centre(b, 0),
        "above": lambda a, b: _centre(a, 1) < _centre(b, 1),
        "below": lambda a, b: _centre(a, 1) > _centre(b, 1),
    }
    found = []
    for a, how, b in related:
        others = [one for i, one in enumerate(objects) if i not in (a, b)]
        if counts[objects[b].name] == 1 and not any(sides[how](one, objects[b]) for one in others):
            text = f"What is {_where(how)} the {objects[b].name}?"
            found.append(Question("what", text, objects[a].name))
    return [found[draw.randint(len(found))]] if found else []


def _absent(names: Sequence[str], vocabulary: Sequence[str], draw: Draw) -> str | None:
    """A concept that is not there, nor could be meant by what is there."""
    for _ in range(40):
        name = vocabulary[draw.randint(len(vocabulary))]
        if name not in names and not any(confusable(name, other) for other in names):
            return name
    return None


def _coloured(one: Thing, counts: Counter[str]) -> bool:
    """Whether its colour is known, is not said by its name, and cannot be another's of that name."""
    return one.colour is not None and counts[one.name] == 1 and not COLOURS & set(one.name.lower().split())


def _centre(one: Thing, axis: int) -> int:
    """Twice the centre of its box, a whole number."""
    return one.box[axis] + one.box[axis + 2]


def _where(how: str) -> str:
    return f"to the {how}" if how in ("left of", "right of") else how


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
