"""Objectives over hidden patches: their pixels, and the tokens that stand for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import Linear, to_patches
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
        _check_mask("MaskedPixels", mask, b, n)
        wrong = predicted[mask] - self.targets(pixels, patch)[mask]  # (B·M, p·p·Cin)
        return wrong.square().mean(1).reshape(b, -1).mean(1)


class MaskedTokens(nn.Module):
    r"""The cross entropy of the hidden patches' tokens (Bao et al. 2022, arXiv:2106.08254, eq. 1).

    .. math:: L_b = -\frac{1}{|M_b|} \sum_{i \in M_b} \log \mathrm{softmax}(W h_i + b)_{z_i}

    It holds what serves pretraining alone: the token that stands where a patch is hidden, which the model's
    patch embedding takes, and the classifier of tokens.

    Args:
        width: C, of the model's tokens.
        vocabulary: V, of the image tokenizer.
    """

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.mask_token = nn.Parameter(torch.empty(width))
        self.head = Linear(width, vocabulary)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(self, features: Tensor, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each sample, and how often the likeliest token is the right one.

        Args:
            features: `(B, 1 + N, C)`, the model's normalized tokens, the class token first.
            tokens: `(B, N)` int64, in [0, V).
            mask: `(B, N)` bool, True = hidden, equally many in each row.

        Returns:
            Two tensors `(B,)` of float32 at least, the second without a gradient.

        Raises:
            ValueError: when shapes do not fit or the rows hide unequal numbers of patches.
        """
        b, n = features.shape[0], features.shape[1] - 1
        if tokens.shape != (b, n):
            fail("MaskedTokens", "tokens", f"({b}, {n})", shape(tokens))
        _check_mask("MaskedTokens", mask, b, n)
        logits = self.head(features[:, 1:][mask])  # (B·M, V): the visible ones are not asked for
        logits, wanted = logits.to(torch.promote_types(logits.dtype, torch.float32)), tokens[mask]
        losses = F.cross_entropy(logits, wanted, reduction="none").reshape(b, -1).mean(1)
        right = (logits.detach().argmax(1) == wanted).to(losses.dtype)
        return losses, right.reshape(b, -1).mean(1)


def _check_mask(name: str, mask: Tensor, batch: int, patches: int) -> None:
    if mask.shape != (batch, patches) or mask.dtype != torch.bool:
        fail(name, "mask", f"({batch}, {patches}) of type torch.bool", f"{shape(mask)}, {mask.dtype}")
    hidden = mask.sum(1)
    if batch and int(hidden.min()) != int(hidden.max()):
        fail(name, "mask", "of equally many hidden patches in each row", hidden.tolist())
