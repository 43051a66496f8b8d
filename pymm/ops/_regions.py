"""What the two poolings of regions share: their arguments, the order of the boxes, samples and workloads."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import check_device, check_same, check_shape, fail, shape
from pymm.ops._cosine import accumulator
from pymm.ops._record import Workload

# A reference holds a block of features of at most this many numbers.
BLOCK = 1 << 24


def checked(
    name: str,
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float,
) -> tuple[Tensor, tuple[int, int], float]:
    """The boxes as `(K, 5)`, the bins and the scale of a call."""
    check_same(name, "features", features)
    if features.ndim != 4:
        fail(name, "features", "(N, C, H, W)", shape(features))
    if not features.shape[2] or not features.shape[3]:
        fail(name, "features", "(N, C, H, W) with H and W above 0", shape(features))
    rows = _rows(name, features, boxes)
    if isinstance(output_size, (tuple, list)):
        bins = tuple(output_size)
    else:
        bins = (output_size, output_size)
    if len(bins) != 2 or not all(is_int(n) and n > 0 for n in bins):
        fail(name, "output_size", "a positive int or two", output_size)
    if not (math.isfinite(spatial_scale) and spatial_scale > 0):
        fail(name, "spatial_scale", "a finite number above 0", spatial_scale)
    return rows, (bins[0], bins[1]), float(spatial_scale)


def is_int(n: object) -> bool:
    """Whether an argument is a whole number, known now or when a graph runs."""
    return isinstance(n, (int, torch.SymInt)) and not isinstance(n, bool)


def _rows(name: str, features: Tensor, boxes: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(boxes, Tensor):
        _check_type(name, features, "boxes", boxes)
        check_shape(name, "boxes", boxes, ("K", 5))
        return boxes.detach()
    if not isinstance(boxes, (list, tuple)):
        fail(name, "boxes", "a tensor (K, 5) or a list of tensors (L, 4)", type(boxes).__name__)
    if len(boxes) != features.shape[0]:
        fail(name, "boxes", f"a list of N = {features.shape[0]} tensors", len(boxes))
    parts = []
    for i, part in enumerate(boxes):
        _check_type(name, features, f"boxes[{i}]", part)
        check_shape(name, f"boxes[{i}]", part, ("L", 4))
        # An index above 256 is no bfloat16.
        wide = part.detach().to(accumulator(part.dtype))
        parts.append(F.pad(wide, (1, 0), value=float(i)))
    if len({part.dtype for part in parts}) > 1:
        fail(name, "boxes", "of one type", sorted({str(part.dtype) for part in parts}))
    return torch.cat(parts) if parts else features.new_zeros((0, 5), dtype=accumulator(features.dtype))


def _check_type(name: str, features: Tensor, argument: str, boxes: object) -> None:
    if not isinstance(boxes, Tensor):
        fail(name, argument, "a tensor", type(boxes).__name__)
    wider = boxes.dtype == torch.float32 and features.dtype in (torch.bfloat16, torch.float16)
    if boxes.dtype != features.dtype and not wider:
        fail(name, argument, f"of features' type {features.dtype}, or float32 for 16 bits", boxes.dtype)
    check_device(name, "features", features, argument, boxes)


def image_of(name: str, boxes: Tensor, images: int) -> Tensor:
    """`(K,)` int64, the image of each box.

    Raises:
        RuntimeError: when one is not there.
    """
    image = boxes[:, 0].long()
    if image.numel() and not bool(((image >= 0) & (image < images)).all()):
        raise RuntimeError(f"{name}: a box names an image that is not there")
    return image


def blocks(name: str, boxes: Tensor, images: int, numbers: int) -> Iterator[tuple[int, Tensor]]:
    """`(image, indices of boxes of it)`, few enough to hold `numbers` for each."""
    image = image_of(name, boxes, images)
    for n in range(images):
        yield from (
            (n, rows) for rows in (image == n).nonzero()[:, 0].split(max(1, BLOCK // max(1, numbers)))
        )


def sample_boxes(count: int, images: int, width: float, height: float) -> Tensor:
    """Random boxes inside a map, `(count, 5)` float64."""
    corners = torch.rand(count, 4, dtype=torch.float64) * torch.tensor([width, height, width, height])
    low, high = corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])
    image = torch.randint(0, images, (count, 1))
    # Sixty-fourths are exact where numbers are small, so that every type sees the same boxes.
    return (torch.cat([image, low, high], 1) * 64).round().div(64)


def inputs(images: int, channels: int, size: int, boxes: int, bins: int, scale: float, *options: Any) -> Any:
    """`make` of a workload: boxes as a detector's heads get them."""

    def made(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        side = size / scale
        # The pyramid hands a level the boxes that span about 14 to 28 of its pixels.
        centre, extent = torch.rand(boxes, 2) * side, (14 + 14 * torch.rand(boxes, 2)) / scale
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1).clamp(0, side)
        image = torch.arange(boxes) % images
        rows = torch.cat([image[:, None].float(), corners], 1)
        features = torch.randn(images, channels, size, size)
        return (features.to(dtype), rows.to(dtype), bins, scale, *options), {}

    return made


def workloads(rows: Mapping[str, Any]) -> list[Workload]:
    """A curve of workloads; bfloat16 cannot name a box at 800 pixels exactly, and torchvision wants boxes of
    the features' type."""
    return [
        Workload(label, torch.float32, made, fixed=(1,), family="boxes", size=i)
        for i, (label, made) in enumerate(rows.items())
    ]
