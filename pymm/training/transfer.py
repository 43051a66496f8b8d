"""Transfer learning: a backbone with the weights of a checkpoint, frozen as far as asked, with its rates."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from pymm.interop import LoadReport, load_state
from pymm.interop.files import read
from pymm.interop.load import match, unwrapped
from pymm.models import CLIP, create_model
from pymm.models.stages import parameter_stages
from pymm.training.errors import SettingsError
from pymm.training.rundir import SETTINGS
from pymm.training.runs import weights_of

HEAD = "head."


def build_backbone(name: str, num_classes: int, *, image_size: int | None = None, seed: int = 0) -> nn.Module:
    """An image model with a head for `num_classes`; of a CLIP its image tower, whose head is new.

    Args:
        name: of `pymm.models.list_models()`.
        num_classes: at least 1.
        image_size: side of the images instead of the model's.
        seed: of the weights.

    Raises:
        ValueError: when there is no such model, or a size does not fit it.
        SettingsError: when it is no image model.
    """
    return _towers(name, num_classes, image_size, seed)[0]


def _towers(name: str, num_classes: int, image_size: int | None, seed: int) -> tuple[nn.Module, CLIP | None]:
    """The image model, and the CLIP that it is a part of, if it is."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        kind = create_model(name)
    if isinstance(kind, CLIP):
        whole = create_model(name, image_size=image_size)
        assert isinstance(whole, CLIP)
        whole.visual.reset_classifier(num_classes)
        return whole.visual, whole
    if not hasattr(kind, "stage_names") or not hasattr(kind, "reset_classifier"):
        raise SettingsError(f"settings: model.backbone must be an image model, got {name!r}")
    return create_model(name, num_classes=num_classes, image_size=image_size), None


def build_from(
    name: str, num_classes: int, init: Path | str, *, image_size: int | None = None, seed: int = 0
) -> tuple[nn.Module, LoadReport]:
    """An image model as `build_backbone` makes it, with the weights of a checkpoint.

    Args:
        name, num_classes, image_size, seed: as there.
        init: a run's directory or a file; a checkpoint of this model, of one that contains it, or of another
            library (see `pymm.load`). Positions of another grid are interpolated. Its head is used when it is
            for as many classes.

    Returns:
        The model, and what the checkpoint gave it.

    Raises:
        FileNotFoundError: when there is no such checkpoint.
        ValueError: when it is damaged or would need to run code; as `build_backbone`.
        SettingsError: when it leaves a part of the backbone out, or its weights are not finite.
    """
    tensors = unwrapped(read(_file(Path(init))).state)
    model, whole = _towers(name, num_classes, image_size, seed)
    places: list[tuple[nn.Module, Mapping[str, Tensor]]] = [(model, tensors)]
    for part in dict.fromkeys(key.partition(".")[0] for key in tensors):
        inner = {k.removeprefix(f"{part}."): t for k, t in tensors.items() if k.startswith(f"{part}.")}
        places.append((model, inner))
    if whole is not None:
        places.append((whole, tensors))
    target, state = max(places, key=lambda place: _found(*place))
    if not _found(target, state):
        keys = ", ".join(list(tensors)[:3])
        raise SettingsError(
            f"settings: model.init must be a checkpoint of {name}, got {init} with {keys}, ..."
        )
    report = load_state(target, state)
    if target is whole:  # a projection of as many rows as classes is no classifier
        model.reset_classifier(num_classes)  # type: ignore[operator]
    _check(model, name, init, report, "visual." if target is whole else "")
    return model, report


def describe_init(init: Path | str, report: LoadReport) -> str:
    """What a checkpoint gave a model, in a line."""
    new = "kept" if any(name.startswith(HEAD) for name in report.placed) else "new"
    text = f"init: {len(report.placed)} tensors placed from {init} ({report.donor}); head {new}"
    if report.resampled:
        text += f"; resampled: {', '.join(report.resampled)}"
    if report.unused:
        text += f"; {len(report.unused)} unused ({report.unused[0]})"
    return text


def freeze(model: nn.Module, stages: int | Literal["all"]) -> None:
    """Let the first stages of an image model, or all but its head, need no gradient.

    Raises:
        SettingsError: when nothing would be left to train.
    """
    order = parameter_stages(model)
    if stages == "all":
        frozen = [name for stage in order for name in stage if not name.startswith(HEAD)]
    elif stages < len(order):
        frozen = [name for stage in order[:stages] for name in stage]
    else:
        least = f'below {len(order)}, the stages of {type(model).__name__}, or "all"'
        raise SettingsError(f"settings: model.freeze must be {least}, got {stages}")
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise SettingsError(
            f"settings: model.freeze must leave something to train of {type(model).__name__}, got {stages!r}"
        )


def learning_rates(model: nn.Module, layer_decay: float = 1.0, head_rate: float = 1.0) -> dict[str, float]:
    r"""The share of the learning rate of every parameter of an image model.

    .. math:: r_i = d^{\,n - 1 - i}

    for stage i of n (Clark et al. 2020, arXiv:2003.10555, sec. 3.1, as BEiT and MAE have it: what is behind
    the last block has the full rate), and `head_rate` for the head.
    """
    order = parameter_stages(model)
    return {
        name: head_rate if name.startswith(HEAD) else layer_decay ** (len(order) - 1 - i)
        for i, stage in enumerate(order)
        for name in stage
    }


def _file(path: Path) -> Path:
    """The weights of a run's directory, or the path itself."""
    return weights_of(path, path.resolve()) if (path / SETTINGS).is_file() else path


def _found(target: nn.Module, state: Mapping[str, Tensor]) -> int:
    """How many tensors of an image model, without its head, a state dict has."""
    prefix = "visual." if isinstance(target, CLIP) else ""
    values = match(target, state).values
    return sum(name.startswith(prefix) and not name.startswith(prefix + HEAD) for name in values)


def _check(model: nn.Module, name: str, init: Path | str, report: LoadReport, prefix: str) -> None:
    lacking = [
        key.removeprefix(prefix)
        for key in (*report.missing, *report.mismatched)
        if key.startswith(prefix) and not key.startswith(prefix + HEAD) and "num_batches_tracked" not in key
    ]
    if lacking:
        raise SettingsError(
            f"settings: model.init must be a checkpoint of {name}, got {init}, which lacks {len(lacking)} of "
            f"{len(model.state_dict())} tensors (first {lacking[0]})"
        )
    for key, t in model.state_dict().items():
        if t.is_floating_point() and not t.isfinite().all():
            raise SettingsError(
                f"settings: model.init must be finite, got NaN or infinity in {key} of {init}"
            )
