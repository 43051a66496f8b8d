"""Models from checkpoint files of any donor, and files of ours."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from pymm import __version__
from pymm.interop import bert_files
from pymm.interop.files import Checkpoint, read, section
from pymm.interop.identify import identify
from pymm.interop.load import load_state, unwrapped
from pymm.layers import Linear, Normalize, PatchEmbed
from pymm.models import Bert
from pymm.ops._checks import fail


def load(
    path: str | os.PathLike[str] | Mapping[str, Any], arch: str | None = None, *, strict: bool = True
) -> nn.Module:
    """A model with the weights of a checkpoint of torchvision, timm, transformers, OpenAI, open_clip or pymm.

    The donor is known by its names, the row of `list_models()` by names and shapes, where the donor's
    configuration lies beside the file with its help; classes and resolution are the checkpoint's, mean and
    standard deviation of the pixels the configuration's. No file can run code: pickles may hold nothing but
    tensors, and of a TorchScript archive only they are read.

    Args:
        path: a `.safetensors`, `.pt`, `.pth`, `.bin` or `.ckpt` file; the `.index.json` of shards; a
            directory with one of these as the Hugging Face hub has it, or as sentence-transformers writes
            it; or a state dict.
        arch: the name of a row, where it is known or names and shapes leave a choice, as they do between
            CLIP's activations.
        strict: False lets a model through whose checkpoint lacks something, or holds more.

    Returns:
        The model in evaluation mode, float32, on the CPU. Its attribute `load_report` is the `LoadReport`,
        which names every key that found no place.

    Raises:
        FileNotFoundError: when there is no such file.
        ValueError: when the file is damaged, needs to run code, or holds weights that are not finite; when no
            row fits, or several do; with `strict`, when anything is missing, left over or of another shape.
    """
    checkpoint = Checkpoint(path) if isinstance(path, Mapping) else _read(Path(path))
    tensors = unwrapped(checkpoint.state)
    if not tensors:
        fail("load", "path", "a checkpoint with tensors", f"the names {list(checkpoint.state)[:3]}")
    found = identify(tensors, checkpoint.config, arch or checkpoint.metadata.get("arch"))
    with torch.random.fork_rng(devices=()), torch.device("cpu"):
        model = found.build().float()
    report = load_state(model, tensors)
    state = model.state_dict()
    for name in report.placed:
        _check_finite(name, state[name])
    if strict and not report.complete:
        fail("load", "path", f"a complete checkpoint of {found.arch}, or strict False", report.faults())
    _set_eps(model, checkpoint.config)
    _set_normalization(model, checkpoint.config)
    model.__dict__ |= {"arch": found.arch, "load_report": report}
    return model.eval()


def _read(path: Path) -> Checkpoint:
    """The file with what stands beside it, in it, or around its folder."""
    found = bert_files.sentence_encoder(path)
    checkpoint = read(path if found is None else found[0])
    said = bert_files.read_facts(checkpoint.metadata) | ({} if found is None else {"pooling": found[1]})
    return replace(checkpoint, config={**checkpoint.config, **said})


def _check_finite(name: str, t: Tensor) -> None:
    if t.is_floating_point() and not t.isfinite().all():
        fail("load", "path", "a checkpoint of finite weights", f"NaN or infinity in {name}")


def _set_eps(model: nn.Module, config: Mapping[str, Any]) -> None:
    """transformers' ViTs of one size differ in what their layer norms add to the variance."""
    eps = config.get("layer_norm_eps")
    for module in model.modules():
        if isinstance(eps, float) and isinstance(module, nn.LayerNorm):
            module.eps = eps


def _set_normalization(model: nn.Module, config: Mapping[str, Any]) -> None:
    """Mean and standard deviation of the pixels that the weights were trained with, where the donor says."""
    for place, names in _NORMALIZATIONS.items():
        mean, std = (_numbers(section(config, place).get(name)) for name in names)
        for module in model.modules():
            if isinstance(module, (PatchEmbed, Normalize)) and len(mean) == len(std) == len(module.mean):
                module.mean, module.std = mean, std


def _numbers(value: Any) -> tuple[float, ...]:
    """A list of numbers, or nothing where it is something else."""
    fits = isinstance(value, list) and all(isinstance(x, (int, float)) for x in value)
    return tuple(float(x) for x in value) if fits else ()


# Where timm, open_clip and transformers keep them.
_NORMALIZATIONS = {
    "pretrained_cfg": ("mean", "std"),
    "preprocess_cfg": ("mean", "std"),
    "preprocessor": ("image_mean", "image_std"),
}


def save(model: nn.Module, path: str | os.PathLike[str], arch: str | None = None) -> None:
    """Write a model's weights as safetensors under pymm's names, with the row and the version beside them.

    Args:
        model: of `pymm.models`.
        path: the file.
        arch: the row; by default the one that the model was loaded as, or that its shapes show.

    Raises:
        ValueError: when there is no such row, it does not fit the model, or it is not clear which it is.
    """
    state = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    arch = arch or getattr(model, "arch", None)
    activations = {m.activation for m in model.modules() if isinstance(m, Linear) and m.activation}
    found = identify(state, {"hidden_act": next(iter(activations), None)}, arch)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in found.build().state_dict().items()}
    if shapes != {name: t.shape for name, t in state.items()}:
        fail("save", "arch", f"the row of this {type(model).__name__}", found.arch)
    facts = {bert_files.METADATA: bert_files.facts(model)} if isinstance(model, Bert) else {}
    save_file(state, path, {"arch": found.arch, "pymm": __version__, "format": "pt", **facts})
