"""Towers of a CLIP that begin with the weights of a checkpoint, and may keep them."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from pymm.interop import LoadReport, load_state
from pymm.interop.files import read
from pymm.interop.load import unwrapped
from pymm.models import CLIP
from pymm.training.errors import SettingsError
from pymm.training.settings import ModelSettings

TOWERS = {"image": "visual", "text": "text"}
HEAD = "head."


def begin_towers(model: CLIP, settings: ModelSettings) -> str:
    """Load the towers that the settings name and freeze those that are to stay as they are.

    A frozen tower's parameters need no gradient, so that they are in no optimizer and their modules stay in
    eval mode; only a projection that its checkpoint did not hold is trained.

    Args:
        model: changed in place.
        settings: `image_init`, `text_init` and `freeze`.

    Returns:
        What was loaded and frozen, a line each; "" where the settings ask for nothing.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        ValueError: when it is damaged or would need to run code.
        SettingsError: when it does not fit the tower.
    """
    lines = []
    for name, attribute in TOWERS.items():
        path: str | None = getattr(settings, f"{name}_init")
        if path is None:
            continue
        tower: nn.Module = getattr(model, attribute)
        donor, placed = _load(model, attribute, f"model.{name}_init", path)
        frozen = [p for key, p in tower.named_parameters() if name in settings.freeze and key in placed]
        for parameter in frozen:
            parameter.requires_grad_(False)
        held = sum(p.numel() for p in frozen)
        lines.append(f"{name} tower: {len(placed)} tensors from {path} ({donor}), {held:,} parameters frozen")
    return "\n".join(lines)


def _load(model: CLIP, attribute: str, setting: str, path: str) -> tuple[str, set[str]]:
    """Put the checkpoint's tower into the model's; the donor and the tower's names that were set."""
    state = unwrapped(read(Path(path)).state)
    tower: nn.Module = getattr(model, attribute)
    # A checkpoint of a whole CLIP is read by a whole CLIP, of which the tower is then taken.
    whole, alone = copy.deepcopy(model), copy.deepcopy(tower)
    reports = [(_report(whole, state), whole.get_submodule(attribute), f"{attribute}.")]
    reports.append((_report(alone, state), alone, ""))
    found = [(_inside(r, prefix), r, source) for r, source, prefix in reports if r is not None]
    placed, report, source = max(found, key=lambda one: len(one[0]), default=(set(), None, tower))
    wanted = {name for name in tower.state_dict() if not name.startswith(HEAD)}
    missing = sorted(wanted - placed)
    if report is None or missing:
        names = list(state)[:3]
        raise SettingsError(
            f"settings: {setting} must be a checkpoint with all of the tower but its projection, got {path} "
            f"with {', '.join(names)}, ... without {missing[0]}"
            + (f" ({report.mismatched[0]})" if report is not None and report.mismatched else "")
        )
    values = source.state_dict()
    for name in placed:
        if not values[name].isfinite().all():
            raise SettingsError(f"settings: {setting} must hold finite weights, got {path} with {name}")
    with torch.no_grad():
        for name, value in tower.state_dict().items():
            if name in placed:
                value.copy_(values[name])
    return report.donor, placed


def _report(model: nn.Module, state: object) -> LoadReport | None:
    try:
        return load_state(model, state)  # type: ignore[arg-type]
    except ValueError:
        return None


def _inside(report: LoadReport, prefix: str) -> set[str]:
    return {name.removeprefix(prefix) for name in report.placed if name.startswith(prefix)}
