"""Features of regions: the largest value in each bin of a box."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pymm.ops._cosine import accumulator
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register
from pymm.ops._regions import BLOCK, checked, image_of, inputs, sample_boxes, workloads

NAME = "roi_pool"
FARTHEST = 2.0**40  # a corner of a box, in pixels of the map


def roi_pool(
    features: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    r"""Pool the features inside each box into a grid of bins, by the largest value of each.

    .. math:: o_{kcpq} = \max \{ F_{n_k c}(y, x) :
              y_k + \lfloor p\, h_k / P \rfloor \le y < y_k + \lceil (p + 1)\, h_k / P \rceil,\;
              x_k + \lfloor q\, w_k / Q \rfloor \le x < x_k + \lceil (q + 1)\, w_k / Q \rceil \}

    (Girshick 2015, arXiv:1504.08083, sec. 2.1, with torchvision's conventions). The corners of a box are
    rounded to pixels of the map, half a pixel away from 0, and both belong to it, so that it is `w_k` by
    `h_k` pixels large and one by one at least. A bin that lies outside the map is 0.

    Args:
        features: `(N, C, H, W)`, float32, bfloat16, float16 or float64, in any layout; `H W < 2**31`.
        boxes: `(K, 5)`, the image's index and `x1, y1, x2, y2`, or for each image a tensor `(L, 4)` of
            `x1, y1, x2, y2`; of features' type, or float32 for features of 16 bits.
        output_size: `(P, Q)`, the bins of a box, or one number for both.
        spatial_scale: what box coordinates are multiplied by to be those of the map, above 0.

    Returns:
        `(K, C, P, Q)` in the type of `features`.

    Raises:
        ValueError: when shapes, types, devices or options do not fit. An image's index that is not there
            ends in a RuntimeError or, on a GPU, as indexing does.

    Numerics:
        The edges of the bins are computed in float64 for every type, and torchvision's in the features' type,
        so that for fewer bits an edge may lie a pixel beside torchvision's; values are never rounded. A NaN
        in a bin is its largest value. A box with a coordinate that is not finite gives zeros. The gradient
        goes to the first of equal values, row by row. The boxes have no gradient. On a CPU backward adds up
        in the order of the boxes, so its bits do not depend on the threads.

    Kept for backward: the boxes, and for each output the place of its value, int32.
    """
    rows, bins, scale = checked(NAME, features, boxes, output_size, spatial_scale)
    out: Tensor = call(NAME, features, rows, *bins, scale)[0]
    return out


def _rounded(x: Tensor) -> Tensor:
    """To whole numbers, a half away from 0."""
    whole = x.trunc()
    return whole + x.sign() * ((x - whole).abs() >= 0.5)


def _edges(start: Tensor, end: Tensor, bins: int, length: int) -> tuple[Tensor, Tensor]:
    """First pixels and those after the last, `(K, bins)` int64, of the bins of one axis."""
    size = (end - start + 1).clamp_min(1) / bins  # (K,), in whole pixels before the division
    bin_of = torch.arange(bins, dtype=size.dtype, device=size.device)
    first = (bin_of * size[:, None]).floor() + start[:, None]
    last = ((bin_of + 1) * size[:, None]).ceil() + start[:, None]
    return first.clamp(0, length).long(), last.clamp(0, length).long()


def _windows(
    boxes: Tensor, bins: tuple[int, int], map_size: tuple[int, int], scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The edges of rows and of columns; a box that is not finite has none."""
    corners = boxes[:, 1:].double() * scale
    finite = corners.isfinite().all(1)
    corners = _rounded(torch.where(finite[:, None], corners, 0).clamp(-FARTHEST, FARTHEST))
    x1, y1, x2, y2 = corners.unbind(1)
    top, bottom = _edges(y1, y2, bins[0], map_size[0])
    left, right = _edges(x1, x2, bins[1], map_size[1])
    return top, torch.where(finite[:, None], bottom, top), left, right


def _members(first: Tensor, last: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """`(K, bins, most)`: the pixels of each bin of one axis, and which of them are of it."""
    most = int((last - first).max().item()) if first.numel() else 0
    at = first[..., None] + torch.arange(max(1, most), device=first.device)
    return at.clamp_max(length - 1), at < last[..., None]


def _reference(
    features: Tensor, boxes: Tensor, bins_h: int, bins_w: int, spatial_scale: float
) -> tuple[Tensor, Tensor]:
    n, c, height, width = features.shape
    image = image_of(NAME, boxes, n)
    top, bottom, left, right = _windows(boxes, (bins_h, bins_w), (height, width), spatial_scale)
    rows, row_in = _members(top, bottom, height)  # (K, P, h)
    columns, column_in = _members(left, right, width)  # (K, Q, w)
    out = features.new_zeros((boxes.shape[0], c, bins_h, bins_w))
    argmax = torch.full_like(out, -1, dtype=torch.int32)
    h, w = rows.shape[2], columns.shape[2]
    numbers = bins_h * bins_w * h * w * max(1, c)
    for part in torch.arange(boxes.shape[0], device=boxes.device).split(max(1, BLOCK // numbers)):
        y, x = rows[part][:, :, None, :, None], columns[part][:, None, :, None, :]
        inside = row_in[part][:, :, None, :, None] & column_in[part][:, None, :, None, :]
        of = image[part].view(-1, 1, 1, 1, 1)
        values = features.movedim(1, -1)[of, y, x]  # (k, P, Q, h, w, C)
        values = values.masked_fill(~inside[..., None], -math.inf).flatten(3, 4)
        best, at = values.max(3)  # the first of equal ones; a NaN where there is one
        row = rows[part][:, :, None].expand(-1, -1, bins_w, -1).gather(3, at // w)
        column = columns[part][:, None].expand(-1, bins_h, -1, -1).gather(3, at % w)
        some = inside.flatten(3).any(3)[..., None]
        out[part] = torch.where(some, best, 0).movedim(-1, 1)
        argmax[part] = torch.where(some, row * width + column, -1).movedim(-1, 1).int()
    return out, argmax


def _fake(
    features: Tensor, boxes: Tensor, bins_h: int, bins_w: int, spatial_scale: float
) -> tuple[Tensor, Tensor]:
    out = features.new_empty((boxes.shape[0], features.shape[1], bins_h, bins_w))
    return out, torch.empty_like(out, dtype=torch.int32)


def _backward_reference(
    dout: Tensor, boxes: Tensor, argmax: Tensor, images: int, height: int, width: int
) -> Tensor:
    count, c = dout.shape[:2]
    acc = accumulator(dout.dtype)
    image = image_of(NAME, boxes, images)
    channel = torch.arange(c, device=dout.device)
    plane = (image[:, None] * c + channel)[:, :, None]  # (K, C, 1)
    at = argmax.view(count, c, argmax.shape[2] * argmax.shape[3]).long()
    values = torch.where(at >= 0, dout.reshape(at.shape).to(acc), 0)
    flat = dout.new_zeros(images * c * height * width, dtype=acc)
    places = (plane * (height * width) + at.clamp_min(0)).flatten()
    return flat.index_add(0, places, values.flatten()).view(images, c, height, width).to(dout.dtype)


def _backward_fake(
    dout: Tensor, boxes: Tensor, argmax: Tensor, images: int, height: int, width: int
) -> Tensor:
    return dout.new_empty((images, dout.shape[1], height, width))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, *_ = inputs
    ctx.save_for_backward(boxes, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.size = (features.shape[0], features.shape[2], features.shape[3])


def _backward_call(ctx: Any, backward_op: Any, dout: Tensor | None, _: None) -> tuple[Any, ...]:
    if dout is None:
        return (None,) * 5
    return backward_op(dout, *ctx.saved_tensors, *ctx.size), *(None,) * 4


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def boxes(count: int, images: int, width: float, height: float) -> Tensor:
        return sample_boxes(count, images, width, height).to(dtype)

    yield Sample("one box, one bin", (rand(1, 1, 5, 6), boxes(1, 1, 5, 4), 1))
    yield Sample("no boxes", (rand(2, 3, 5, 6), boxes(0, 2, 6, 5), (2, 3)))
    yield Sample("no channels", (rand(2, 0, 5, 6), boxes(3, 2, 6, 5), 2))
    yield Sample("no images", (rand(0, 3, 5, 6), boxes(0, 1, 6, 5), 2))
    yield Sample("one pixel", (rand(1, 2, 1, 1), boxes(3, 1, 1, 1), 2))
    outside = [[0, -9, -9, -2, -2], [0, 4, 3, 40, 30], [0, -3, 2, 3, 90], [0, 30, 30, 60, 60]]
    yield Sample("outside", (rand(1, 2, 9, 7), torch.tensor(outside, dtype=dtype), 3))
    flat = [[0, 2, 2, 2, 2], [0, 3, 3, 1, 1], [0, 1, 5, 6, 5], [0, 1, 2, math.inf, 3], [0, 1, math.nan, 2, 3]]
    yield Sample("degenerate", (rand(1, 2, 9, 7), torch.tensor(flat, dtype=dtype), (2, 3)))
    halves = [[0, 0.5, 1.5, 4.5, 5.5], [0, -0.5, -1.5, 3.5, 2.5], [0, 1.25, 2.75, 4.0, 6.5]]
    yield Sample("halves", (rand(1, 2, 9, 7), torch.tensor(halves, dtype=dtype), 2))
    yield Sample("scaled", (rand(3, 5, 8, 9), boxes(7, 3, 36, 32), 7, 0.25))
    turned = rand(2, 5, 40, 37).to(memory_format=torch.channels_last)
    yield Sample("channels last", (turned, boxes(9, 2, 74, 80), (7, 9), 0.5))
    yield Sample("many bins", (rand(2, 3, 24, 40), boxes(5, 2, 40, 24), (16, 37)))
    yield Sample("wide", (rand(1, 2, 6, 150), boxes(5, 1, 150, 6), (2, 4)))
    equal = torch.tensor([0.0, 1.0, -1.0], dtype=dtype)[torch.randint(3, (2, 3, 11, 20))]
    yield Sample("equal values", (equal, boxes(6, 2, 20, 11), (3, 2)), smooth=False)


def _eager(
    features: Tensor,
    boxes: Tensor,
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """Slices of each box's columns, and of the rows of their largest values."""
    p, q = output_size if isinstance(output_size, tuple) else (output_size, output_size)
    _, c, height, width = features.shape
    edges = _windows(boxes, (p, q), (height, width), spatial_scale)
    top, bottom, left, right = (part.tolist() for part in edges)
    nothing = features.new_zeros(c)
    pooled = []
    for k, image in enumerate(boxes[:, 0].long().tolist()):
        bins = []
        for first, last in zip(top[k], bottom[k], strict=True):
            rows = features[image, :, first:last].amax(1) if last > first else None  # (C, W)
            for low, high in zip(left[k], right[k], strict=True):
                bins.append(rows[:, low:high].amax(1) if rows is not None and high > low else nothing)
        pooled.append(torch.stack(bins, 1))
    if not pooled:
        return features.new_zeros((0, c, p, q))
    return torch.stack(pooled).view(len(pooled), c, p, q)


def _workloads() -> Sequence[Workload]:
    rows = {
        "box head 1000x256x7x7 of 200x200": inputs(1, 256, 200, 1000, 7, 0.25),
        "training 2x512 boxes 256x7x7 of 100x100": inputs(2, 256, 100, 1024, 7, 0.125),
        "res5 head 100x1024x14x14 of 50x50": inputs(1, 1024, 50, 100, 14, 0.0625),
    }
    return workloads(rows)


OP = register(
    Op(
        name=NAME,
        function=roi_pool,
        forward=Kernel(
            "(Tensor features, Tensor boxes, SymInt bins_h, SymInt bins_w, float spatial_scale) "
            "-> (Tensor, Tensor)",
            _reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dout, Tensor boxes, Tensor argmax, SymInt images, SymInt height, SymInt width) "
            "-> Tensor",
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
