"""Features of regions: the mean of bilinear samples in each bin of a box."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import fail
from pymm.ops._cosine import accumulator
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register
from pymm.ops._regions import blocks, checked, inputs, is_int, sample_boxes, workloads

NAME = "roi_align"


def roi_align(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    r"""Pool the features inside each box into a grid of bins, by bilinear samples and without rounding.

    .. math:: o_{kcpq} = \frac{1}{g_h g_w} \sum_{i<g_h} \sum_{j<g_w}
              F_{n_k c}\big(y_k + (p + \tfrac{i + 1/2}{g_h}) \tfrac{h_k}{P},\;
              x_k + (q + \tfrac{j + 1/2}{g_w}) \tfrac{w_k}{Q}\big)

    (He et al. 2017, arXiv:1703.06870, sec. 3, with torchvision's conventions), where F between pixels is
    bilinear. A sample more than a pixel outside the map is 0, and one nearer to it is on its border.

    Args:
        features: `(N, C, H, W)`, float32, bfloat16, float16 or float64, in any layout; `channels_last` is
            read as it lies, and other layouts that are not dense are copied.
        boxes: `(K, 5)`, the image's index and `x1, y1, x2, y2`, or for each image a tensor `(L, 4)` of
            `x1, y1, x2, y2`; of features' type, or float32 for features of 16 bits.
        output_size: `(P, Q)`, the bins of a box, or one number for both.
        spatial_scale: what box coordinates are multiplied by to be those of the map, above 0.
        sampling_ratio: samples per bin along each axis, or below 1 for `ceil(h_k / P)` and `ceil(w_k / Q)`.
        aligned: half a pixel is subtracted from the scaled coordinates, as Detectron2 does; if not, a box
            has a width and a height of one pixel of the map at least.

    Returns:
        `(K, C, P, Q)` in the type of `features`.

    Raises:
        ValueError: when shapes, types, devices or options do not fit. An image's index that is not there
            ends in a RuntimeError or, on a GPU, as indexing does.

    Numerics:
        Positions, weights and sums are of float32 at least. torchvision's are of the features' type, so
        for 16 bits the two differ by its rounding. A box with a coordinate that is not finite gives zeros,
        and so does one of no size when `aligned` and the number of samples depends on the size. The boxes
        have no gradient. On a CPU backward adds up in the order of the boxes, so its bits do not depend
        on the threads.

    Kept for backward: the boxes.
    """
    rows, bins, scale = checked(NAME, features, boxes, output_size, spatial_scale)
    if not is_int(sampling_ratio):
        fail(NAME, "sampling_ratio", "an int", type(sampling_ratio).__name__)
    return call(NAME, features, rows, *bins, scale, sampling_ratio, bool(aligned))


def _weights(start: Tensor, extent: Tensor, bins: int, sampling: int, length: int) -> Tensor:
    """The matrix `(K, bins, length)` of the weights of one axis."""
    size = extent / bins  # (K,)
    grid = torch.full_like(size, sampling) if sampling > 0 else size.ceil()
    grid = torch.where(start.isfinite() & extent.isfinite() & (grid > 0), grid, 0)
    most = int(grid.max().item()) if grid.numel() else 0
    i = torch.arange(most, dtype=size.dtype, device=size.device)
    bin_of = torch.arange(bins, dtype=size.dtype, device=size.device)
    column = (slice(None), None, None)
    origin = start[:, None] + bin_of * size[:, None]  # (K, bins)
    x = origin[..., None] + (i + 0.5) * size[column] / grid[column]  # (K, bins, most)
    inside = (i < grid[column]) & (x >= -1) & (x <= length)
    x = torch.where(inside, x, 0).clamp_min(0)
    low = x.floor().clamp_max(length - 1)
    part = torch.where(low >= length - 1, 0, x - low)
    share = torch.where(inside, 1 / grid[column], 0)
    result = size.new_zeros((*origin.shape, length))
    result.scatter_add_(-1, low.long(), (1 - part) * share)
    result.scatter_add_(-1, (low + 1).clamp_max(length - 1).long(), part * share)
    return result


def _matrices(
    boxes: Tensor,
    acc: torch.dtype,
    bins: tuple[int, int],
    map_size: tuple[int, int],
    scale: float,
    sampling: int,
    aligned: bool,
) -> tuple[Tensor, Tensor]:
    """Y `(K, P, H)` and X `(K, Q, W)`: a box's bins of one channel are `Y F X^T`."""
    values = boxes[:, 1:].to(acc)
    corners = values * scale - (0.5 if aligned else 0.0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not aligned:
        extent = extent.clamp_min(1)
    finite = corners.isfinite().all(-1)[:, None]
    start, extent = torch.where(finite, start, 0), torch.where(finite, extent, math.nan)
    y = _weights(start[:, 1], extent[:, 1], bins[0], sampling, map_size[0])
    x = _weights(start[:, 0], extent[:, 0], bins[1], sampling, map_size[1])
    return y, x


def _reference(
    features: Tensor,
    boxes: Tensor,
    bins_h: int,
    bins_w: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    n, c, height, width = features.shape
    acc = accumulator(features.dtype)
    bins = (bins_h, bins_w)
    y, x = _matrices(boxes, acc, bins, (height, width), spatial_scale, sampling_ratio, aligned)
    out = features.new_zeros((boxes.shape[0], c, *bins))
    for image, rows in blocks(NAME, boxes, n, bins_h * c * width):
        if not rows.numel():
            continue
        by_row = features[image].to(acc).transpose(0, 1).reshape(height, c * width)
        strips = (y[rows].flatten(0, 1) @ by_row).view(len(rows), bins_h, c, width)
        out[rows] = (strips.transpose(1, 2) @ x[rows, None].mT).to(features.dtype)
    return out


def _fake(
    features: Tensor,
    boxes: Tensor,
    bins_h: int,
    bins_w: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return features.new_empty((boxes.shape[0], features.shape[1], bins_h, bins_w))


def _backward_reference(
    dout: Tensor,
    boxes: Tensor,
    images: int,
    height: int,
    width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    _, c, bins_h, bins_w = dout.shape
    acc = accumulator(dout.dtype)
    size = (height, width)
    y, x = _matrices(boxes, acc, (bins_h, bins_w), size, spatial_scale, sampling_ratio, aligned)
    planes = [dout.new_zeros((height, c * width), dtype=acc) for _ in range(images)]
    for image, rows in blocks(NAME, boxes, images, bins_h * c * width):
        if rows.numel():
            strips = (dout[rows].to(acc) @ x[rows, None]).transpose(1, 2).flatten(2)
            planes[image] = planes[image] + y[rows].flatten(0, 1).mT @ strips.flatten(0, 1)
    if not planes:
        return dout.new_zeros((0, c, height, width))
    return torch.stack([p.view(height, c, width).transpose(0, 1) for p in planes]).to(dout.dtype)


def _backward_fake(
    dout: Tensor,
    boxes: Tensor,
    images: int,
    height: int,
    width: int,
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    return dout.new_empty((images, dout.shape[1], height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, _, _, *options = inputs
    ctx.save_for_backward(boxes)
    ctx.size = (features.shape[0], features.shape[2], features.shape[3])
    ctx.options = options


def _backward_call(ctx: Any, backward_op: Any, dout: Tensor) -> tuple[Any, ...]:
    (boxes,) = ctx.saved_tensors
    return backward_op(dout, boxes, *ctx.size, *ctx.options), *(None,) * 6


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def boxes(count: int, images: int, width: float, height: float) -> Tensor:
        return sample_boxes(count, images, width, height).to(dtype)

    yield Sample("one box, one bin", (rand(1, 1, 5, 6), boxes(1, 1, 5, 4), 1))
    yield Sample("no boxes", (rand(2, 3, 5, 6), boxes(0, 2, 6, 5), (2, 3)))
    yield Sample("no channels", (rand(2, 0, 5, 6), boxes(3, 2, 6, 5), 2))
    yield Sample("one pixel", (rand(1, 2, 1, 1), boxes(3, 1, 1, 1), 2, 1.0, 2))
    outside = [[0, -9, -9, -2, -2], [0, 4, 3, 40, 30], [0, -3, 2, 3, 90], [0, 30, 30, 60, 60]]
    yield Sample("outside", (rand(1, 2, 9, 7), torch.tensor(outside, dtype=dtype), 3, 1.0, 2))
    flat = [[0, 2, 2, 2, 2], [0, 3, 3, 1, 1], [0, 1, 5, 6, 5], [0, 1, 2, math.inf, 3], [0, 1, math.nan, 2, 3]]
    for aligned in (False, True):
        args = (rand(1, 2, 9, 7), torch.tensor(flat, dtype=dtype), (2, 3), 1.0, -1, aligned)
        yield Sample(f"degenerate, aligned={aligned}", args)
    yield Sample("aligned", (rand(3, 5, 8, 9), boxes(7, 3, 36, 32), 7, 0.25, 2, True))
    turned = rand(2, 19, 40, 37).to(memory_format=torch.channels_last)
    yield Sample("channels last, adaptive", (turned, boxes(9, 2, 74, 80), (7, 9), 0.5, 0))
    yield Sample("many bins", (rand(2, 3, 24, 40), boxes(5, 2, 40, 24), (16, 37), 1.0, 3, True))
    yield Sample("wide", (rand(1, 2, 6, 150), boxes(5, 1, 150, 6), (2, 4)))


def _eager(
    features: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """Samples of `F.grid_sample`, all boxes of an image that have as many samples at once."""
    p, q = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    _, c, height, width = features.shape
    acc = accumulator(features.dtype)
    corners = boxes[:, 1:].to(acc) * spatial_scale - (0.5 if aligned else 0.0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    size = (extent if aligned else extent.clamp_min(1)) / torch.tensor([q, p], dtype=acc)
    grid = torch.full_like(size, sampling_ratio) if sampling_ratio > 0 else size.ceil()
    groups = torch.cat([boxes[:, :1].to(acc), torch.where(corners.isfinite().all(-1)[:, None], grid, 0)], 1)
    kinds, kind_of = groups.long().unique(dim=0, return_inverse=True)
    parts, order = [], []
    for i, (image, across, down) in enumerate(kinds.tolist()):
        rows = (kind_of == i).nonzero()[:, 0]
        order.append(rows)
        if across < 1 or down < 1:
            parts.append(features.new_zeros((len(rows), c, p, q)))
            continue
        x = start[rows, :1] + (torch.arange(q * across, dtype=acc) + 0.5) * size[rows, :1] / across
        y = start[rows, 1:] + (torch.arange(p * down, dtype=acc) + 0.5) * size[rows, 1:] / down
        points = torch.stack(
            [
                ((x + 0.5) * 2 / width - 1)[:, None].expand(-1, p * down, -1),
                ((y + 0.5) * 2 / height - 1)[..., None].expand(-1, -1, q * across),
            ],
            -1,
        )
        near = ((x >= -1) & (x <= width))[:, None] & ((y >= -1) & (y <= height))[..., None]
        sampled = F.grid_sample(
            features[image : image + 1].to(acc),
            points.flatten(0, 1)[None],
            padding_mode="border",
            align_corners=False,
        )
        inside = sampled.view(c, len(rows), p * down, q * across) * near
        means = inside.view(c, len(rows), p, down, q, across).mean((3, 5))
        parts.append(means.transpose(0, 1).to(features.dtype))
    if not parts:
        return features.new_zeros((0, c, p, q))
    return torch.cat(parts)[torch.cat(order).argsort()]


def _workloads() -> Sequence[Workload]:
    rows = {
        "box head 1000x256x7x7 of 200x200": inputs(1, 256, 200, 1000, 7, 0.25, 2),
        "training 2x512 boxes 256x7x7 of 100x100": inputs(2, 256, 100, 1024, 7, 0.125, 2),
        "res5 head 100x1024x14x14 of 50x50": inputs(1, 1024, 50, 100, 14, 0.0625, -1),
    }
    return workloads(rows)


OP = register(
    Op(
        name=NAME,
        function=roi_align,
        forward=Kernel(
            "(Tensor features, Tensor boxes, SymInt bins_h, SymInt bins_w, float spatial_scale, "
            "int sampling_ratio, bool aligned) -> Tensor",
            _reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dout, Tensor boxes, SymInt images, SymInt height, SymInt width, float spatial_scale, "
            "int sampling_ratio, bool aligned) -> Tensor",
            _backward_reference,
            _backward_fake,
        ),
        setup_context=_setup_context,
        backward_call=_backward_call,
        samples=_samples,
        workloads=_workloads,
        eager=_eager,
    )
)
