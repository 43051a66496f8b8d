"""Patch embedding: pixels to tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._checks import autocast, check_device, check_same, check_shape, fail, shape
from pymm.ops._dispatch import call
from pymm.ops._patch_embed_reference import along, backward_reference, grid, normalized, reference
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "patch_embed"

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    keep: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    mean: Tensor | Sequence[float] | None = None,
    std: Tensor | Sequence[float] | None = None,
) -> Tensor:
    r"""Cut images into patches, project each to a token, add positions and prepend prefix tokens.

    .. math:: z = [\,p;\; x_1 W + b;\; \dots;\; x_N W + b\,] + E_{pos}

    (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1), with the masked patches replaced by a learned token
    before the positions are added (BEiT: Bao et al. 2022, arXiv:2106.08254, sec. 2.3), or only the visible
    patches computed (MAE: He et al. 2022, arXiv:2111.06377, sec. 3). The patches are numbered row by row.

    Args:
        pixels: `(B, Cin, H, W)`, of the type of `weight`, or uint8; any strides, so channels-last is read in
            place. H and W are multiples of ph and pw.
        weight: `(C, Cin, ph, pw)`, the weight of an `nn.Conv2d` whose stride is its kernel.
        bias: `(C,)`.
        prefix: `(P, C)`, class and register tokens, the first P of the result.
        position: `(N, C)`, added to the patches only, or `(P+N, C)`, added to the prefix too.
        keep: `(B, K)` of an integer type, in [0, N): the patches to compute, in this order; each keeps its
            own position.
        mask: `(B, N)` bool, True = the patch becomes `mask_token`.
        mask_token: `(C,)`; unused without `mask`.
        mean, std: Cin numbers, constants. Float pixels become `(x - mean) / std`, uint8 pixels
            `(x / 255 - mean) / std`. One that is None is 0 and 1, so uint8 pixels alone become `x / 255`.

    Returns:
        `(B, P+N, C)`, or `(B, P+K, C)` with `keep`, in the type of `weight`.

    Raises:
        ValueError: when shapes, types or devices do not fit, or H, W are no multiples of the patch.
        RuntimeError: when an entry of `keep` is outside [0, N).

    Numerics:
        Pixels are normalized in float32 at least and rounded to the type of `weight`; products are
        accumulated in float32 at least; on the CPU bias and position are added before the result is rounded,
        once. Under autocast all tensors but uint8 pixels, `mean` and `std` are cast to autocast's type first.

    Kept for backward: pixels, weight, `keep`, `mask`, `mean`, `std`; no patch matrix.
    """
    pixels, weight, bias, prefix, position, mask_token = autocast(
        pixels, weight, bias, prefix, position, mask_token
    )
    check_same(NAME, "weight", weight, bias=bias, prefix=prefix, position=position, mask_token=mask_token)
    _check_kind("pixels", pixels, (torch.uint8, weight.dtype), f"uint8 or of weight's type {weight.dtype}")
    check_device(NAME, "weight", weight, "pixels", pixels)
    if weight.ndim != 4 or min(weight.shape[2:]) < 1:
        fail(NAME, "weight", "(C, Cin, ph, pw) with ph, pw >= 1", shape(weight))
    c, cin, ph, pw = weight.shape
    if pixels.ndim != 4 or pixels.shape[1] != cin or pixels.shape[2] % ph or pixels.shape[3] % pw:
        fail(NAME, "pixels", f"(B, {cin}, a multiple of {ph}, a multiple of {pw})", shape(pixels))
    b, n = pixels.shape[0], (pixels.shape[2] // ph) * (pixels.shape[3] // pw)
    if bias is not None:
        check_shape(NAME, "bias", bias, (c,))
    if prefix is not None:
        check_shape(NAME, "prefix", prefix, ("P", c))
    p = 0 if prefix is None else prefix.shape[0]
    if position is not None and tuple(position.shape) not in ((n, c), (p + n, c)):
        both = f" or ({p + n}, {c})" if p else ""
        fail(NAME, "position", f"({n}, {c}){both}", shape(position))
    keep = _checked_keep(keep, weight, b)
    if mask is not None:
        _check_kind("mask", mask, (torch.bool,), "of type torch.bool")
        check_device(NAME, "weight", weight, "mask", mask)
        check_shape(NAME, "mask", mask, (b, n))
        if mask_token is None:
            fail(NAME, "mask_token", "given with mask", None)
    if mask_token is not None:
        check_shape(NAME, "mask_token", mask_token, (c,))
    mean, std = _constants("mean", mean, weight), _constants("std", std, weight)
    token = mask_token if mask is not None else None
    return call(NAME, pixels, weight, bias, prefix, position, keep, mask, token, mean, std)


def _check_kind(name: str, t: object, dtypes: tuple[torch.dtype, ...], expected: str) -> None:
    if not isinstance(t, Tensor):
        fail(NAME, name, "a tensor", type(t).__name__)
    if t.dtype not in dtypes:
        fail(NAME, name, expected, t.dtype)


def _checked_keep(keep: Tensor | None, weight: Tensor, b: int) -> Tensor | None:
    if keep is None:
        return None
    _check_kind("keep", keep, INTEGERS, "of an integer type")
    check_device(NAME, "weight", weight, "keep", keep)
    check_shape(NAME, "keep", keep, (b, "K"))
    return keep.long()


def _constants(name: str, values: Tensor | Sequence[float] | None, weight: Tensor) -> Tensor | None:
    """`mean` or `std` as the op takes it: a tensor in the accumulator's type."""
    if values is None:
        return None
    acc = torch.promote_types(weight.dtype, torch.float32)
    if not isinstance(values, Tensor):
        values = torch.tensor(values, dtype=acc, device=weight.device)
    check_device(NAME, "weight", weight, name, values)
    check_shape(NAME, name, values, (weight.shape[1],))
    if values.requires_grad:
        fail(NAME, name, "a constant, for it has no gradient", "a tensor that requires one")
    return values.to(acc)


def _fake(
    pixels: Tensor,
    weight: Tensor,
    bias: Any,
    prefix: Tensor | None,
    position: Any,
    keep: Tensor | None,
    *_: Any,
) -> Tensor:
    gh, gw = grid(pixels, weight)
    rows = (gh * gw if keep is None else keep.shape[1]) + (0 if prefix is None else prefix.shape[0])
    return weight.new_empty((pixels.shape[0], rows, weight.shape[0]))


def _backward_fake(
    dout: Tensor,
    pixels: Tensor,
    weight: Tensor,
    keep: Any,
    mask: Any,
    mean: Any,
    std: Any,
    prefix_rows: int,
    position_rows: int,
    *needs: bool,
) -> tuple[Tensor, ...]:
    c = weight.shape[0]
    sizes = (pixels.shape, weight.shape, (c,), (prefix_rows, c), (position_rows, c), (c,))
    return tuple(
        weight.new_empty(size if needed else (0,)) for size, needed in zip(sizes, needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    pixels, weight, _, prefix, position, keep, mask, _, mean, std = inputs
    ctx.save_for_backward(pixels, weight, keep, mask, mean, std)
    ctx.rows = (0 if prefix is None else prefix.shape[0], 0 if position is None else position.shape[0])


def _backward_call(ctx: Any, backward_op: Any, dout: Tensor) -> tuple[Any, ...]:
    pixels, weight, bias, prefix, position, _, _, mask_token, _, _ = ctx.needs_input_grad
    needs = (pixels, weight, bias, prefix, position, mask_token)
    if not any(needs):
        return (None,) * 10
    found = backward_op(dout, *ctx.saved_tensors, *ctx.rows, *needs)
    dpixels, dweight, dbias, dprefix, dposition, dmask_token = (
        gradient if needed else None for gradient, needed in zip(found, needs, strict=True)
    )
    return dpixels, dweight, dbias, dprefix, dposition, None, None, dmask_token, None, None


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def bytes_(*size: int) -> Tensor:
        return torch.randint(0, 256, size, dtype=torch.uint8)

    def weight(c: int, cin: int, ph: int, pw: int) -> Tensor:
        return (torch.randn(c, cin, ph, pw, dtype=torch.float64) * (cin * ph * pw) ** -0.5).to(dtype)

    mean, std = (0.48, 0.45, 0.41), (0.27, 0.26, 0.28)
    yield Sample("one patch", (rand(1, 3, 4, 4), weight(5, 3, 4, 4), rand(5)))
    yield Sample("one pixel a patch", (rand(2, 1, 3, 2), weight(4, 1, 1, 1)))
    yield Sample("no image", (rand(0, 3, 8, 8), weight(5, 3, 4, 4), rand(5)), {"prefix": rand(1, 5)})
    yield Sample("no patch", (rand(2, 3, 0, 8), weight(5, 3, 4, 4), rand(5)), {"prefix": rand(2, 5)})
    yield Sample(
        "oblong",
        (rand(2, 3, 12, 20), weight(19, 3, 6, 4), rand(19)),
        {"prefix": rand(1, 19), "position": rand(11, 19)},
    )
    yield Sample(
        "position of the patches only",
        (rand(3, 2, 9, 15), weight(8, 2, 3, 5), rand(8)),
        {"prefix": rand(5, 8), "position": rand(9, 8)},
    )
    for patch, c in ((14, 40), (16, 24), (32, 33)):
        yield Sample(
            f"patch of {patch}",
            (rand(2, 3, 2 * patch, 3 * patch), weight(c, 3, patch, patch), rand(c)),
            {"prefix": rand(1, c), "position": rand(7, c)},
        )
    yield Sample(
        "bytes",
        (bytes_(2, 3, 28, 42), weight(20, 3, 14, 14), rand(20)),
        {"position": rand(6, 20), "mean": mean, "std": std},
    )
    yield Sample("bytes alone", (bytes_(2, 1, 8, 8), weight(6, 1, 4, 4)))
    yield Sample(
        "bytes, channels last",
        (
            bytes_(2, 3, 32, 48).contiguous(memory_format=torch.channels_last),
            weight(20, 3, 16, 16),
            rand(20),
        ),
        {"mean": mean, "std": std, "prefix": rand(1, 20)},
    )
    yield Sample("normalized", (rand(2, 3, 8, 12), weight(7, 3, 4, 4), rand(7)), {"mean": mean, "std": std})
    yield Sample(
        "channels last",
        (rand(2, 3, 12, 8).contiguous(memory_format=torch.channels_last), weight(9, 3, 4, 4), rand(9)),
    )
    yield Sample(
        "strided",
        (
            rand(2, 3, 24, 16)[:, :, ::2, 1::2].flip(0),
            weight(9, 3, 4, 4).transpose(2, 3),
            rand(18)[::2],
        ),
        {"position": rand(9, 6).t(), "prefix": rand(9, 2).t()},
    )
    keep = torch.stack([torch.randperm(12)[:5] for _ in range(3)])
    yield Sample(
        "keep",
        (rand(3, 3, 12, 16), weight(10, 3, 4, 4), rand(10)),
        {"prefix": rand(1, 10), "position": rand(13, 10), "keep": keep},
    )
    yield Sample(
        "keep one twice, none of some",
        (bytes_(2, 3, 8, 8), weight(10, 3, 4, 4), rand(10)),
        {"position": rand(4, 10), "keep": torch.tensor([[1, 1, 3], [0, 2, 0]]), "mean": mean, "std": std},
    )
    yield Sample(
        "keep nothing",
        (rand(2, 3, 8, 8), weight(10, 3, 4, 4), rand(10)),
        {"prefix": rand(1, 10), "position": rand(5, 10), "keep": torch.zeros(2, 0, dtype=torch.int64)},
    )
    mask = torch.rand(2, 12) < 0.4
    yield Sample(
        "mask",
        (rand(2, 3, 12, 16), weight(21, 3, 4, 4), rand(21)),
        {"prefix": rand(1, 21), "position": rand(13, 21), "mask": mask, "mask_token": rand(21)},
    )
    yield Sample(
        "mask and keep",
        (rand(2, 3, 12, 16), weight(21, 3, 4, 4)),
        {
            "keep": torch.stack([torch.randperm(12)[:7] for _ in range(2)]),
            "mask": mask,
            "mask_token": rand(21),
        },
    )
    yield Sample(
        "several tiles",
        (rand(3, 3, 64, 64), weight(150, 3, 8, 8), rand(150)),
        {"prefix": rand(1, 150), "position": rand(65, 150)},
    )


def _eager(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    prefix: Tensor | None = None,
    position: Tensor | None = None,
    keep: Tensor | None = None,
    mask: Tensor | None = None,
    mask_token: Tensor | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> Tensor:
    """The convolution, as timm's and transformers' models write it."""
    if 0 in pixels.shape[2:]:
        raise NotImplementedError("a convolution needs a pixel")
    x = normalized(pixels, weight, _constants("mean", mean, weight), _constants("std", std, weight))
    tokens = F.conv2d(x, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    if mask is not None:
        assert mask_token is not None
        tokens = torch.where(mask[..., None], mask_token, tokens)
    p, n = (0 if prefix is None else prefix.shape[0]), tokens.shape[1]
    if position is not None:
        tokens = tokens + position[position.shape[0] - n :]
    if keep is not None:
        tokens = tokens.gather(1, along(keep, tokens.shape[2]))
    if prefix is None:
        return tokens
    if position is not None and position.shape[0] > n:
        prefix = prefix + position[:p]
    return torch.cat([prefix.expand(tokens.shape[0], *prefix.shape), tokens], 1)


def _workloads() -> Sequence[Workload]:
    def make(patch: int, c: int, kept: float) -> Any:
        def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            b, n = 8, (224 // patch) ** 2
            weight = torch.randn(c, 3, patch, patch) * (3 * patch * patch) ** -0.5
            kwargs = {"prefix": torch.randn(1, c).to(dtype), "position": torch.randn(n + 1, c).to(dtype)}
            if kept < 1:
                kwargs["keep"] = torch.rand(b, n).argsort(1)[:, : int(n * kept)]
            return (torch.randn(b, 3, 224, 224).to(dtype), weight.to(dtype), torch.randn(c).to(dtype)), kwargs

        return inputs

    rows = [
        (patch, c, kept, dtype)
        for patch, c, kept in ((16, 768, 1.0), (32, 768, 1.0), (14, 1024, 1.0), (16, 768, 0.25))
        for dtype in (torch.bfloat16, torch.float32)
    ]
    return [
        Workload(
            f"B=8 224x224 p={patch} C={c}" + (f" keep {kept:.0%}" if kept < 1 else ""),
            dtype,
            make(patch, c, kept),
            gemm=(8 * int((224 // patch) ** 2 * kept), c, 3 * patch * patch),
            gemms=1,
            gemms_backward=1,
            fixed=(0,),
        )
        for patch, c, kept, dtype in rows
    ]


OP = register(
    Op(
        name=NAME,
        function=patch_embed,
        forward=Kernel(
            "(Tensor pixels, Tensor weight, Tensor? bias, Tensor? prefix, Tensor? position, Tensor? keep,"
            " Tensor? mask, Tensor? mask_token, Tensor? mean, Tensor? std) -> Tensor",
            reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dout, Tensor pixels, Tensor weight, Tensor? keep, Tensor? mask, Tensor? mean,"
            " Tensor? std, int prefix_rows, int position_rows, bool need_pixels, bool need_weight,"
            " bool need_bias, bool need_prefix, bool need_position, bool need_mask_token)"
            " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
            backward_reference,
            _backward_fake,
        ),
        setup_context=_setup_context,
        backward_call=_backward_call,
        samples=_samples,
        workloads=_workloads,
        eager=_eager,
    )
)
