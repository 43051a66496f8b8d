"""Changes of brightness, contrast, saturation and hue as one matrix per image."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)
# RGB to YIQ (ITU-R BT.601 luma); a turn of (I, Q) turns the hue and leaves the luma.
YIQ = ((0.299, 0.587, 0.114), (0.595716, -0.274453, -0.321263), (0.211456, -0.522591, 0.311135))


def colour_matrices(
    brightness: Tensor, contrast: Tensor, saturation: Tensor, hue: Tensor, gray: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    r"""The affine map of colours that a chain of changes makes, for a batch.

    .. math:: x' = G\,H\,S\,(c\,b\,x + (1 - c)\,b\,\bar y\,\mathbf 1)

    with brightness `b`, contrast `c` about the image's mean luma `ȳ`, saturation `S = s·I + (1 − s)·1·lumaᵀ`,
    hue `H` (a turn in YIQ) and `G` the grey projection or the identity. The definitions of brightness,
    contrast and saturation are torchvision's; values are cut to the range once at the end and not after each
    step.

    Args:
        brightness, contrast, saturation: `(B,)` factors, 1 for no change.
        hue: `(B,)` in turns.
        gray: `(B,)` bool.
        mean: `(B, 3)` mean colours of the images.

    Returns:
        Matrices `(B, 3, 3)` and offsets `(B, 3)`.
    """
    luma = torch.tensor([LUMA]).expand(3, 3)  # each row the luma: projects on grey
    eye = torch.eye(3)
    s = saturation[:, None, None]
    matrix = s * eye + (1 - s) * luma
    to_yiq = torch.tensor(YIQ)
    angle = 2 * math.pi * hue
    turn = torch.zeros(len(hue), 3, 3)
    turn[:, 0, 0] = 1
    turn[:, 1, 1] = turn[:, 2, 2] = angle.cos()
    turn[:, 2, 1] = angle.sin()
    turn[:, 1, 2] = -angle.sin()
    matrix = torch.linalg.inv(to_yiq) @ turn @ to_yiq @ matrix
    matrix = torch.where(gray[:, None, None], luma @ matrix, matrix)
    # Every factor above maps grey to itself, so contrast's offset passes through unchanged.
    offset = (1 - contrast) * brightness * (mean @ luma[0])
    return (brightness * contrast)[:, None, None] * matrix, offset[:, None].expand(-1, 3)
