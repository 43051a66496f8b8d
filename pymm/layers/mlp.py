"""The feed-forward half of a transformer block."""

from __future__ import annotations

from torch import Tensor, nn

from pymm.layers.linear import Linear
from pymm.ops.linear import Activation


class MLP(nn.Module):
    r"""`W₂ activation(W₁ x + b₁) + b₂ + residual` (Vaswani et al. 2017, arXiv:1706.03762, eq. 2).

    Args:
        width: of the input and the result.
        hidden: between the two layers.
        activation: as `pymm.layers.Linear` takes it.
    """

    def __init__(self, width: int, hidden: int, activation: Activation = "gelu") -> None:
        super().__init__()
        self.fc1 = Linear(width, hidden, activation=activation)
        self.fc2 = Linear(hidden, width)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x (..., width)` -> `(..., width)`."""
        return self.fc2(self.fc1(x), residual)
