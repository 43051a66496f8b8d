"""Objectives over hidden patches: their pixels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pymm.layers import to_patches
from pymm.ops._checks import fail, shape


@dataclass(frozen=True)
class MaskedPixels:
    r"""The squared error of the hidden patches' pixels (He et al. 2022, arXiv:2111.06377, sec. 3).

    .. math:: L_b = \frac{1}{|M_b|} \sum_{i \in M_b} \frac{1}{P} \, \lVert \hat{x}_i - t_i \rVert^2

    Args:
        normalize: compare with :math:`t_i = (x_i - \mathrm{mean}(x_i)) / \sqrt{\mathrm{var}(x_i) + 10^{-6}}`,
            each patch by itself (He et al., "reconstruction target"), instead of with the pixels.
    """

    normalize: bool = True

    def targets(self, pixels: Tensor, patch_size: int) -> Tensor:
        """What the patches of `pixels (B, Cin, H, W)` ought to be, `(B, N, p·p·Cin)` in float32 at least."""
        x = to_patches(pixels, patch_size)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not self.normalize:
            return x
        variance, mean = torch.var_mean(x, dim=-1, keepdim=True)
        return (x - mean) / (variance + 1e-6).sqrt()

    def __call__(self, predicted: Tensor, pixels: Tensor, mask: Tensor) -> Tensor:
        """The loss of each sample.

        Args:
            predicted: `(B, N, p·p·Cin)`, what the model says of every patch.
            pixels: `(B, Cin, H, W)`, normalized.
            mask: `(B, N)` bool, True = hidden, equally many in each row.

        Returns:
            `(B,)` of float32 at least.

        Raises:
            ValueError: when shapes do not fit or the rows hide unequal numbers of patches.
        """
        b, n, size = predicted.shape
        patch = round((size / pixels.shape[1]) ** 0.5)
        if n * size * b != pixels.numel() or patch * patch * pixels.shape[1] != size:
            fail("MaskedPixels", "predicted", f"the patches of pixels {shape(pixels)}", shape(predicted))
        if mask.shape != (b, n) or mask.dtype != torch.bool:
            fail("MaskedPixels", "mask", f"({b}, {n}) of type torch.bool", f"{shape(mask)}, {mask.dtype}")
        hidden = mask.sum(1)
        if b and int(hidden.min()) != int(hidden.max()):
            fail("MaskedPixels", "mask", "of equally many hidden patches in each row", hidden.tolist())
        wrong = predicted[mask] - self.targets(pixels, patch)[mask]  # (B·M, p·p·Cin)
        return wrong.square().mean(1).reshape(b, -1).mean(1)
