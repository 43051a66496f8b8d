"""Patch embedding with its prefix tokens and positions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from pymm.layers.position import resample_position
from pymm.ops import patch_embed
from pymm.ops._checks import fail, shape


class PatchEmbed(nn.Module):
    r"""An image as a sequence of tokens (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1).

    The weight has the shape of an `nn.Conv2d` whose stride is its kernel. Images of another size than
    `image_size` are welcome when the patch size divides them: the positions are interpolated.

    Args:
        image_size: side of the square images that `position` is made for, a multiple of `patch_size`.
        patch_size: side of a patch.
        width: C, of a token.
        channels: Cin, of an image.
        prefix: P, the number of class and register tokens in front of the patches.
        bias: whether patches have a bias.
        position: learned positions, `"all"` for prefix and patches, `"patches"` for patches alone; or None.
        mean, std: per channel, used for `uint8` pixels, which become `(x/255 − mean)/std`.

    Raises:
        ValueError: when `patch_size` does not divide `image_size`.
    """

    bias: nn.Parameter | None
    prefix: nn.Parameter | None
    position: nn.Parameter | None

    def __init__(
        self,
        image_size: int,
        patch_size: int,
        width: int,
        *,
        channels: int = 3,
        prefix: int = 1,
        bias: bool = True,
        position: Literal["all", "patches"] | None = "all",
        mean: tuple[float, ...] = (0.5, 0.5, 0.5),
        std: tuple[float, ...] = (0.5, 0.5, 0.5),
    ) -> None:
        super().__init__()
        if image_size % patch_size:
            fail("PatchEmbed", "image_size", f"a multiple of the patch size {patch_size}", image_size)
        self.image_size, self.patch_size = image_size, patch_size
        self.mean, self.std = mean, std
        side = image_size // patch_size
        self.position_prefix = prefix if position == "all" else 0
        self.weight = nn.Parameter(torch.empty(width, channels, patch_size, patch_size))
        self.bias = nn.Parameter(torch.empty(width)) if bias else None
        self.prefix = nn.Parameter(torch.empty(prefix, width)) if prefix else None
        self.position = (
            None if position is None else nn.Parameter(torch.empty(self.position_prefix + side * side, width))
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As timm: like `nn.Conv2d`; prefix normal with 1e-6, positions truncated normal with 0.02."""
        bound = self.weight[0].numel() ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)
        if self.prefix is not None:
            nn.init.normal_(self.prefix, std=1e-6)
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    def forward(
        self,
        pixels: Tensor,
        *,
        keep: Tensor | None = None,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
    ) -> Tensor:
        """Embed a batch of images.

        Args:
            pixels: `(B, Cin, H, W)`, float and normalized, or `uint8`; H and W multiples of the patch size.
            keep, mask, mask_token: as `pymm.ops.patch_embed` takes them.

        Returns:
            `(B, P + N, C)`.

        Raises:
            ValueError: when the shape does not fit.
        """
        cin, p = self.weight.shape[1], self.patch_size
        if pixels.ndim != 4 or pixels.shape[1] != cin or pixels.shape[2] % p or pixels.shape[3] % p:
            fail("PatchEmbed", "pixels", f"(B, {cin}, H, W) with H and W multiples of {p}", shape(pixels))
        position: Tensor | None = self.position
        if position is not None:
            grid = (pixels.shape[2] // p, pixels.shape[3] // p)
            position = resample_position(position, grid, prefix=self.position_prefix)
        raw = pixels.dtype == torch.uint8
        return patch_embed(
            pixels if raw else pixels.to(self.weight.dtype),
            self.weight,
            self.bias,
            prefix=self.prefix,
            position=position,
            keep=keep,
            mask=mask,
            mask_token=mask_token,
            mean=self.mean if raw else None,
            std=self.std if raw else None,
        )

    def extra_repr(self) -> str:
        return f"image_size={self.image_size}, patch_size={self.patch_size}, width={self.weight.shape[0]}"
