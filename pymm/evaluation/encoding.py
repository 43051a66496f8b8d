"""Features of images and texts, batch by batch, from a model that is left as it was found."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.data import Batch, Tokenizer

Template = str | Callable[[str], str]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module has the mode that it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def check_finite(where: str, name: str, values: Tensor, labels: Sequence[str] | None = None) -> None:
    """Require finite rows; the error counts the others and names the first.

    Raises:
        ValueError: naming `where` and `name`.
    """
    bad = ~values.isfinite().flatten(1).all(1)
    if bad.any():
        rows = bad.nonzero().flatten().tolist()
        first = f"row {rows[0]}" + (f" ({labels[rows[0]]})" if labels is not None else "")
        got = f"nan or inf in {len(rows)} of {len(bad)} rows, first in {first}"
        raise ValueError(f"{where}: {name} must be finite, got {got}")


class ImageFeatures(NamedTuple):
    """`features (N, E)` float32, `ids (N,)`, and the samples' keys and captions."""

    features: Tensor
    ids: Tensor
    keys: list[str]
    captions: list[str]


def encode_images(model: nn.Module, batches: Iterable[Batch]) -> ImageFeatures:
    """Features of every image of the batches, on the CPU, not normalized.

    Args:
        model: has `encode_image(pixels)`; pixels go to its device.
        batches: as `ImageTextLoader.epoch` gives them.

    Raises:
        ValueError: when there is no batch, or a feature is not finite.
    """
    features, ids, keys, captions = [], [], [], []
    with evaluating(model):
        for batch in batches:
            features.append(features_of(model, "encode_image", batch.pixels))
            ids.append(batch.ids)
            keys += batch.keys
            captions += batch.captions
    if not features:
        raise ValueError("encode_images: batches must hold at least one batch, got none")
    images = ImageFeatures(torch.cat(features), torch.cat(ids), keys, captions)
    check_finite("encode_images", "image features", images.features, keys)
    return images


def encode_texts(
    model: nn.Module, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int = 256
) -> Tensor:
    """Features `(N, E)` of every text, float32 on the CPU, not normalized.

    Args:
        model: has `encode_text(tokens)`, and `context_length` where rows must be that long.
        tokenizer: the one that the model was trained with.
        texts: at least one.
        batch_size: texts at a time.

    Raises:
        ValueError: when there is no text, a text yields no token, or a feature is not finite.
    """
    if not texts:
        raise ValueError("encode_texts: texts must hold at least one text, got none")
    length = getattr(model, "context_length", None)
    with evaluating(model):
        features = torch.cat(
            [
                features_of(model, "encode_text", tokenizer(texts[i : i + batch_size], length))
                for i in range(0, len(texts), batch_size)
            ]
        )
    check_finite("encode_texts", "text features", features, texts)
    return features


def class_embeddings(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Template | Sequence[Template],
    batch_size: int = 256,
) -> Tensor:
    """One unit vector per name: the mean of its prompts' unit vectors, scaled to length one again.

    The ensemble of Radford et al. 2021 (arXiv:2103.00020, section 3.1.4).

    Args:
        model, tokenizer: see `encode_texts`.
        names: the classes.
        templates: one or several; `{object}` or `{}` stands for the name, as in `"A photo of a {object}"`.
            Functions of the name will do too.

    Returns:
        `(len(names), E)` float32.
    """
    several = [templates] if isinstance(templates, str) or callable(templates) else list(templates)
    if not names:
        raise ValueError("class_embeddings: names must hold at least one name, got none")
    if not several:
        raise ValueError("class_embeddings: templates must hold at least one template, got none")
    prompts = [_prompt(template, name) for name in names for template in several]
    features = F.normalize(encode_texts(model, tokenizer, prompts, batch_size), dim=-1)
    return F.normalize(features.view(len(names), len(several), -1).mean(1), dim=-1)


def _prompt(template: Template, name: str) -> str:
    if not isinstance(template, str):
        return template(name)
    if "{object}" not in template and "{}" not in template:
        raise ValueError(f"class_embeddings: templates must hold {{object}} or {{}}, got {template!r}")
    return template.replace("{object}", name).replace("{}", name)


def features_of(model: nn.Module, method: str, inputs: Tensor) -> Tensor:
    """What a method of the model makes of a batch: float32, on the CPU."""
    device = next((p.device for p in model.parameters()), inputs.device)
    features: Any = getattr(model, method)(inputs.to(device))
    return features.float().cpu()
