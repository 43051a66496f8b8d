"""Put another library's weights into a model of ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pymm.interop.key_maps import KEY_MAPS, OPENAI_FACTS, own
from pymm.interop.rules import KeyMap, Rule
from pymm.layers import (
    AttentionPool2d,
    Linear,
    PatchEmbed,
    RelativePositionBias,
    resample_position,
    resample_relative_position,
)
from pymm.models.clip import CLIP
from pymm.models.mae import MAEDecoder
from pymm.ops._checks import fail, shape

_HOLDERS = ("state_dict", "model", "module")
_WRAPPERS = ("module.", "_orig_mod.")


@dataclass(frozen=True)
class LoadReport:
    """What `load_state` did.

    Args:
        donor: whose names the state dict has.
        placed: names of ours that were set.
        missing: names of ours that the state dict says nothing about; they keep their values.
        unused: names of the state dict that have no place in the model.
        mismatched: our names whose tensors have another shape, as `"name: expected ..., got ..."`.
        resampled: our names of positions that were interpolated to the model's grid.
    """

    donor: str
    placed: tuple[str, ...]
    missing: tuple[str, ...]
    unused: tuple[str, ...]
    mismatched: tuple[str, ...]
    resampled: tuple[str, ...]

    @property
    def complete(self) -> bool:
        """Whether everything in the state dict found its place and nothing of the model was left out."""
        return not (self.missing or self.unused or self.mismatched)

    def faults(self) -> str:
        """What keeps it from being complete, in one line: numbers, and the first name of each kind."""
        kinds = [(word, getattr(self, word)) for word in ("missing", "unused", "mismatched")]
        return "; ".join(f"{len(names)} {word} ({names[0]})" for word, names in kinds if names)

    def __str__(self) -> str:
        lines = [f"{len(self.placed)} tensors placed from {self.donor}"]
        for name in ("missing", "unused", "mismatched", "resampled"):
            lines += [f"{name}: {value}" for value in getattr(self, name)]
        return "\n".join(lines)


def load_state(model: nn.Module, state: Mapping[str, Any]) -> LoadReport:
    """Load a state dict of pymm or one of the donors into a model of ours.

    The donor is known by its names. Position embeddings of another grid are interpolated, as the donors do
    it. What could not be placed stands in the report, so look at its `complete`.

    Args:
        model: of `pymm.models`.
        state: names to tensors; also a checkpoint that holds them under `"state_dict"`, `"model"` or
            `"module"`, and names behind `"module."`, as `DistributedDataParallel` saves them.

    Returns:
        The report.

    Raises:
        ValueError: when no donor's names fit the model, or weights that OpenAI published meet a model whose
            activation is not quick GELU.
    """
    tensors = unwrapped(state)
    if tensors.keys() >= set(OPENAI_FACTS):
        _check_openai(model)
    found = match(model, tensors)
    if not found.values:
        fail("load_state", "state", f"a state dict for {type(model).__name__}", f"the names {_some(tensors)}")

    placed: dict[str, Tensor] = {}
    mismatched, resampled = [], []
    targets = model.state_dict(keep_vars=True)
    for name, value in found.values.items():
        if value.shape != targets[name].shape:
            fitted = _resampled(model, name, value)
            if fitted is None:
                mismatched.append(f"{name}: expected {shape(targets[name])}, got {shape(value)}")
                continue
            value = fitted
            resampled.append(name)
        placed[name] = value
    meta = any(parameter.is_meta for parameter in model.parameters())
    model.load_state_dict(placed, strict=False, assign=meta)
    return LoadReport(
        found.key_map.donor, tuple(placed), found.missing, found.unused, tuple(mismatched), tuple(resampled)
    )


@dataclass(frozen=True)
class Match:
    """What a state dict has for a model.

    Args:
        key_map: the names that it has.
        values: our names, with the tensors made of the donor's, whose shapes may be other ones.
        missing: our names that it says nothing about.
        unused: its names without a place.
    """

    key_map: KeyMap
    values: dict[str, Tensor]
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def match(model: nn.Module, tensors: Mapping[str, Tensor]) -> Match:
    """The key map that finds most of the model's tensors, and what it finds."""
    targets = model.state_dict(keep_vars=True)
    maps = [own(type(model)), *(m for m in KEY_MAPS if isinstance(model, m.model))]
    key_map, names = max(((m, _names(m, targets, tensors)) for m in maps), key=lambda pair: len(pair[1]))
    used = {key for _, theirs in names.values() for key in theirs}
    return Match(
        key_map,
        {name: rule.join([tensors[key] for key in theirs]) for name, (rule, theirs) in names.items()},
        tuple(name for name in targets if name not in names),
        tuple(name for name in tensors if name not in used and not key_map.ignores(name)),
    )


def unwrapped(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a checkpoint by their names, without what trainers put around them."""
    inner = next((state[name] for name in _HOLDERS if isinstance(state.get(name), Mapping)), state)
    tensors = {name: value for name, value in inner.items() if isinstance(value, Tensor)}
    for wrapper in _WRAPPERS:
        if tensors and all(name.startswith(wrapper) for name in tensors):
            tensors = {name.removeprefix(wrapper): value for name, value in tensors.items()}
    return tensors


def _check_openai(model: nn.Module) -> None:
    activations = {m.activation for m in model.modules() if isinstance(m, Linear)} - {None}
    if isinstance(model, CLIP) and activations != {"quick_gelu"}:
        got = ", ".join(sorted(str(a) for a in activations))
        fail("load_state", "model", "a _quickgelu row for OpenAI's weights", f"the activation {got}")


def _names(
    key_map: KeyMap, targets: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[Rule, tuple[str, ...]]]:
    """Our names that the map finds, each with its rule and the donor's names."""
    found: dict[str, tuple[Rule, tuple[str, ...]]] = {}
    for name in targets:
        for rule, theirs in key_map.places(name):
            if all(key in tensors for key in theirs):
                found[name] = rule, theirs
                break
    return found


def _resampled(model: nn.Module, name: str, value: Tensor) -> Tensor | None:
    """Positions on the model's grid, or None where they are no positions of a square grid."""
    path, _, parameter = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(module, RelativePositionBias):
        return _resampled_table(module, value)
    if parameter != "position" or not isinstance(module, (PatchEmbed, AttentionPool2d, MAEDecoder)):
        return None
    prefix = module.position_prefix if isinstance(module, PatchEmbed) else 1
    position = module.position
    assert position is not None
    side, old = round((position.shape[0] - prefix) ** 0.5), value.shape[0] - prefix
    if value.shape[1] != position.shape[1] or old < 1 or round(old**0.5) ** 2 != old:
        return None
    with torch.no_grad():
        return resample_position(value, (side, side), prefix=prefix)


def _resampled_table(module: RelativePositionBias, value: Tensor) -> Tensor | None:
    """A table of another square grid on the module's, which is square too."""
    wanted = module.table.shape
    side, old = round((wanted[0] - 3) ** 0.5), round(max(value.shape[0] - 3, 0) ** 0.5)
    if value.ndim != 2 or value.shape[1] != wanted[1] or old * old != value.shape[0] - 3 or old % 2 == 0:
        return None
    with torch.no_grad():
        return resample_relative_position(value, ((side + 1) // 2, (side + 1) // 2))


def _some(tensors: Mapping[str, Tensor]) -> str:
    names = list(tensors)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
