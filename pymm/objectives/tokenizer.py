"""The objective of an image tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymm.ops._checks import fail, shape


@dataclass(frozen=True)
class TokenizerObjective:
    r"""Pixels come back, and vectors stay near their codes.

    (van den Oord et al. 2017, arXiv:1711.00937, eq. 3)

    .. math:: L_b = \mathrm{mean}((\hat{x} - x)^2) + \beta \, \mathrm{mean}_i \lVert z_i - e_{k_i} \rVert^2

    The codes follow by a moving average, so the equation's second term is not needed.

    Args:
        commitment: β, at least 0.
    """

    commitment: float = 0.25

    def __call__(self, decoded: Tensor, pixels: Tensor, distance: Tensor) -> Tensor:
        """The loss of each sample.

        Args:
            decoded, pixels: `(B, Cin, H, W)`, both normalized.
            distance: `(B,)`, the mean squared distance of a sample's vectors from their codes.

        Returns:
            `(B,)` of float32 at least.

        Raises:
            ValueError: when shapes do not fit.
        """
        if decoded.shape != pixels.shape:
            fail("TokenizerObjective", "decoded", shape(pixels), shape(decoded))
        acc = torch.promote_types(decoded.dtype, torch.float32)
        return (decoded.to(acc) - pixels.to(acc)).square().mean((1, 2, 3)) + self.commitment * distance
