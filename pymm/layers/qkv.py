"""The fused projection to queries, keys and values, without a bias of the keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pymm.ops import linear


class QKV(nn.Module):
    """`x Wᵀ + [b_q, 0, b_v]`: a bias of the keys would add the same to all scores of a query.

    Args:
        width: of the input, C; the result has 3C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width)
        self.weight = nn.Parameter(torch.empty(3 * width, width).uniform_(-bound, bound))
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """`x (..., C)` -> `(..., 3C)`."""
        bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        return linear(x, self.weight, bias)
