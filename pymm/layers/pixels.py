"""Pixels as a convolution takes them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pymm.ops._checks import fail, shape


class Normalize(nn.Module):
    """`uint8` pixels as `(x/255 − mean)/std`; floating pixels, which are normalized already, as they are.

    A patch embedding does this inside its kernel; this is for networks that begin with a convolution.

    Args:
        mean, std: one number per channel.
    """

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """`pixels (B, Cin, H, W)` -> the same shape in `dtype`.

        Raises:
            ValueError: when there are not as many channels as numbers in `mean`.
        """
        channels = len(self.mean)
        if pixels.ndim != 4 or pixels.shape[1] != channels:
            fail("Normalize", "pixels", f"(B, {channels}, H, W)", shape(pixels))
        if pixels.dtype != torch.uint8:
            return pixels.to(dtype)
        mean = torch.tensor(self.mean, device=pixels.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(-1, 1, 1)
        return ((pixels.float() / 255 - mean) / std).to(dtype)

    def extra_repr(self) -> str:
        return f"mean={self.mean}, std={self.std}"
