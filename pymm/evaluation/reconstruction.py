"""Pictures of reconstructions beside what they reconstruct. The sheet needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pymm.evaluation.pictures import GREY, INK, new_figure
from pymm.layers import Normalize, from_patches, to_patches

_HIDDEN = 0.5  # the grey of a hidden patch, of 1


def fill_in(
    model: Any, pixels: Tensor, predicted: Tensor, mask: Tensor, *, normalized: bool
) -> tuple[Tensor, Tensor]:
    """Pictures with their hidden patches in grey, and with what a masked autoencoder says of them.

    Args:
        model: has `mean`, `std` and `patch_size`.
        pixels: `(B, 3, H, W)` uint8.
        predicted: `(B, N, p·p·3)`, the model's answer.
        mask: `(B, N)` bool, True = hidden.
        normalized: whether the answer is each patch's pixels less their mean, over their spread; both are
            then the picture's own, as in He et al. 2022, arXiv:2111.06377, fig. 2.

    Returns:
        Two tensors `(B, 3, H, W)` uint8.
    """
    x = Normalize(model.mean, model.std)(pixels, torch.float32)
    patches, answer = to_patches(x, model.patch_size), predicted.float()
    if normalized:
        variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
        answer = answer * (variance + 1e-6).sqrt() + mean
    grid = (pixels.shape[2] // model.patch_size, pixels.shape[3] // model.patch_size)
    made = to_bytes(
        model, from_patches(torch.where(mask[..., None], answer, patches), grid, model.patch_size)
    )
    raw = to_patches(pixels, model.patch_size)
    grey = torch.full_like(raw, round(255 * _HIDDEN))
    seen = from_patches(torch.where(mask[..., None], grey, raw), grid, model.patch_size)
    return seen, made


def to_bytes(model: Any, x: Tensor) -> Tensor:
    """Normalized pixels `(B, 3, H, W)` as uint8."""
    mean = torch.tensor(model.mean, device=x.device).view(-1, 1, 1)
    std = torch.tensor(model.std, device=x.device).view(-1, 1, 1)
    return ((x.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)


def picture_sheet(path: Path, rows: Mapping[str, Tensor]) -> None:
    """Write a PNG with a row of pictures for each name.

    Args:
        path: of the PNG to write.
        rows: name -> uint8 `(K, 3, H, W)`, K and sizes alike.
    """
    first = next(iter(rows.values()))
    count = len(first)
    figure, axes = new_figure(1.1 * count + 1.6, 1.15 * len(rows) + 0.2)
    axes.set_position((0, 0, 1, 1))
    axes.set_xlim(-1.5, count)
    axes.set_ylim(len(rows), 0)
    axes.set_axis_off()
    for y, (name, pictures) in enumerate(rows.items()):
        axes.text(-0.1, y + 0.5, name, ha="right", va="center", color=INK, fontsize=11)
        for i, picture in enumerate(pictures.cpu().permute(0, 2, 3, 1).numpy()):
            axes.imshow(picture, extent=(i + 0.03, i + 0.97, y + 0.97, y + 0.03), interpolation="nearest")
            axes.plot(
                [i + 0.03, i + 0.97, i + 0.97, i + 0.03, i + 0.03],
                [y + 0.03, y + 0.03, y + 0.97, y + 0.97, y + 0.03],
                color=GREY,
                linewidth=0.5,
            )
    axes.set_aspect("auto")
    axes.set_xlim(-1.5, count)
    axes.set_ylim(len(rows), 0)
    figure.savefig(path, dpi=130)
