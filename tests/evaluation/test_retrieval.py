"""Recalls against a search through all pairs, with exact ties and several right answers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pymm.evaluation import ranks, recalls, retrieval

# Directions whose cosines are exact in float32, so that equal scores are equal to the bit.
AXES = torch.cat((torch.eye(4), -torch.eye(4), torch.full((1, 4), 0.5), torch.zeros(1, 4)))


def oracle(x: Tensor, y: Tensor, x_ids: Tensor, y_ids: Tensor, k: int) -> list[int]:
    """The definition: one more than the wrong candidates that are at least as good as the best right one."""
    scores = F.normalize(x.double(), dim=-1) @ F.normalize(y.double(), dim=-1).T
    places = []
    for row, id_ in zip(scores, x_ids, strict=True):
        right = y_ids == id_
        best = row[right].max()
        places.append(min(k + 1, 1 + sum(bool(s >= best - 1e-6) for s in row[~right])))
    return places


def problem(seed: int, n: int, m: int, concepts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)

    def rows(count: int) -> Tensor:
        picked = AXES[torch.randint(0, len(AXES), (count,), generator=rng)]
        return picked * 2.0 ** torch.randint(-3, 4, (count, 1), generator=rng)

    y_ids = torch.randint(0, concepts, (m,), generator=rng)
    x_ids = y_ids[torch.randint(0, m, (n,), generator=rng)]
    return rows(n), rows(m), x_ids, y_ids


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 25), st.integers(1, 25), st.integers(1, 12))
def test_ranks_with_ties_are_the_definition_s(seed: int, n: int, m: int, concepts: int, k: int) -> None:
    data = problem(seed, n, m, concepts)
    assert ranks(*data, k).tolist() == oracle(*data, k)


def test_ranks_of_ordinary_features_are_the_definition_s() -> None:
    x, y = torch.randn(80, 16), torch.randn(300, 16)
    y_ids = torch.arange(300) % 90
    x_ids = torch.arange(80)
    for k in (1, 5, 10, 400):
        assert ranks(x, y, x_ids, y_ids, k).tolist() == oracle(x, y, x_ids, y_ids, k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_collapsed_model_gets_nothing(dtype: torch.dtype) -> None:
    """Everything in one direction: torch's order would give the first candidate, chance the mean; here 0."""
    direction = torch.randn(1, 37)
    x = (direction * torch.rand(200, 1).add(0.1)).to(dtype)
    found = retrieval(direction.expand(200, 37).to(dtype), direction.expand(200, 37).to(dtype))
    assert found["image_to_text"]["r1"] == found["image_to_text"]["r10"] == 0
    if dtype != torch.bfloat16:  # rounding gives bfloat16 rows directions of their own
        assert retrieval(x, x.flip(0))["text_to_image"]["r10"] == 0


def test_ties_beyond_the_list_count_too() -> None:
    """One right candidate ties with thirty wrong ones, and torch's order puts it first."""
    x = torch.tensor([[1.0, 0.0]])
    y = x.repeat(31, 1)
    assert ranks(x, y, torch.tensor([0]), torch.arange(31), 10).item() == 11
    assert ranks(x, y, torch.tensor([0]), torch.zeros(31, dtype=torch.int64), 10).item() == 1
    half = (torch.arange(31) >= 12).long()  # twelve right ones, nineteen wrong ones, all the same
    assert ranks(x, y, torch.tensor([0]), half, 10).item() == 11


def test_a_perfect_model_gets_everything() -> None:
    x = torch.randn(50, 64)
    found = retrieval(x, x * torch.rand(50, 1).add(0.1))
    for way in found.values():
        assert way["r1"] == way["r5"] == way["r10"] == 1
        assert (way["queries"], way["candidates"]) == (50, 50)
        assert way["chance_r5"] == pytest.approx(0.1)


def test_several_right_answers_either_way() -> None:
    images = torch.tensor([[1.0, 0.1], [0.0, 1.0], [1.0, 0.0], [-1.0, 0.0]])
    texts = torch.tensor([[1.0, 0.05], [0.1, 1.0], [0.0, -1.0]])
    found = retrieval(images, texts, torch.tensor([0, 1, 0, 9]), torch.tensor([0, 1, 7]), ks=(1, 2))
    assert found["image_to_text"] == {
        "r1": 1.0,
        "r2": 1.0,
        "chance_r1": pytest.approx(1 / 3),
        "chance_r2": pytest.approx(2 / 3),
        "queries": 3,  # image 9 has no text
        "candidates": 3,
    }
    assert found["text_to_image"]["queries"] == 2
    assert found["text_to_image"]["candidates"] == 4


def test_chance_is_the_mean_over_all_orders() -> None:
    candidate_ids = torch.tensor([0, 0, 1, 2, 2, 2, 3])
    query_ids = torch.tensor([0, 2, 3])
    found = recalls(torch.tensor([1, 2, 9]), query_ids, candidate_ids, (1, 2, 5, 7))
    assert (found["r1"], found["r2"], found["r5"]) == (
        pytest.approx(1 / 3),
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    )
    for k in (1, 2, 5, 7):
        miss = [math.comb(7 - p, k) / math.comb(7, k) for p in (2, 3, 1)]
        assert found[f"chance_r{k}"] == pytest.approx(1 - sum(miss) / 3)


def test_scores_do_not_lose_precision_under_autocast() -> None:
    x, y = torch.randn(64, 32), torch.randn(64, 32)
    plain = ranks(x, y, torch.arange(64), torch.arange(64), 64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ranks(x, y, torch.arange(64), torch.arange(64), 64), plain)
    x.requires_grad_()
    assert not ranks(x, y, torch.arange(64), torch.arange(64), 5).requires_grad


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_named(bad: float) -> None:
    x, y = torch.randn(6, 4), torch.randn(6, 4)
    broken = x.clone()
    broken[3, 2] = bad
    with pytest.raises(
        ValueError,
        match=r"retrieval: image_features must be finite, got nan or inf in 1 of 6 rows, first in row 3",
    ):
        retrieval(broken, y)
    with pytest.raises(ValueError, match="retrieval: text_features must be finite"):
        retrieval(x, broken)


def test_wrong_arguments_are_named() -> None:
    x, ids = torch.randn(4, 3), torch.arange(4)
    with pytest.raises(ValueError, match=r"queries and candidates must be \(N, E\) and \(M, E\)"):
        ranks(x, torch.randn(4, 2), ids, ids, 1)
    with pytest.raises(ValueError, match=r"ids must be \(4,\) and \(4,\), got \(3,\) and \(4,\)"):
        ranks(x, x, ids[:3], ids, 1)
    with pytest.raises(ValueError, match=r"query_ids\[2\] must be among candidate_ids, got 2"):
        ranks(x, x, ids, torch.tensor([0, 1, 5, 3]), 1)
    with pytest.raises(ValueError, match="k must be positive"):
        ranks(x, x, ids, ids, 0)
    with pytest.raises(ValueError, match="ids must be given on both sides"):
        retrieval(x, x, ids)
    with pytest.raises(ValueError, match="ids must be given on both sides"):
        retrieval(x, x[:3])
    with pytest.raises(ValueError, match="ids must have at least one in common"):
        retrieval(x, x, ids, ids + 10)
    assert ranks(x[:0], x, ids[:0], ids, 3).shape == (0,)
