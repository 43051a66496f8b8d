"""Boxes as numbers: overlap, offsets from one box to another, and what models of vision and language take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pymm.ops._checks import fail, shape

# A box grows by this factor at most in one step (Detectron's limit, which keeps exp() from overflowing).
LARGEST = math.log(1000.0 / 16)
Weights = tuple[float, float, float, float]


def widened(t: Tensor) -> Tensor:
    """In float32 at least: a type of 16 bits cannot count the pixels of a picture."""
    return t.to(torch.promote_types(t.dtype, torch.float32))


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of all pairs: `a (M, 4)`, `b (N, 4)` -> `(M, N)`."""
    low, high = torch.maximum(a[:, None, :2], b[None, :, :2]), torch.minimum(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp_min(0).prod(-1)
    return shared / (_area(a)[:, None] + _area(b)[None] - shared)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def _centred(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Centres and sizes, `(K, 2)` each."""
    size = boxes[:, 2:] - boxes[:, :2]
    return boxes[:, :2] + 0.5 * size, size


def encode_boxes(boxes: Tensor, references: Tensor, weights: Weights = (1, 1, 1, 1)) -> Tensor:
    r"""Offsets from `references` to `boxes`, both `(K, 4)`.

    .. math:: t = \big(w_x \tfrac{x - x_r}{w_r},\; w_y \tfrac{y - y_r}{h_r},\;
              w_w \log \tfrac{w}{w_r},\; w_h \log \tfrac{h}{h_r}\big)

    (Girshick et al. 2014, arXiv:1311.2524, app. C, of centres and sizes).
    """
    centre, size = _centred(boxes)
    centre_r, size_r = _centred(references)
    offsets = torch.cat([(centre - centre_r) / size_r, (size / size_r).log()], 1)
    return offsets * torch.tensor(weights, dtype=offsets.dtype, device=offsets.device)


def decode_boxes(offsets: Tensor, references: Tensor, weights: Weights = (1, 1, 1, 1)) -> Tensor:
    """The inverse of `encode_boxes`: `offsets (K, ..., 4)`, `references (K, 4)` -> `(K, ..., 4)`."""
    centre_r, size_r = _centred(references)
    between = (len(references), *(1,) * (offsets.ndim - 2), 2)
    centre_r, size_r = centre_r.view(between), size_r.view(between)
    t = offsets / torch.tensor(weights, dtype=offsets.dtype, device=offsets.device)
    centre = t[..., :2] * size_r + centre_r
    half = 0.5 * (t[..., 2:].clamp_max(LARGEST).exp() * size_r)
    return torch.cat([centre - half, centre + half], -1)


def clip_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """`(..., 4)` with every corner inside a picture of `(height, width)`."""
    height, width = size
    limit = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    return boxes.clamp_min(0).minimum(limit)


def scale_boxes(boxes: Tensor, size: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """`(K, 4)` in a picture of `(height, width)` size, in the same picture of another size."""
    y, x = (torch.tensor(float(b)) / torch.tensor(float(a)) for a, b in zip(size, to, strict=True))
    return boxes * torch.stack([x, y, x, y]).to(boxes)


def at_least(boxes: Tensor, side: float) -> Tensor:
    """Indices of the boxes `(K, 4)` that are at least so wide and so high."""
    return ((boxes[:, 2:] - boxes[:, :2]) >= side).all(1).nonzero()[:, 0]


def box_encoding(boxes: Tensor, size: tuple[int, int], numbers: int = 4) -> Tensor:
    """Boxes as a model of vision and language takes them, as shares of the picture.

    Args:
        boxes: `(R, 4)`, `x1, y1, x2, y2` in pixels.
        size: `(height, width)` of the picture.
        numbers: 4, the corners (LXMERT, Tan and Bansal 2019, arXiv:1908.07490; VL-BERT, Su et al. 2020,
            arXiv:1908.08530); 5, and the share of the area (ViLBERT, Lu et al. 2019, arXiv:1908.02265); or 7,
            the corners, width, height and area (UNITER, Chen et al. 2020, arXiv:1909.11740).

    Returns:
        `(R, numbers)`.

    Raises:
        ValueError: for another shape or number.
    """
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        fail("box_encoding", "boxes", "(R, 4)", shape(boxes))
    height, width = size
    whole = torch.tensor([width, height, width, height], dtype=boxes.dtype, device=boxes.device)
    corners = boxes / whole
    sides = corners[:, 2:] - corners[:, :2]
    area = sides.prod(1, keepdim=True)
    if numbers not in (4, 5, 7):
        fail("box_encoding", "numbers", "4, 5 or 7", numbers)
    if numbers == 4:
        return corners
    return torch.cat([corners, area] if numbers == 5 else [corners, sides, area], 1)
