"""How well a classifier, or the features of a model, name pictures."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.data import LabelledBatch, PictureLoader, PictureStream
from pymm.evaluation.encoding import check_finite, evaluating
from pymm.ops import cosine_topk

Batches = PictureLoader | PictureStream | Iterable[LabelledBatch]


def evaluate_classifier(model: nn.Module, batches: Batches, classes: Sequence[str]) -> dict[str, Any]:
    """What `classification_scores` says of a model's logits.

    Args:
        model: pixels to `(B, K)`; its modules keep their training mode.
        batches: a loader, of which epoch 0 is taken, or the batches themselves.
        classes: K names.

    Raises:
        ValueError: when there is no batch, or a logit is not finite.
    """
    logits, labels = predict(model, batches)
    return classification_scores(logits, labels, classes)


def predict(model: nn.Module, batches: Batches) -> tuple[Tensor, Tensor]:
    """Logits `(N, K)`, float32, and labels `(N,)` of all batches, on the CPU.

    Raises:
        ValueError: as `evaluate_classifier`.
    """
    return _outputs("predict", model, batches, lambda pixels: model(pixels))


def extract_features(model: Any, batches: Batches) -> tuple[Tensor, Tensor]:
    """What the head of an image model would take, `(N, F)`, float32, and labels `(N,)`, on the CPU.

    Args:
        model: has `forward_features` and `forward_head(x, pre_logits=True)`, as timm's; its modules keep
            their training mode.
        batches: a loader, of which epoch 0 is taken, or the batches themselves.

    Raises:
        ValueError: when there is no batch, or a feature is not finite.
    """

    def forward(pixels: Tensor) -> Tensor:
        features: Tensor = model.forward_head(model.forward_features(pixels), pre_logits=True)
        return features

    return _outputs("extract_features", model, batches, forward)


def _outputs(where: str, model: nn.Module, batches: Batches, forward: Any) -> tuple[Tensor, Tensor]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    outputs, labels = [], []
    with evaluating(model):
        for batch in batches.epoch(0) if isinstance(batches, PictureLoader | PictureStream) else batches:
            outputs.append(forward(batch.pixels.to(device)).float().cpu())
            labels.append(batch.ids.cpu())
    if not outputs:
        raise ValueError(f"{where}: batches must hold at least one batch, got none")
    found = torch.cat(outputs)
    check_finite(where, "outputs", found)
    return found, torch.cat(labels)


def classification_scores(logits: Tensor, labels: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Accuracies of scores of classes.

    Args:
        logits: `(N, K)`, N > 0; the largest is the answer. A wrong class with the score of the right one
            comes before it.
        labels: `(N,)` int64 in [0, K).
        classes: K names.

    Returns:
        `top1` and `top5`, shares of pictures whose class comes first or among the first five;
        `mean_class_accuracy`, the mean of the classes' own top1; `largest_class`, what naming the most
        frequent class would get; `pictures`; `per_class`, by name `accuracy` and `pictures` of each class
        that occurs.

    Raises:
        ValueError: when shapes or labels do not fit.
    """
    n, k = len(labels), len(classes)
    if n == 0 or tuple(logits.shape) != (n, k):
        raise ValueError(
            f"classification_scores: logits must be (N, {k}) and N = {n} > 0, got {tuple(logits.shape)}"
        )
    if labels.min() < 0 or labels.max() >= k:
        got = f"{labels.min().item()} to {labels.max().item()}"
        raise ValueError(f"classification_scores: labels must be in [0, {k}), got {got}")
    place = (logits >= logits.gather(1, labels[:, None])).sum(1)
    right = (place == 1).double()
    counts = torch.bincount(labels, minlength=k)
    hits = torch.zeros(k, dtype=torch.float64).index_add_(0, labels, right)
    per_class = {
        name: {"accuracy": (hits[i] / counts[i]).item(), "pictures": int(counts[i])}
        for i, name in enumerate(classes)
        if counts[i]
    }
    return {
        "top1": right.mean().item(),
        "top5": (place <= 5).double().mean().item(),
        "mean_class_accuracy": sum(one["accuracy"] for one in per_class.values()) / len(per_class),
        "largest_class": counts.max().item() / n,
        "pictures": n,
        "per_class": per_class,
    }


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """`(K, K)` int64: how many pictures of class i were named j."""
    k = logits.shape[1]
    return torch.bincount(labels * k + logits.argmax(1), minlength=k * k).view(k, k)


def confusion_picture(path: Path | str, matrix: Tensor, classes: Sequence[str], title: str) -> None:
    """Draw a confusion matrix, each row as shares of its class. Needs matplotlib.

    Args:
        path: of the PNG to write.
        matrix: of `confusion_matrix`.
        classes: the names; they stand beside the picture when they are at most 40.
        title: above it.

    Raises:
        ImportError: when matplotlib is not installed.
    """
    from pymm.evaluation.pictures import GREY, INK, new_figure

    k = len(classes)
    named = k <= 40
    side = 3 + 0.32 * k if named else 9.0
    figure, axes = new_figure(side + 1, side)
    shares = matrix / matrix.sum(1, keepdim=True).clamp_min(1)
    axes.imshow(shares.numpy(), cmap="Greens", vmin=0, vmax=1)
    if named:
        axes.set_xticks(range(k), classes, rotation=60, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(k), classes)
    if k <= 20:
        for i, j in matrix.nonzero().tolist():
            dark = shares[i, j] > 0.6
            axes.text(j, i, str(matrix[i, j].item()), ha="center", va="center", fontsize=8,
                      color="white" if dark else INK)  # fmt: skip
    axes.set_title(title, loc="left", color=INK, fontsize=13, pad=12)
    axes.set_xlabel("named", color=GREY)
    axes.set_ylabel("is", color=GREY)
    axes.tick_params(colors=INK, length=0)
    for edge in axes.spines.values():
        edge.set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def knn_scores(
    train: tuple[Tensor, Tensor],
    features: Tensor,
    num_classes: int,
    *,
    k: int = 20,
    temperature: float = 0.07,
) -> Tensor:
    r"""Scores of classes by the nearest neighbours.

    .. math:: s_c = \sum_{i \in N_k} [y_i = c] \, \exp(\cos(x, x_i) / \tau)

    over the k nearest (Wu et al. 2018, arXiv:1805.01978, sec. 3.4).

    Args:
        train: features `(M, F)` and labels `(M,)`.
        features: `(N, F)`.
        num_classes: K.
        k: neighbours; all of them where there are fewer.
        temperature: τ > 0.

    Returns:
        `(N, K)`.

    Raises:
        ValueError: when k or the temperature is not positive, or a feature is not finite.
    """
    if k < 1 or temperature <= 0:
        raise ValueError(f"knn_scores: k and temperature must be positive, got {k} and {temperature}")
    known, labels = train
    check_finite("knn_scores", "train features", known)
    check_finite("knn_scores", "features", features)
    with torch.no_grad():
        cosines, nearest = cosine_topk(features.float(), known.float(), min(k, len(known)))
    votes = (cosines / temperature).exp()
    return torch.zeros(len(features), num_classes).scatter_add_(1, labels[nearest], votes)


def ridge_scores(
    train: tuple[Tensor, Tensor], features: Tensor, num_classes: int, *, penalty: float = 1e-3
) -> Tensor:
    r"""Scores of classes by least squares on the classes' indicators, in closed form.

    .. math:: W = (\tilde X^\top \tilde X / M + \lambda I)^{-1} \tilde X^\top \tilde Y / M

    of standardized features and centred indicators, in float64.

    Args:
        train: features `(M, F)` and labels `(M,)`.
        features: `(N, F)`.
        num_classes: K.
        penalty: λ > 0.

    Returns:
        `(N, K)` float64.

    Raises:
        ValueError: when the penalty is not positive, or a feature is not finite.
    """
    if penalty <= 0:
        raise ValueError(f"ridge_scores: penalty must be positive, got {penalty}")
    x, asked = _standardized(train[0], features)
    y = F.one_hot(train[1], num_classes).double()
    mean = y.mean(0)
    gram = x.mT @ x / len(x) + penalty * torch.eye(x.shape[1], dtype=x.dtype)
    return asked @ torch.linalg.solve(gram, x.mT @ (y - mean) / len(x)) + mean


def logistic_scores(
    train: tuple[Tensor, Tensor], features: Tensor, num_classes: int, *, c: float = 1.0
) -> Tensor:
    """Scores of classes by scikit-learn's multinomial `LogisticRegression` on standardized features.

    Args:
        train: features `(M, F)` and labels `(M,)`, at least two of them different.
        features: `(N, F)`.
        num_classes: K.
        c: the inverse of the penalty, > 0.

    Returns:
        `(N, K)` log-probabilities, float64; minus infinity for a class that `train` does not hold.

    Raises:
        ValueError: when `c` is not positive, or a feature is not finite.
        ImportError: when scikit-learn is not installed.
    """
    if c <= 0:
        raise ValueError(f"logistic_scores: c must be positive, got {c}")
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError("a logistic probe needs scikit-learn: pip install 'pymm[data]'") from error
    x, asked = _standardized(train[0], features)
    probe = LogisticRegression(C=c, max_iter=1000).fit(x.numpy(), train[1].numpy())
    scores = torch.full((len(features), num_classes), -torch.inf, dtype=torch.float64)
    scores[:, torch.from_numpy(probe.classes_)] = torch.from_numpy(probe.predict_log_proba(asked.numpy()))
    return scores


def _standardized(train: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
    check_finite("probe", "train features", train)
    check_finite("probe", "features", features)
    train = train.double()
    mean, spread = train.mean(0), train.std(0, unbiased=False)
    spread = torch.where(spread > 1e-6, spread, 1.0)
    return (train - mean) / spread, (features.double() - mean) / spread
