"""Patch embedding in Triton: gather, product and epilogue in one kernel, without a patch matrix.

Parallel: one program per tile of tokens x channels. On chip: the accumulators of a tile; pixels are read
where they lie, normalized in float32 and rounded to the weight's type just before they are multiplied.
Bytes: pixels once per tile of channels and the weight once per tile of tokens (L2 serves the repeats), the
result once. Ragged edges: rows, channels and the summed dimension are masked with zeros.

Backward, each gradient in a kernel that owns what it writes, so nothing is added atomically: the weight's
and the pixels' are products that gather or scatter in the same way; the sums over tokens loop in a fixed
order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymm.triton_kernels._common import EVERY_REGISTER, POINTERS, Compilation, cdiv, dot_precision, float_only

TILE = 64


def _depth(dtype: torch.dtype) -> int:
    return 16 if dtype == torch.float32 else 32


def _options(dtype: torch.dtype, normalized: bool) -> dict[str, int]:
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 2, **EVERY_REGISTER}
    return {"num_warps": 8 if normalized else 4, "num_stages": 3}


def _side(dtype: torch.dtype, normalized: bool) -> int:
    """Rows of a tile whose pixels are gathered; normalizing float32 leaves registers for half as many."""
    return TILE // 2 if dtype == torch.float32 and normalized else TILE


@triton.jit
def _patch_base(p_keep, o_r, m_r, R, GW, s_b, s_h, s_w, PH, PW, KEEP: tl.constexpr):
    """Image, patch number and offset of the first pixel of each row of the token matrix."""
    o_b = (o_r // R).to(tl.int64)
    o_n = (o_r % R).to(tl.int64)
    if KEEP:
        o_n = tl.load(p_keep + o_r, m_r, other=0)
    base = o_b * s_b + (o_n // GW) * PH * s_h + (o_n % GW) * PW * s_w
    return o_b, o_n, base


@triton.jit
def _load_pixels(
    p_pixels, base, m_rows, o_k, m_k, s_c, s_h, s_w, PH, PW, p_mean, p_std,
    BYTES: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """The pixels of some rows at some places of a patch, normalized: `[rows, k]` in TYPE."""
    i_c = o_k // (PH * PW)
    offset = i_c.to(tl.int64) * s_c + (o_k // PW % PH).to(tl.int64) * s_h + (o_k % PW).to(tl.int64) * s_w
    mask = m_rows[:, None] & m_k[None, :]
    b_x = tl.load(p_pixels + base[:, None] + offset[None, :], mask, other=0)
    if BYTES or MEAN or STD:
        b_x = b_x.to(tl.float32)
        if BYTES:
            b_x = b_x / 255.0
        if MEAN:
            b_x -= tl.load(p_mean + i_c, m_k, other=0.0)[None, :]
        if STD:
            b_x = b_x / tl.load(p_std + i_c, m_k, other=1.0)[None, :]
        b_x = tl.where(mask, b_x, 0.0)
    return b_x.to(TYPE)


@triton.jit
def patch_embed_fwd_kernel(
    p_pixels, p_weight, p_bias, p_position, p_keep, p_mask, p_token, p_mean, p_std, p_out,
    ROWS, R, N, C, K, PH, PW, GW, P, s_b, s_c, s_h, s_w,
    BIAS: tl.constexpr, POSITION: tl.constexpr, KEEP: tl.constexpr, MASK: tl.constexpr,
    BYTES: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    m_r, m_c = o_r < ROWS, o_c < C
    o_b, o_n, base = _patch_base(p_keep, o_r, m_r, R, GW, s_b, s_h, s_w, PH, PW, KEEP)
    acc = tl.zeros((BR, BC), tl.float32)
    for first in range(0, K, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < K
        b_x = _load_pixels(p_pixels, base, m_r, o_k, m_k, s_c, s_h, s_w, PH, PW, p_mean, p_std,
                           BYTES, MEAN, STD, p_weight.dtype.element_ty)  # fmt: skip
        p_tile = p_weight + o_c[:, None].to(tl.int64) * K + o_k[None, :]
        b_w = tl.load(p_tile, m_c[:, None] & m_k[None, :], other=0.0)
        acc = tl.dot(b_x, tl.trans(b_w), acc, input_precision=PRECISION)  # [BR, BC]
    if BIAS:
        acc += tl.load(p_bias + o_c, m_c, other=0.0).to(tl.float32)[None, :]
    if MASK:
        hidden = tl.load(p_mask + o_b * N + o_n, m_r, other=0) != 0
        token = tl.load(p_token + o_c, m_c, other=0.0).to(tl.float32)
        acc = tl.where(hidden[:, None], token[None, :], acc)
    if POSITION:
        p_tile = p_position + o_n[:, None] * C + o_c[None, :]
        acc += tl.load(p_tile, m_r[:, None] & m_c[None, :], other=0.0).to(tl.float32)
    o_out = o_b * (P + R) + P + o_r % R
    p_tile = p_out + o_out[:, None] * C + o_c[None, :]
    tl.store(p_tile, acc.to(p_out.dtype.element_ty), m_r[:, None] & m_c[None, :])


@triton.jit
def patch_embed_bwd_weight_kernel(
    p_rows, p_pixels, p_keep, p_mean, p_std, p_dweight,
    ROWS, R, C, K, PH, PW, GW, s_b, s_c, s_h, s_w,
    KEEP: tl.constexpr, BYTES: tl.constexpr, MEAN: tl.constexpr, STD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dW[c, k] = sum over rows of g[row, c] x[row, k]."""
    o_c = tl.program_id(0) * BC + tl.arange(0, BC)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_c, m_k = o_c < C, o_k < K
    acc = tl.zeros((BC, BK), tl.float32)
    for first in range(0, ROWS, BR):
        o_r = first + tl.arange(0, BR)
        m_r = o_r < ROWS
        _, _, base = _patch_base(p_keep, o_r, m_r, R, GW, s_b, s_h, s_w, PH, PW, KEEP)
        b_x = _load_pixels(p_pixels, base, m_r, o_k, m_k, s_c, s_h, s_w, PH, PW, p_mean, p_std,
                           BYTES, MEAN, STD, p_rows.dtype.element_ty)  # fmt: skip
        p_tile = p_rows + o_r[:, None].to(tl.int64) * C + o_c[None, :]
        b_g = tl.load(p_tile, m_r[:, None] & m_c[None, :], other=0.0)
        acc = tl.dot(tl.trans(b_g), b_x, acc, input_precision=PRECISION)  # [BC, BK]
    p_tile = p_dweight + o_c[:, None].to(tl.int64) * K + o_k[None, :]
    tl.store(p_tile, acc.to(p_dweight.dtype.element_ty), m_c[:, None] & m_k[None, :])


@triton.jit
def patch_embed_bwd_pixels_kernel(
    p_rows, p_weight, p_std, p_dpixels,
    ROWS, N, C, K, PH, PW, GW, s_b, s_c, s_h, s_w,
    STD: tl.constexpr,
    BR: tl.constexpr, BC: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx[row, k] = sum over c of g[row, c] W[c, k], written where the pixel lies; one row per patch."""
    o_r = tl.program_id(0) * BR + tl.arange(0, BR)
    o_k = tl.program_id(1) * BK + tl.arange(0, BK)
    m_r, m_k = o_r < ROWS, o_k < K
    acc = tl.zeros((BR, BK), tl.float32)
    for first in range(0, C, BC):
        o_c = first + tl.arange(0, BC)
        m_c = o_c < C
        p_tile = p_rows + o_r[:, None].to(tl.int64) * C + o_c[None, :]
        b_g = tl.load(p_tile, m_r[:, None] & m_c[None, :], other=0.0)
        p_tile = p_weight + o_c[:, None].to(tl.int64) * K + o_k[None, :]
        b_w = tl.load(p_tile, m_c[:, None] & m_k[None, :], other=0.0)
        acc = tl.dot(b_g, b_w, acc, input_precision=PRECISION)  # [BR, BK]
    i_c = o_k // (PH * PW)
    if STD:
        acc = acc / tl.load(p_std + i_c, m_k, other=1.0)[None, :]
    _, _, base = _patch_base(p_std, o_r, m_r, N, GW, s_b, s_h, s_w, PH, PW, False)
    offset = i_c.to(tl.int64) * s_c + (o_k // PW % PH).to(tl.int64) * s_h + (o_k % PW).to(tl.int64) * s_w
    p_tile = p_dpixels + base[:, None] + offset[None, :]
    tl.store(p_tile, acc.to(p_dpixels.dtype.element_ty), m_r[:, None] & m_k[None, :])


@triton.jit
def patch_embed_bwd_gather_kernel(
    p_rows, p_keep, p_out, K, N, C, s_rows, BC: tl.constexpr, ALL: tl.constexpr
):
    """Sum of the rows whose patch is n, in their order: of one image, or of all ALL images."""
    i_n = tl.program_id(0)
    o_c = tl.program_id(1) * BC + tl.arange(0, BC)
    i_b = tl.program_id(2).to(tl.int64)
    m_c = o_c < C
    acc = tl.zeros((BC,), tl.float32)
    for i in range(K * ALL):
        row = i_b * K + i
        if tl.load(p_keep + row) == i_n:
            acc += tl.load(p_rows + row * s_rows + o_c, m_c, other=0.0).to(tl.float32)
    tl.store(p_out + (i_b * N + i_n) * C + o_c, acc.to(p_out.dtype.element_ty), m_c)


def _normalized(pixels: Tensor, mean: Tensor | None, std: Tensor | None) -> bool:
    return pixels.dtype == torch.uint8 or mean is not None or std is not None


class _Problem:
    """The sizes and switches that the kernels of one call share."""

    def __init__(self, pixels: Tensor, weight: Tensor, keep: Tensor | None, normalized: bool) -> None:
        self.batch = pixels.shape[0]
        self.c, _, self.ph, self.pw = weight.shape
        self.k = weight[0].numel()
        self.gw = pixels.shape[3] // self.pw
        self.n = self.gw * (pixels.shape[2] // self.ph)
        self.r = self.n if keep is None else keep.shape[1]
        self.rows = self.batch * self.r
        self.depth, self.options = _depth(weight.dtype), _options(weight.dtype, normalized)
        self.side = _side(weight.dtype, normalized)


def _forward(
    pixels: Tensor, weight: Tensor, bias: Tensor | None, prefix: Tensor | None, position: Tensor | None,
    keep: Tensor | None, mask: Tensor | None, mask_token: Tensor | None, mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:  # fmt: skip
    weight = weight.contiguous()
    s = _Problem(pixels, weight, keep, _normalized(pixels, mean, std))
    p = 0 if prefix is None else prefix.shape[0]
    out = weight.new_empty((s.batch, p + s.r, s.c))
    if prefix is not None:
        both = position is not None and position.shape[0] > s.n
        out[:, :p] = prefix + position[:p] if both and position is not None else prefix
    if s.rows == 0 or s.c == 0:
        return out
    own = position[position.shape[0] - s.n :].contiguous() if position is not None else weight
    patch_embed_fwd_kernel[(cdiv(s.rows, s.side), cdiv(s.c, TILE))](
        pixels,
        weight,
        _or(bias, weight),
        own,
        _or(keep, weight),
        mask.contiguous().view(torch.uint8) if mask is not None else weight,
        _or(mask_token, weight),
        _or(mean, weight),
        _or(std, weight),
        out,
        s.rows, s.r, s.n, s.c, s.k, s.ph, s.pw, s.gw, p, *pixels.stride(),
        bias is not None, position is not None, keep is not None, mask is not None,
        pixels.dtype == torch.uint8, mean is not None, std is not None,
        s.side, TILE, s.depth, dot_precision(weight), **s.options,
    )  # fmt: skip
    return out


def _or(t: Tensor | None, unused: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not read when it is None."""
    return unused if t is None else t.contiguous()


def _backward(
    dout: Tensor, pixels: Tensor, weight: Tensor, keep: Tensor | None, mask: Tensor | None,
    mean: Tensor | None, std: Tensor | None, prefix_rows: int, position_rows: int, need_pixels: bool,
    need_weight: bool, need_bias: bool, need_prefix: bool, need_position: bool, need_mask_token: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    weight = weight.contiguous()
    s = _Problem(pixels, weight, keep, _normalized(pixels, mean, std))
    none = weight.new_empty((0,))
    dpixels = dweight = dbias = dprefix = dposition = dmask_token = none
    dtokens = dout[:, prefix_rows:].contiguous()  # (B, R, C)
    if need_prefix:
        dprefix = dout[:, :prefix_rows].sum(0)
    if need_position:
        own = dtokens.sum(0) if keep is None else _gathered(dtokens, keep, s, True)
        both = position_rows > s.n
        dposition = torch.cat([dout[:, :prefix_rows].sum(0), own]) if both else own
    if mask is not None:
        hidden = (mask if keep is None else mask.gather(1, keep))[..., None]
        if need_mask_token:
            dmask_token = torch.where(hidden, dtokens, 0).sum((0, 1))
        dtokens = torch.where(hidden, 0, dtokens)
    if need_bias:
        dbias = dtokens.sum((0, 1))
    if need_weight:
        dweight = torch.zeros_like(weight)
        if s.rows and weight.numel():
            patch_embed_bwd_weight_kernel[(cdiv(s.c, s.side), cdiv(s.k, TILE))](
                dtokens, pixels, _or(keep, weight), _or(mean, weight), _or(std, weight), dweight,
                s.rows, s.r, s.c, s.k, s.ph, s.pw, s.gw, *pixels.stride(),
                keep is not None, pixels.dtype == torch.uint8, mean is not None, std is not None,
                s.depth, s.side, TILE, dot_precision(weight), **_options(weight.dtype, False),
            )  # fmt: skip
    if need_pixels:
        dpixels = _pixels_gradient(dtokens, pixels, weight, keep, std, s)
    return dpixels, dweight, dbias, dprefix, dposition, dmask_token


def _gathered(dtokens: Tensor, keep: Tensor, s: _Problem, over_images: bool) -> Tensor:
    """`(N, C)` or `(B, N, C)`: the gradient of each patch, summed where it was kept more than once."""
    images = 1 if over_images else s.batch
    out = dtokens.new_zeros((images, s.n, s.c))
    if out.numel() and s.rows:
        block = min(1024, triton.next_power_of_2(s.c))
        patch_embed_bwd_gather_kernel[(s.n, cdiv(s.c, block), images)](
            dtokens, keep.contiguous(), out, s.r, s.n, s.c, s.c, block, s.batch if over_images else 1
        )
    return out[0] if over_images else out


def _pixels_gradient(
    dtokens: Tensor, pixels: Tensor, weight: Tensor, keep: Tensor | None, std: Tensor | None, s: _Problem
) -> Tensor:
    dpixels = torch.empty_like(pixels, memory_format=torch.contiguous_format)
    if dpixels.numel() == 0:
        return dpixels
    rows = dtokens if keep is None else _gathered(dtokens, keep, s, False)
    count = s.batch * s.n
    patch_embed_bwd_pixels_kernel[(cdiv(count, TILE), cdiv(s.k, TILE))](
        rows, weight, _or(std, weight), dpixels,
        count, s.n, s.c, s.k, s.ph, s.pw, s.gw, *dpixels.stride(), std is not None,
        TILE, s.depth, TILE, dot_precision(weight), **s.options,
    )  # fmt: skip
    return dpixels


IMPLEMENTATIONS = {"patch_embed": _forward, "patch_embed_backward": _backward}


def limits(pixels: Tensor, weight: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(weight)


def compilations() -> Iterator[Compilation]:
    """Configurations that the host functions launch: the plainest, and the one with every option."""
    geometry = dict.fromkeys(("K", "PH", "PW", "GW", "s_b", "s_c", "s_h", "s_w"), "i32")
    for dtype, pointer in POINTERS.items():
        depth = _depth(dtype)
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            for every in (False, True):
                label = f"{dtype} {precision} {'with every option' if every else 'plain'}"
                pixels = "*u8" if every else pointer
                options, side = _options(dtype, every), _side(dtype, every)
                optional = {"p_keep": "*i64", "p_mean": "*fp32", "p_std": "*fp32"}
                shared = {"KEEP": every, "BYTES": every, "MEAN": every, "STD": every, "PRECISION": precision}
                integers = {**geometry, **dict.fromkeys(("ROWS", "R", "C"), "i32")}
                yield Compilation(
                    f"forward {label}",
                    patch_embed_fwd_kernel,
                    {"p_pixels": pixels, "p_weight": pointer, "p_bias": pointer, "p_position": pointer,
                     **optional, "p_mask": "*u8", "p_token": pointer, "p_out": pointer, **integers,
                     "N": "i32", "P": "i32"},
                    {**shared, "BIAS": True, "POSITION": True, "MASK": every,
                     "BR": side, "BC": TILE, "BK": depth},
                    options,
                )  # fmt: skip
                yield Compilation(
                    f"backward weight {label}",
                    patch_embed_bwd_weight_kernel,
                    {"p_rows": pointer, "p_pixels": pixels, **optional, "p_dweight": pointer, **integers},
                    {**shared, "BR": depth, "BC": side, "BK": TILE},
                    _options(dtype, False),
                )
                yield Compilation(
                    f"backward pixels {label}",
                    patch_embed_bwd_pixels_kernel,
                    {"p_rows": pointer, "p_weight": pointer, "p_std": "*fp32", "p_dpixels": pointer,
                     **geometry, **dict.fromkeys(("ROWS", "N", "C"), "i32")},
                    {"STD": every, "PRECISION": precision, "BR": TILE, "BC": depth, "BK": TILE},
                    options,
                )  # fmt: skip
        yield Compilation(
            f"backward gather {dtype}",
            patch_embed_bwd_gather_kernel,
            {"p_rows": pointer, "p_keep": "*i64", "p_out": pointer,
             **dict.fromkeys(("K", "N", "C", "s_rows"), "i32")},
            {"BC": 1024, "ALL": 8},
        )  # fmt: skip
