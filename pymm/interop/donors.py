"""A model of ours in the names of another library."""

from __future__ import annotations

from torch import Tensor, nn

from pymm.interop.key_maps import KEY_MAPS
from pymm.interop.rules import KeyMap
from pymm.ops._checks import fail


def to_donor(model: nn.Module, donor: str) -> dict[str, Tensor]:
    """The state dict of a model under the names, and in the shapes, of another library.

    It is the inverse of `load_state`, so fused projections are taken apart where the donor has them apart.
    For transformers the names are those of its files, which `from_pretrained` reads.

    Args:
        model: of `pymm.models`.
        donor: `"timm"`, `"torchvision"`, `"open_clip"` or `"transformers"`, where it has such a model.

    Returns:
        Names to detached tensors, views of the model's where the shapes allow it.

    Raises:
        ValueError: when the donor has no such model, or a tensor has no place in it.
    """
    maps = [m for m in KEY_MAPS if isinstance(model, m.model) and m.fits(model)]
    known = list(dict.fromkeys(name for m in maps for name in m.donors if name.isidentifier()))
    key_map = next((m for m in maps if donor in m.donors), None)
    if key_map is None:
        expected = f"one of {', '.join(known)} for {type(model).__name__}" if known else "of such a model"
        fail("to_donor", "donor", expected, repr(donor))
    result: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        parts = _apart(key_map, name, value)
        if parts is None:
            fail("to_donor", "model", f"made of what {key_map.donor} has a name for", name)
        result |= parts
    return result


def _apart(key_map: KeyMap, name: str, value: Tensor) -> dict[str, Tensor] | None:
    for rule in key_map.rules:
        theirs = rule.names(name)
        parts = None if theirs is None else rule.form.split(value)
        if theirs is not None and parts is not None:
            return dict(zip(theirs, parts, strict=True))
    return None
