"""Zero-shot classification: the class whose prompts lie nearest."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymm.data import Batch, Tokenizer
from pymm.evaluation.encoding import Template, check_finite, class_embeddings, evaluating, features_of
from pymm.evaluation.retrieval import ranks, recalls


def zero_shot(
    model: nn.Module,
    tokenizer: Tokenizer,
    names: Sequence[str],
    templates: Template | Sequence[Template],
    batches: Iterable[Batch | tuple[Tensor, Tensor]],
    class_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Classify images by the cosine similarity to each class's prompts (Radford et al. 2021,
    arXiv:2103.00020).

    Args:
        model: has `encode_image` and `encode_text`.
        tokenizer: the one that the model was trained with.
        names: the classes, C of them.
        templates: see `pymm.evaluation.class_embeddings`; several make an ensemble.
        batches: pairs of pixels `(B, 3, H, W)` and labels `(B,)`, int64 in [0, C); or `Batch`es.
        class_ids: `(C,)` the `Batch.ids` of the classes; needed for `Batch`es only.

    Returns:
        `top1` and `top5`, shares of images whose class comes first or among the first five (a wrong class
        with the same score comes before the right one), `chance_top1`, `chance_top5`, `images` and
        `classes`.

    Raises:
        ValueError: when there is no image, a label is no class, or a feature is not finite.
    """
    classes = class_embeddings(model, tokenizer, names, templates)
    labels = torch.arange(len(names)) if class_ids is None else class_ids
    if tuple(labels.shape) != (len(names),) or len(labels.unique()) != len(names):
        raise ValueError(f"zero_shot: class_ids must be {len(names)} different ids, got {labels.tolist()}")
    places, truths = [], []
    with evaluating(model):
        for batch in batches:
            if isinstance(batch, Batch) and class_ids is None:
                raise ValueError("zero_shot: class_ids must be given with batches of ids, got None")
            pixels, truth = (batch.pixels, batch.ids) if isinstance(batch, Batch) else batch
            features, truth = features_of(model, "encode_image", pixels), truth.cpu()
            check_finite("zero_shot", "image features", features)
            places.append(ranks(features, classes, truth, labels, 5))
            truths.append(truth)
    if not places:
        raise ValueError("zero_shot: batches must hold at least one batch, got none")
    found = recalls(torch.cat(places), torch.cat(truths), labels, (1, 5))
    return {
        "top1": found["r1"],
        "top5": found["r5"],
        "chance_top1": found["chance_r1"],
        "chance_top5": found["chance_r5"],
        "images": found["queries"],
        "classes": found["candidates"],
    }
