"""Pooled regions to vectors, and vectors to classes and boxes."""

from __future__ import annotations

from torch import Tensor, nn

from pymm.layers import Linear


class BoxHead(nn.Module):
    """Pooled regions to a vector, and that to classes and moved boxes (Girshick 2015, arXiv:1504.08083).

    Args:
        inputs: numbers in a pooled region.
        width: of the vector.
        num_classes: the background, which is class 0, included.
    """

    def __init__(self, inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = Linear(inputs, width, activation="relu")
        self.fc2 = Linear(width, width, activation="relu")
        self.classes = Linear(width, num_classes)
        self.offsets = Linear(width, 4 * num_classes)

    @property
    def num_features(self) -> int:
        """The width of the vector."""
        return self.fc2.out_features

    def vectors(self, pooled: Tensor) -> Tensor:
        """`(K, C, 7, 7)` -> `(K, width)`."""
        return self.fc2(self.fc1(pooled.flatten(1)))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """`(K, width)` -> logits `(K, num_classes)` and offsets `(K, num_classes, 4)`."""
        return self.classes(vectors), self.offsets(vectors).unflatten(1, (-1, 4))


class StageHead(nn.Module):
    """The last stage of a residual network on each region, and the mean of its map: the vectors of bottom-up
    attention (Anderson et al. 2018, arXiv:1707.07998, sec. 3.1; He et al. 2016, arXiv:1512.03385, app. A).

    Args:
        stage: `(K, C, h, w)` to `(K, width, h', w')`.
        width: of the vector, 2048 in ResNet-50 and deeper.
        num_classes: the background, which is class 0, included.
    """

    def __init__(self, stage: nn.Module, width: int, num_classes: int) -> None:
        super().__init__()
        self.stage, self.num_features = stage, width
        self.classes = Linear(width, num_classes)
        self.offsets = Linear(width, 4 * num_classes)

    def vectors(self, pooled: Tensor) -> Tensor:
        """`(K, C, h, w)` -> `(K, width)`."""
        x: Tensor = self.stage(pooled)
        return x.mean((2, 3))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """`(K, width)` -> logits `(K, num_classes)` and offsets `(K, num_classes, 4)`."""
        return self.classes(vectors), self.offsets(vectors).unflatten(1, (-1, 4))
