from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pymm.data import LabelledBatch
from pymm.evaluation import (
    classification_scores,
    confusion_matrix,
    evaluate_classifier,
    extract_features,
    knn_scores,
    logistic_scores,
    ridge_scores,
)
from pymm.evaluation.classification import confusion_picture

NAMES = ["a", "b", "c"]


def test_scores_by_hand() -> None:
    logits = torch.tensor([[3.0, 2, 1], [3, 2, 1], [1, 3, 2], [1, 2, 3], [5, 5, 5]])
    labels = torch.tensor([0, 1, 1, 1, 0])
    scores = classification_scores(logits, labels, NAMES)
    assert scores["top1"] == pytest.approx(2 / 5)  # a tie is no success
    assert scores["top5"] == 1
    assert scores["largest_class"] == pytest.approx(3 / 5)
    assert scores["mean_class_accuracy"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert scores["per_class"] == {
        "a": {"accuracy": 0.5, "pictures": 2},
        "b": {"accuracy": pytest.approx(1 / 3), "pictures": 3},
    }
    assert confusion_matrix(logits, labels).tolist() == [[2, 0, 0], [1, 1, 1], [0, 0, 0]]


def test_top5_among_many() -> None:
    logits = torch.arange(10.0).repeat(10, 1)
    scores = classification_scores(logits, torch.arange(10), [str(i) for i in range(10)])
    assert (scores["top1"], scores["top5"]) == (0.1, 0.5)


def test_wrong_inputs_are_named() -> None:
    with pytest.raises(ValueError, match=r"logits must be \(N, 3\) and N = 2 > 0, got \(2, 4\)"):
        classification_scores(torch.zeros(2, 4), torch.tensor([0, 1]), NAMES)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 3\), got 0 to 3"):
        classification_scores(torch.zeros(2, 3), torch.tensor([0, 3]), NAMES)
    with pytest.raises(ValueError, match="batches must hold at least one batch, got none"):
        evaluate_classifier(nn.Identity(), [], NAMES)
    known = (torch.rand(4, 2), torch.tensor([0, 1, 0, 1]))
    for call, message in (
        (lambda: knn_scores(known, torch.rand(1, 2), 2, k=0), "must be positive, got 0 and 0.07"),
        (lambda: ridge_scores(known, torch.rand(1, 2), 2, penalty=0), "penalty must be positive"),
        (lambda: logistic_scores(known, torch.rand(1, 2), 2, c=-1), "c must be positive"),
        (lambda: ridge_scores(known, torch.full((1, 2), torch.nan), 2), "features must be finite"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class Model(nn.Module):
    """Names the brightest channel, with a batch norm and dropout that must rest."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(3), nn.Dropout(0.9)

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.drop(self.norm(pixels.float()))

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        return x.mean((2, 3)) if pre_logits else 2 * x.mean((2, 3))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(pixels))


def test_a_model_is_left_as_it_was_and_judged_in_eval_mode() -> None:
    labels = torch.randint(3, (20,))
    pixels = 255 * torch.eye(3, dtype=torch.uint8)[labels][:, :, None, None].expand(-1, 3, 4, 4)
    batches = [LabelledBatch(pixels[i : i + 7], labels[i : i + 7]) for i in range(0, 20, 7)]
    model = Model().train()
    assert evaluate_classifier(model, batches, NAMES)["top1"] == 1
    features, found = extract_features(model, batches)
    assert torch.equal(found, labels)
    assert torch.equal(features.argmax(1), labels)
    assert model.norm.training
    assert model.norm.running_mean is not None
    assert model.norm.running_mean.abs().max() == 0


def clusters(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Three clouds around three directions, of very different scale per dimension."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (n,), generator=g)
    x = 3 * torch.eye(3, 8)[labels] + 0.5 * torch.randn(n, 8, generator=g)
    return x * torch.logspace(0, 0.5, 8), labels


@pytest.mark.parametrize("probe", [knn_scores, ridge_scores, logistic_scores])
def test_probes_find_separated_classes(probe: object) -> None:
    if probe is logistic_scores:
        pytest.importorskip("sklearn")
    train, (features, labels) = clusters(300, 0), clusters(200, 1)
    scores = classification_scores(probe(train, features, 3), labels, NAMES)  # type: ignore[operator]
    assert scores["top1"] > 0.97
    shuffled = (train[0], train[1][torch.randperm(300, generator=torch.Generator().manual_seed(0))])
    assert classification_scores(probe(shuffled, features, 3), labels, NAMES)["top1"] < 0.6  # type: ignore[operator]


def test_ridge_is_the_minimum() -> None:
    """The gradient of the penalized loss vanishes, by numbers of another way to the same end."""
    (x, y), penalty = clusters(50, 2), 0.1
    scores = ridge_scores((x, y), x, 3, penalty=penalty)
    z = (x.double() - x.double().mean(0)) / x.double().std(0, unbiased=False)
    target = torch.eye(3, dtype=torch.float64)[y]
    stacked = torch.cat((z, (50 * penalty) ** 0.5 * torch.eye(8, dtype=torch.float64)))
    centred = torch.cat((target - target.mean(0), torch.zeros(8, 3, dtype=torch.float64)))
    weights = torch.linalg.lstsq(stacked, centred).solution
    torch.testing.assert_close(scores, z @ weights + target.mean(0))


def test_nearest_neighbours_by_hand() -> None:
    train = (torch.tensor([[1.0, 0], [0, 1], [-1, 0]]), torch.tensor([0, 1, 1]))
    scores = knn_scores(train, torch.tensor([[2.0, 0]]), 2, k=2, temperature=0.5)
    torch.testing.assert_close(scores, torch.tensor([[torch.e**2, 1.0]]))
    assert knn_scores(train, torch.tensor([[2.0, 0]]), 2, k=9).shape == (1, 2)


def test_a_class_that_the_probe_never_saw() -> None:
    pytest.importorskip("sklearn")
    x, y = clusters(60, 3)
    scores = logistic_scores((x[y < 2], y[y < 2]), x, 3)
    assert (scores[:, 2] == -torch.inf).all()


@pytest.mark.parametrize("classes", [3, 30, 60])
def test_confusion_picture(classes: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    matrix = torch.eye(classes, dtype=torch.int64) * 3
    confusion_picture(tmp_path / "c.png", matrix, [f"class {i}" for i in range(classes)], "Confusion")
    with Image.open(tmp_path / "c.png") as picture:
        assert min(picture.size) > 300
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 10
