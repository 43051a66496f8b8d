"""Recall at k, both ways, with several right answers per query and with ties counted against the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pymm.evaluation.encoding import check_finite
from pymm.ops import cosine_topk

TIE = 1e-6  # equal rows may differ by rounding in different tiles; closer scores than this are equal


def ranks(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, k: int) -> Tensor:
    """The place of the best right candidate of every query, by cosine similarity.

    A candidate is right when its id is the query's. The place is one plus the number of wrong candidates that
    score at least as high: a model that gives everything the same score gets the last place and not the
        first.

    Args:
        queries: `(N, E)`.
        candidates: `(M, E)`.
        query_ids: `(N,)` int64; every one of them must be among the candidates'.
        candidate_ids: `(M,)` int64.
        k: places that matter, > 0.

    Returns:
        `(N,)` int64 from 1 to k + 1; k + 1 stands for every place beyond k.

    Raises:
        ValueError: when shapes do not fit, a query has no right candidate, or something is not finite.

    Numerics: features are compared in float32; scores closer than 1e-6 count as equal. No N×M matrix is
    built.
    """
    n, m = len(queries), len(candidates)
    if queries.ndim != 2 or candidates.ndim != 2 or queries.shape[1] != candidates.shape[1]:
        shapes = f"{tuple(queries.shape)} and {tuple(candidates.shape)}"
        raise ValueError(f"ranks: queries and candidates must be (N, E) and (M, E), got {shapes}")
    if tuple(query_ids.shape) != (n,) or tuple(candidate_ids.shape) != (m,):
        shapes = f"{tuple(query_ids.shape)} and {tuple(candidate_ids.shape)}"
        raise ValueError(f"ranks: ids must be ({n},) and ({m},), got {shapes}")
    if k < 1:
        raise ValueError(f"ranks: k must be positive, got {k}")
    check_finite("ranks", "queries", queries)
    check_finite("ranks", "candidates", candidates)
    lonely = ~torch.isin(query_ids, candidate_ids)
    if lonely.any():
        row = int(lonely.nonzero()[0])
        raise ValueError(f"ranks: query_ids[{row}] must be among candidate_ids, got {query_ids[row]}")
    if n == 0:
        return torch.zeros(0, dtype=torch.int64)
    # At most P of the best k + P are right, so k wrong ones are among them if that many reach the right one.
    most = int(candidate_ids.unique(return_counts=True)[1].max())
    with torch.no_grad(), torch.autocast(queries.device.type, enabled=False):  # bfloat16 scores would tie
        values, indices = cosine_topk(queries.float(), candidates.float(), min(k + most, m))
    check_finite("ranks", "scores", values)
    right = candidate_ids[indices] == query_ids[:, None]
    best = values.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
    wrong = (~right & (values >= best - TIE)).sum(1)
    return torch.where(right.any(1), 1 + wrong, k + 1).clamp_max(k + 1)


def recalls(ranks: Tensor, query_ids: Tensor, candidate_ids: Tensor, ks: Sequence[int]) -> dict[str, Any]:
    """Shares of queries with a right answer in the first k places, and what chance would give.

    Returns:
        `r1`, `r5` ... for every k, `chance_r1` ... beside them, `queries` and `candidates`.
    """
    found: dict[str, Any] = {f"r{k}": float((ranks <= k).double().mean()) for k in ks}
    ids, counts = candidate_ids.unique(return_counts=True)
    rights = counts[torch.searchsorted(ids, query_ids)]
    chances = {f"chance_r{k}": float(_chance(rights, len(candidate_ids), k).mean()) for k in ks}
    return found | chances | {"queries": len(query_ids), "candidates": len(candidate_ids)}


def _chance(rights: Tensor, m: int, k: int) -> Tensor:
    """Probability that a random order of m candidates has one of the right ones in its first k places."""
    wrong, miss = m - rights.double(), torch.ones(len(rights), dtype=torch.float64)
    for place in range(min(k, m)):
        miss *= ((wrong - place) / (m - place)).clamp_min(0)
    return 1 - miss


def retrieval(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None = None,
    text_ids: Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[str, Any]]:
    """Recall at k from images to texts and from texts to images.

    Args:
        image_features: `(N, E)`.
        text_features: `(M, E)`.
        image_ids, text_ids: `(N,)` and `(M,)` int64; equal ids belong together, any number on either side. By
            default row i belongs to row i. A query with no partner on the other side is not asked.
        ks: places.

    Returns:
        `{"image_to_text": {"r1": ..., "chance_r1": ..., "queries": ..., "candidates": ...},
        "text_to_image": ...}`

    Raises:
        ValueError: when shapes do not fit, nothing belongs together, or a feature is not finite.
    """
    if image_ids is None or text_ids is None:
        if image_ids is not None or text_ids is not None or len(image_features) != len(text_features):
            raise ValueError("retrieval: ids must be given on both sides, or on none and rows be as many")
        image_ids = text_ids = torch.arange(len(image_features))
    check_finite("retrieval", "image_features", image_features)
    check_finite("retrieval", "text_features", text_features)
    return {
        "image_to_text": _one_way(image_features, text_features, image_ids, text_ids, ks),
        "text_to_image": _one_way(text_features, image_features, text_ids, image_ids, ks),
    }


def _one_way(
    queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor, ks: Sequence[int]
) -> dict[str, Any]:
    asked = torch.isin(query_ids, candidate_ids)
    if not asked.any():
        raise ValueError("retrieval: ids must have at least one in common, got none")
    queries, query_ids = queries[asked], query_ids[asked]
    return recalls(
        ranks(queries, candidates, query_ids, candidate_ids, max(ks)), query_ids, candidate_ids, ks
    )
