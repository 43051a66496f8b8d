"""How the names and tensors of a donor and of a model of ours belong together.

A rule goes from our name to the donor's, so that several donor tensors can make one of ours, and its form
knows both ways: what `join` puts together, `split` takes apart. A map is the rules of one layout of names.

To add one, write its rules (`Rule(r"head\\.(.*)", (r"fc.\\1",))`: our name as a regular expression, the
donor's names as templates of its groups, and a form where the tensors are not the same) and a line
`KeyMap(("timm",), Model, rules)` in `KEY_MAPS`. A name may have several rules; the first that fits counts,
so that one map serves variants that differ in a few names. Loading takes the map that places most tensors;
writing takes the first of the donor whose `fits` accepts the model.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Form:
    """What the donor's tensors look like.

    Args:
        join: the donor's tensors to ours.
        split: back; None where our tensor cannot have come from there, and the next rule is tried.
    """

    join: Callable[[Sequence[Tensor]], Tensor]
    split: Callable[[Tensor], Sequence[Tensor] | None]


def _cut(t: Tensor, parts: int) -> Sequence[Tensor] | None:
    return None if t.ndim == 0 or t.shape[0] % parts else t.chunk(parts)


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].reshape(-1, tensors[0].shape[-1])


SAME = Form(lambda tensors: tensors[0], lambda t: [t])
TRANSPOSED = Form(lambda tensors: tensors[0].mT, lambda t: [t.mT.contiguous()])
# Tokens or positions, which are a matrix here: with a dimension of one in front, or one of them as a vector.
BATCH_OF_ONE = Form(_rows, lambda t: [t[None]])
VECTOR = Form(_rows, lambda t: [t[0]] if t.shape[0] == 1 else None)


def stacked(parts: int) -> Form:
    """Equal parts along the first dimension: queries, keys and values."""
    return Form(lambda tensors: torch.cat(list(tensors)), lambda t: _cut(t, parts))


def convolution(side: int) -> Form:
    """The rows of a matrix as kernels of `side` by `side`."""

    def split(t: Tensor) -> Sequence[Tensor] | None:
        return None if t.shape[1] % (side * side) else [t.unflatten(1, (-1, side, side))]

    return Form(lambda tensors: tensors[0].flatten(1), split)


@functools.lru_cache(maxsize=1 << 17)  # maps share rules
def _expanded(pattern: str, templates: tuple[str, ...], name: str) -> tuple[str, ...] | None:
    found = re.fullmatch(pattern, name)
    return None if found is None else tuple(found.expand(template) for template in templates)


@dataclass(frozen=True)
class Rule:
    """Our names that fit `ours` come from the tensors that the templates `theirs` name, in their form."""

    ours: str
    theirs: tuple[str, ...]
    form: Form = SAME

    def names(self, name: str) -> tuple[str, ...] | None:
        """The donor's names for our `name`, or None where the rule is not about it."""
        return _expanded(self.ours, self.theirs, name)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return self.form.join(tensors)


def _any(model: nn.Module) -> bool:
    return True


@dataclass(frozen=True)
class KeyMap:
    """One layout of names for one class of ours.

    Args:
        donors: the libraries that have it.
        model: our class.
        rules: for every name of ours.
        variant: what sets the layout apart from the donor's others, in words.
        ignored: patterns of the donor's names that hold nothing to load, such as constants.
        fits: whether `to_donor` writes a model this way.
    """

    donors: tuple[str, ...]
    model: type[nn.Module]
    rules: tuple[Rule, ...]
    variant: str = ""
    ignored: tuple[str, ...] = ()
    fits: Callable[[nn.Module], bool] = _any
    _places: dict[str, tuple[tuple[Rule, tuple[str, ...]], ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def donor(self) -> str:
        """The donors in words."""
        return " or ".join(self.donors) + (f", {self.variant}" if self.variant else "")

    def places(self, name: str) -> tuple[tuple[Rule, tuple[str, ...]], ...]:
        """The rules about our `name`, each with the donor's names; a search for the right row asks again."""
        if name not in self._places:
            found = ((rule, rule.names(name)) for rule in self.rules)
            self._places[name] = tuple((rule, theirs) for rule, theirs in found if theirs is not None)
        return self._places[name]

    def ignores(self, name: str) -> bool:
        return any(re.fullmatch(pattern, name) for pattern in self.ignored)


def behind(ours: str, theirs: str, rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The rules of a part of a model, behind its prefixes."""
    return tuple(
        Rule(re.escape(ours) + rule.ours, tuple(theirs + name for name in rule.theirs), rule.form)
        for rule in rules
    )


def own(model: type[nn.Module]) -> KeyMap:
    """The map of our own checkpoints."""
    return KeyMap(("pymm",), model, (Rule(r"(.*)", (r"\1",)),))
