"""Pixels as a convolution takes them, and as patches."""

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


def to_patches(pixels: Tensor, patch_size: int) -> Tensor:
    """`(B, Cin, H, W)` -> `(B, N, p·p·Cin)`: patches row by row, in each the channels of a pixel together.

    Raises:
        ValueError: when `patch_size` does not divide H and W.
    """
    b, cin, h, w = pixels.shape
    if h % patch_size or w % patch_size:
        fail("to_patches", "pixels", f"(B, Cin, H, W) with H and W multiples of {patch_size}", shape(pixels))
    gh, gw = h // patch_size, w // patch_size
    cut = pixels.reshape(b, cin, gh, patch_size, gw, patch_size).permute(0, 2, 4, 3, 5, 1)
    return cut.reshape(b, gh * gw, patch_size * patch_size * cin)


def from_patches(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """`(B, h·w, p·p·Cin)` -> `(B, Cin, h·p, w·p)`, the inverse of `to_patches`.

    Raises:
        ValueError: when `grid` or `patch_size` do not fit.
    """
    b, n, size = patches.shape
    (gh, gw), area = grid, patch_size * patch_size
    if n != gh * gw or size % area:
        fail("from_patches", "patches", f"(B, {gh * gw}, a multiple of {area})", shape(patches))
    apart = patches.reshape(b, gh, gw, patch_size, patch_size, size // area).permute(0, 5, 1, 3, 2, 4)
    return apart.reshape(b, size // area, gh * patch_size, gw * patch_size)
