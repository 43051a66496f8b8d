"""What networks of feature maps have in common: pixels in, a head that can be replaced, timm's names."""

from __future__ import annotations

from torch import nn

from pymm.layers import Linear, Normalize


class MappedNetwork(nn.Module):
    """The part of timm's interface that does not depend on the layers between pixels and head.

    A subclass sets `normalize`, `head` and the sizes: `image_size`, `num_features`, channels of the last map,
    and `head_hidden_size`, what the classifier takes.
    """

    normalize: Normalize
    head: nn.Module
    image_size: int
    num_features: int
    head_hidden_size: int

    def __init__(self) -> None:
        super().__init__()
        self.grad_checkpointing = False

    @property
    def mean(self) -> tuple[float, ...]:
        return self.normalize.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.normalize.std

    @property
    def num_classes(self) -> int:
        """The size of the head's result; 0 without a head."""
        return int(getattr(self.head, "out_features", 0))  # nn.Identity() has none

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new linear one, or by none when `num_classes` is 0."""
        self.head = linear_head(self.head_hidden_size, num_classes).to(next(self.parameters()))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether activations inside the stages are computed again in the backward pass instead of kept."""
        self.grad_checkpointing = enable


def linear_head(width: int, num_classes: int) -> nn.Module:
    """A linear classifier as `torch.nn` starts it; nothing for 0 classes."""
    return Linear(width, num_classes) if num_classes else nn.Identity()
