from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.objectives import ContrastiveObjective
from pymm.objectives.contrastive import Mining


def features(n: int = 7, e: int = 5) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    make = lambda: torch.randn(n, e, generator=g, dtype=torch.float64, requires_grad=True)  # noqa: E731
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-3.0, dtype=torch.float64, requires_grad=True)
    return make(), make(), scale, bias


IDS = torch.tensor([3, 1, 3, 2, 3, 9, 1])


def dense_logits(outputs: tuple[Tensor, ...]) -> Tensor:
    x, y, scale, _ = outputs
    return scale * F.normalize(x, dim=-1) @ F.normalize(y, dim=-1).T


@pytest.mark.parametrize("use_ids", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_infonce_is_the_dense_formula(use_ids: bool, label_smoothing: float) -> None:
    outputs = features()
    loss = ContrastiveObjective("infonce", label_smoothing, use_ids)(outputs[:3], IDS)
    logits = dense_logits(outputs)
    positive = (IDS[:, None] == IDS if use_ids else torch.eye(7, dtype=torch.bool)).double()
    target = positive / positive.sum(1, keepdim=True)
    target = (1 - label_smoothing) * target + label_smoothing / 7
    expected = (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
    compare(loss, expected, outputs[:3])


@pytest.mark.parametrize("use_ids", [True, False])
def test_sigmoid_is_the_dense_formula(use_ids: bool) -> None:
    outputs = features()
    loss = ContrastiveObjective("sigmoid", use_ids=use_ids)(outputs, IDS)
    logits = dense_logits(outputs) + outputs[3]
    positive = IDS[:, None] == IDS if use_ids else torch.eye(7, dtype=torch.bool)
    expected = -F.logsigmoid(torch.where(positive, logits, -logits)).sum() / 7
    compare(loss, expected, outputs)


@pytest.mark.parametrize("use_ids", [True, False])
@pytest.mark.parametrize("mining", ["hard", "semi-hard", "all"])
def test_triplet_is_the_hinge_over_mined_triplets(use_ids: bool, mining: Mining) -> None:
    """By loops over anchors, positives and negatives, both ways."""
    outputs = features()
    objective = ContrastiveObjective("triplet", use_ids=use_ids, margin=0.5, mining=mining)
    cosines = dense_logits(outputs) / outputs[2]
    same = IDS[:, None] == IDS if use_ids else torch.eye(7, dtype=torch.bool)
    hinges = []
    for s in (cosines, cosines.T):
        for a in range(7):
            positives, negatives = s[a][same[a]], s[a][~same[a]]
            if mining == "hard":
                hinges.append((0.5 + negatives.max() - positives.min()).clamp_min(0))
                continue
            for p in positives:
                z = 0.5 + negatives - p
                if mining == "all":
                    hinges += list(z[z > 0])
                elif len(near := z[(z > 0) & (z < 0.5)]):
                    hinges.append(near.max())
    loss, expected = objective(outputs, IDS), torch.stack(hinges).mean()
    compare(loss, expected, outputs[:2])
    assert expected > 0
    assert objective(outputs[:3], IDS) == loss


def compare(loss: Tensor, expected: Tensor, leaves: tuple[Tensor, ...]) -> None:
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for got, wanted in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-8, atol=1e-8)


def test_without_ids_a_pair_is_alone() -> None:
    outputs = features()
    for kind in ("infonce", "sigmoid"):
        objective = ContrastiveObjective(kind)  # type: ignore[arg-type]
        torch.testing.assert_close(objective(outputs), objective(outputs, torch.arange(7)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ContrastiveObjective("cosine"),
            "kind must be one of infonce, sigmoid, triplet, got 'cosine'",
        ),
        (lambda: ContrastiveObjective(label_smoothing=1.5), r"label_smoothing must be in \[0, 1\], got 1.5"),
        (lambda: ContrastiveObjective("sigmoid", 0.1), "label_smoothing must be 0 for 'sigmoid'"),
        (lambda: ContrastiveObjective("triplet", 0.1), "label_smoothing must be 0 for 'triplet'"),
        (lambda: ContrastiveObjective("triplet", margin=0), "margin must be positive, got 0"),
        (lambda: ContrastiveObjective(mining="easy"), "mining must be one of hard, semi-hard, all, got"),
        (lambda: ContrastiveObjective()(features()[:2]), "outputs must be"),
        (lambda: ContrastiveObjective("sigmoid")(features()[:3]), "outputs must hold a logit bias"),
        (lambda: ContrastiveObjective("sigmoid")(features(), IDS[:3]), r"ids must be \(7,\), got \(3,\)"),
        (lambda: ContrastiveObjective()(features()[:3], IDS[:3]), "ids"),
    ],
)
def test_errors_name_the_argument(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]
