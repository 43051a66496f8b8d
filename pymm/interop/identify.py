"""Which row of our tables a checkpoint fills, from its names and shapes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from pymm.interop import bert_files
from pymm.interop.files import section
from pymm.interop.key_maps import OPENAI_FACTS
from pymm.interop.load import Match, match
from pymm.layers import AttentionPool2d, PatchEmbed, RelativePositionBias
from pymm.models import CLIP, BEiT, BertSpec, bert, create_model, describe, list_models
from pymm.models.bert import ACTIVATIONS
from pymm.ops._checks import fail

# Rows are looked at whose parameters are as many as the checkpoint's within this factor; another head and
# another resolution make less of a difference.
_SPREAD = 1.5


@dataclass(frozen=True)
class Found:
    """A row, and where the checkpoint has other sizes; those of a BERT are `text`."""

    arch: str
    num_classes: int | None = None
    image_size: int | None = None
    text: Mapping[str, Any] = field(default_factory=dict)

    def build(self) -> nn.Module:
        row = describe(self.arch)
        if isinstance(row, BertSpec):
            return bert.build(replace(row, **self.text))
        return create_model(self.arch, num_classes=self.num_classes, image_size=self.image_size)


def identify(tensors: Mapping[str, Tensor], config: Mapping[str, Any], arch: str | None = None) -> Found:
    """The row that the tensors fill, with the checkpoint's number of classes and resolution.

    Args:
        tensors: the checkpoint.
        config: the donor's configuration, which knows what shapes do not show.
        arch: the row, where it is known.

    Raises:
        ValueError: when there is no such row, none fits, or several do.
    """
    shapes = {name: torch.empty_like(t, device="meta") for name, t in tensors.items()}
    if arch is None:
        arch = str(config.get("architecture", "")).partition(".")[0]  # timm's, in front of a tag
        arch = arch if arch in list_models() else _row(shapes, config)
    model = _on_meta(arch)
    found, row = match(model, shapes), describe(arch)
    if isinstance(row, BertSpec):
        return Found(arch, text=bert_files.sizes(row, found.values, config))
    return _sized(arch, model, found)


@lru_cache(maxsize=256)
def _on_meta(name: str) -> nn.Module:
    """The names and shapes of a row; what building dozens of them costs is paid once."""
    with torch.device("meta"):
        return create_model(name)


def _row(shapes: Mapping[str, Tensor], config: Mapping[str, Any]) -> str:
    total = sum(t.numel() for t in shapes.values())
    # Of rows of the same sizes the first is taken, so DeiT comes behind ViT.
    rows = sorted((describe(name) for name in list_models()), key=lambda row: row.name.startswith("deit"))
    faults: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        reads = isinstance(row, BertSpec)  # of any vocabulary, which may be most of it
        if reads or total / _SPREAD <= row.parameters <= total * _SPREAD:
            model = _on_meta(row.name)
            found = match(model, shapes)
            other = _other_shapes(model, found)
            optional = ("pool.dense.",) if reads else _OPTIONAL
            differ = _bert_may_differ(config) if reads else _may_differ
            if all(map(differ, other)) and all(name.startswith(optional) for name in found.missing):
                faults[row.name] = (len(found.unused), len(found.missing), len(other))
    best = [name for name, fault in faults.items() if fault == min(faults.values())]
    activation = _activation(shapes, config)
    if len(best) > 1 and activation is not None:
        best = [name for name in best if getattr(describe(name), "activation", activation) == activation]
    if len({_sizes_of(name) for name in best}) == 1:
        best = best[:1]
    if len(best) != 1:
        expected = f"one of {', '.join(best)}, which fit alike" if best else "given, for no row fits"
        fail("load", "arch", expected, f"the names {', '.join(list(shapes)[:3])}, ...")
    return best[0]


# What no tensor shows, and what the checkpoint may have otherwise.
_APART = {"name", "source", "aliases", "parameters", "mean", "std", "image_size", "num_classes"}


def _sizes_of(name: str) -> tuple[Any, ...]:
    """The rest of a row. DeiT's are those of ViT; a row for larger images is the other at its size."""
    row = describe(name)
    return (type(row), *(value for key, value in vars(row).items() if key not in _APART))


_OPTIONAL = ("head.", "logit_")
# The classifiers; DeiT has two.
_HEADS = ("head.weight", "head.classes.weight")


def _may_differ(name: str) -> bool:
    """Whether a tensor of another shape is another number of classes, or another resolution."""
    return name.startswith("head.") or name.endswith(("position", ".table"))


def _bert_may_differ(config: Mapping[str, Any]) -> Callable[[str], bool]:
    """The same of a BERT; without its word for it, other segments are those of a model of another kind."""
    free = {"embed.weight", "embed.position", *(["types"] if config.get("model_type") == "bert" else [])}
    return free.__contains__


def _other_shapes(model: nn.Module, found: Match) -> list[str]:
    targets = model.state_dict()
    return [name for name, value in found.values.items() if value.shape != targets[name].shape]


def _activation(shapes: Mapping[str, Tensor], config: Mapping[str, Any]) -> str | None:
    """CLIP's, which no shape shows: some donors have one, and the donors' configurations name it."""
    if shapes.keys() >= set(OPENAI_FACTS):
        return "quick_gelu"
    if "model_cfg" in config:
        return "quick_gelu" if section(config, "model_cfg").get("quick_gelu") else "gelu"
    named = section(config, "vision_config").get("hidden_act") or config.get("hidden_act")
    known = (activation for name, activation in _ACTIVATION_OF.items() if name in shapes)
    return ACTIVATIONS.get(named, named) if isinstance(named, str) else next(known, None)


# SigLIP's pool in timm, open_clip and transformers, which always compute one.
_ACTIVATION_OF = {
    "attn_pool.latent": "gelu",
    "visual.trunk.attn_pool.latent": "gelu",
    "head.probe": "gelu_tanh",
    "vision_model.head.probe": "gelu_tanh",
}


def _sized(arch: str, model: nn.Module, found: Match) -> Found:
    classes = side = None
    targets = model.state_dict()
    for name in _other_shapes(model, found):
        value = found.values[name]
        if name in _HEADS and value.ndim == 2 and value.shape[1] == targets[name].shape[1]:
            classes = value.shape[0]
        elif name.endswith(("position", ".table")) and value.ndim == 2:
            side = _side(model, name, value.shape[0]) or side
    if found.values and not set(_HEADS).isdisjoint(found.missing):
        classes = 0
    return Found(arch, None if isinstance(model, CLIP) else classes, side)


def _side(model: nn.Module, name: str, rows: int) -> int | None:
    """Side of the images that so many positions belong to."""
    owner = model.get_submodule(name.rpartition(".")[0])
    if isinstance(owner, PatchEmbed):
        n, pixels = rows - owner.position_prefix, owner.patch_size
    elif isinstance(owner, AttentionPool2d):
        n, pixels = rows - 1, 32
    elif isinstance(owner, RelativePositionBias) and isinstance(model, BEiT):
        side = math.isqrt(max(rows - 3, 0))  # 2g - 1 relative rows for g
        n, pixels = ((side + 1) // 2) ** 2 if side % 2 else 0, model.embed.patch_size
    else:
        return None
    return math.isqrt(n) * pixels if n > 0 and math.isqrt(n) ** 2 == n else None
