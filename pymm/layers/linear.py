"""A linear layer over the op of the same name."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymm.ops import linear
from pymm.ops.linear import Activation


class Linear(nn.Module):
    r"""`activation(x Wᵀ + b) + residual`, with activation and residual in the product's epilogue.

    It holds the `weight` and `bias` of `torch.nn.Linear`, but is no subclass: a tool that rewrites every
    `nn.Linear` would drop the epilogue without a word.

    Args:
        in_features: size of the last dimension of the input.
        out_features: size of the last dimension of the result.
        bias: whether there is a `bias`.
        activation: `None`, `"gelu"`, `"gelu_tanh"`, `"quick_gelu"`, `"relu"` or `"silu"`.
    """

    bias: nn.Parameter | None

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, activation: Activation | None = None
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.activation = in_features, out_features, activation
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The initialisation of `torch.nn.Linear`: uniform within ±1/√in_features."""
        bound = 1 / math.sqrt(self.in_features)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x (..., in_features)`, `residual` of the result's shape -> `(..., out_features)`."""
        return linear(x, self.weight, self.bias, self.activation, residual)

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, "
            f"activation={self.activation!r}"
        )
