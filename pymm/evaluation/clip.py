"""What a CLIP model knows about the concepts of a data set, those it was trained on and those it was not."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pymm.data import Batch, ImageTextLoader, Tokenizer
from pymm.evaluation.encoding import Template, class_embeddings, encode_images
from pymm.evaluation.retrieval import ranks, recalls


def evaluate_clip(
    model: nn.Module,
    tokenizer: Tokenizer,
    batches: ImageTextLoader | Iterable[Batch],
    *,
    unseen: Collection[str] = (),
    templates: Template | Sequence[Template] = "{object}",
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, Any]:
    """Name images among all captions, apart for concepts seen and unseen in training.

    A concept is an id of the batches, its caption the first that comes with it; so batches should come with
    plain captions (`caption_mode="name"`) and every sample once (`drop_last=False`).

    Args:
        model: has `encode_image` and `encode_text`; its modules keep their training mode.
        tokenizer: the one that the model was trained with.
        batches: a loader, of which epoch 0 is taken, or the batches themselves.
        unseen: keys of the concepts that training left out.
        templates: prompts around the captions, see `pymm.evaluation.class_embeddings`.
        ks: places.

    Returns:
        `seen_concepts`: images of seen concepts among all captions. `unseen_concepts`: images of unseen
        concepts among the unseen captions, and `unseen_concepts_among_all`. Each holds `r1`, `r5` ... from
        image to text, `chance_r1` ... beside them, `queries`, `candidates`, and the same the other way in
        `text_to_image`. A part without images is left out.

    Raises:
        ValueError: when there is no batch, the loader would leave samples out, or a feature is not finite.
    """
    if isinstance(batches, ImageTextLoader):
        if batches.drop_last:
            raise ValueError("evaluate_clip: batches must be a loader with drop_last=False, got True")
        batches = batches.epoch(0)
    images = encode_images(model, batches)
    concepts: dict[int, tuple[str, bool]] = {}
    for id_, key, caption in zip(images.ids.tolist(), images.keys, images.captions, strict=True):
        concepts.setdefault(id_, (caption, key in unseen))
    ids = torch.tensor(list(concepts), dtype=torch.int64)
    texts = class_embeddings(model, tokenizer, [caption for caption, _ in concepts.values()], templates)
    new = torch.tensor([is_new for _, is_new in concepts.values()])
    image_new = torch.isin(images.ids, ids[new])
    every = torch.ones_like(new), torch.ones_like(image_new)

    def part(asked: tuple[Tensor, Tensor], among: tuple[Tensor, Tensor]) -> dict[str, Any]:
        """Recalls where `asked` are the texts and images that ask, `among` those that are chosen from."""
        text, image = (texts, ids), (images.features, images.ids)
        there = _recall(image, asked[1], text, among[0], ks)
        return there | {"text_to_image": _recall(text, asked[0], image, among[1], ks)}

    result = {}
    if not image_new.all():
        result["seen_concepts"] = part((~new, ~image_new), every)
    if image_new.any():
        result["unseen_concepts"] = part((new, image_new), (new, image_new))
        result["unseen_concepts_among_all"] = part((new, image_new), every)
    return result


def _recall(
    queries: tuple[Tensor, Tensor],
    asked: Tensor,
    candidates: tuple[Tensor, Tensor],
    among: Tensor,
    ks: Sequence[int],
) -> dict[str, Any]:
    (x, x_ids), (y, y_ids) = (t[asked] for t in queries), (t[among] for t in candidates)
    return recalls(ranks(x, y, x_ids, y_ids, max(ks)), x_ids, y_ids, ks)
