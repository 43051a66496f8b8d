"""A linear layer in Triton: one product kernel for all three products, bias, activation and residual in it.

Parallel: one program per tile of the result, tiles in groups of rows so that L2 serves the repeats. On chip:
the accumulators, to which bias, activation and residual are applied before they are rounded once. Bytes: the
operands once per tile, the result once. Ragged edges: masked loads give zeros.

Backward: the activation's gradient in one pass over its input, then two products by the same kernel, whose
operands may have any strides.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymm.triton_kernels._common import (
    EVERY_REGISTER,
    POINTERS,
    Compilation,
    cdiv,
    dot_precision,
    float_only,
    precisions,
    signature_of,
)

ACTIVATIONS = (None, "gelu", "gelu_tanh", "quick_gelu", "relu", "silu")
GROUP = 8  # tiles of rows that share their columns
SQRT_HALF = tl.constexpr(0.5**0.5)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)
QUICK = tl.constexpr(1.702)


@triton.jit
def _sigmoid(z):
    small = tl.exp(-tl.abs(z))
    return tl.where(z >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _tanh(z):
    small = tl.exp(-2.0 * tl.abs(z))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(z >= 0, size, -size)


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """f(z); the numbers are the places in `ACTIVATIONS`."""
    if ACTIVATION == 1:
        z = 0.5 * z * (1.0 + tl.erf(z * SQRT_HALF))
    elif ACTIVATION == 2:
        z = 0.5 * z * (1.0 + _tanh((z + z * z * z * CUBIC) * SQRT_2_OVER_PI))
    elif ACTIVATION == 3:
        z = z * _sigmoid(z * QUICK)
    elif ACTIVATION == 4:
        z = tl.where(z <= 0, 0.0, z)  # NaN stays
    elif ACTIVATION == 5:
        z = z * _sigmoid(z)
    return z


@triton.jit
def _slope(z, ACTIVATION: tl.constexpr):
    """f'(z)."""
    if ACTIVATION == 1:
        slope = 0.5 * (1.0 + tl.erf(z * SQRT_HALF)) + z * INV_SQRT_2PI * tl.exp(-0.5 * z * z)
    elif ACTIVATION == 2:
        t = _tanh((z + z * z * z * CUBIC) * SQRT_2_OVER_PI)
        slope = 0.5 * (1.0 + t)
        slope += 0.5 * z * (1.0 - t * t) * SQRT_2_OVER_PI * (1.0 + 3.0 * (z * z * CUBIC))
    elif ACTIVATION == 3:
        s = _sigmoid(z * QUICK)
        slope = s + z * QUICK * s * (1.0 - s)
    elif ACTIVATION == 4:
        slope = tl.where(z <= 0, 0.0, 1.0)
    else:
        s = _sigmoid(z)
        slope = s + z * s * (1.0 - s)
    return slope


@triton.jit
def linear_product_kernel(
    p_a, p_b, p_bias, p_residual, p_pre, p_out, M, N, K, s_am, s_ak, s_bn, s_bk, s_rm, s_rn,
    ACTIVATION: tl.constexpr, BIAS: tl.constexpr, RESIDUAL: tl.constexpr, KEEP: tl.constexpr,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[m, n] = f(sum over k of a[m, k] b[n, k] + bias[n]) + residual[m, n]; pre is f's argument."""
    i = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    group = i // (GROUP * tiles_n)
    size = tl.minimum(tiles_m - group * GROUP, GROUP)
    i_m = group * GROUP + i % (GROUP * tiles_n) % size
    i_n = i % (GROUP * tiles_n) // size
    o_m = i_m * BM + tl.arange(0, BM)
    o_n = i_n * BN + tl.arange(0, BN)
    m_m, m_n = o_m < M, o_n < N
    p_rows = p_a + o_m[:, None].to(tl.int64) * s_am
    p_columns = p_b + o_n[:, None].to(tl.int64) * s_bn
    acc = tl.zeros((BM, BN), tl.float32)
    for first in range(0, K, BK):
        o_k = first + tl.arange(0, BK)
        m_k = o_k < K
        wide_k = o_k[None, :].to(tl.int64)
        a = tl.load(p_rows + wide_k * s_ak, m_m[:, None] & m_k[None, :], other=0.0)
        b = tl.load(p_columns + wide_k * s_bk, m_n[:, None] & m_k[None, :], other=0.0)
        acc = tl.dot(a, tl.trans(b), acc, input_precision=PRECISION)
    inside = m_m[:, None] & m_n[None, :]
    wide_m = o_m[:, None].to(tl.int64)
    if BIAS:
        acc += tl.load(p_bias + o_n, m_n, other=0.0).to(tl.float32)[None, :]
    if KEEP:
        tl.store(p_pre + wide_m * N + o_n[None, :], acc.to(p_pre.dtype.element_ty), inside)
    acc = _activate(acc, ACTIVATION)
    if RESIDUAL:
        p_tile = p_residual + wide_m * s_rm + o_n[None, :].to(tl.int64) * s_rn
        acc += tl.load(p_tile, inside, other=0.0).to(tl.float32)
    tl.store(p_out + wide_m * N + o_n[None, :], acc.to(p_out.dtype.element_ty), inside)


@triton.jit
def linear_slope_kernel(p_dout, p_pre, p_dz, NUMBERS, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    """dz = dout f'(pre), of dense tensors."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < NUMBERS
    dout = tl.load(p_dout + at, mask, other=0.0).to(tl.float32)
    z = tl.load(p_pre + at, mask, other=0.0).to(tl.float32)
    tl.store(p_dz + at, (dout * _slope(z, ACTIVATION)).to(p_dz.dtype.element_ty), mask)


BLOCK = 1024


def _tile(dtype: torch.dtype, bare: bool) -> dict[str, Any]:
    """The largest tile that spills no register on any GPU, and the launch's options.

    bare: without an epilogue, which takes registers for its addresses.
    """
    if dtype == torch.float32:
        return {"GROUP": GROUP, "BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 2,
                **EVERY_REGISTER}  # fmt: skip
    rows = 128 if bare else 64
    return {"GROUP": GROUP, "BM": rows, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 3,
            **EVERY_REGISTER}  # fmt: skip


def _product(
    a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, activation: str | None = None,
    residual: Tensor | None = None, pre: Tensor | None = None,
) -> None:  # fmt: skip
    """`out = a b^T` with the epilogue, of matrices; out and pre are dense."""
    m, n = out.shape
    bare = bias is None and activation is None and residual is None
    tile = _tile(a.dtype, bare)
    if m and n:
        linear_product_kernel[(cdiv(m, tile["BM"]) * cdiv(n, tile["BN"]),)](
            a, b, _or(bias, out), _or(residual, out), _or(pre, out), out, m, n, a.shape[1],
            *a.stride(), *b.stride(), *(residual.stride() if residual is not None else (0, 0)),
            ACTIVATION=ACTIVATIONS.index(activation), BIAS=bias is not None,
            RESIDUAL=residual is not None, KEEP=pre is not None, PRECISION=dot_precision(a), **tile,
        )  # fmt: skip


def _or(t: Tensor | None, unused: Tensor) -> Tensor:
    """A pointer for an argument that the kernel will not read when it is None."""
    return unused if t is None else t


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    n = weight.shape[0]
    out = x.new_empty((*x.shape[:-1], n))
    kept = keep and activation is not None
    pre = torch.empty_like(out) if kept else x.new_empty((0,))
    rows = out.shape[:-1].numel()
    flat = residual.reshape(rows, n) if residual is not None else None
    dense = bias.contiguous() if bias is not None else None
    _product(x.reshape(rows, x.shape[-1]), weight, out.view(rows, n), dense, activation, flat,
             pre.view(rows, n) if kept else None)  # fmt: skip
    return out, pre


def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, pre: Tensor | None,
    activation: str | None, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    n, width = weight.shape
    rows = x.shape[:-1].numel()
    flat = x.reshape(rows, width)
    dz = dout.reshape(rows, n)
    if activation is not None:
        if pre is None:
            pre = x.new_empty((rows, n))
            _product(flat, weight, pre, bias.contiguous() if bias is not None else None)
        dense = dz.contiguous()
        dz = torch.empty_like(dense)
        if dz.numel():
            linear_slope_kernel[(cdiv(dz.numel(), BLOCK),)](
                dense, pre, dz, dz.numel(), ACTIVATIONS.index(activation), BLOCK
            )
    none = x.new_empty((0,))
    dx = dweight = none
    if need_x:
        dx = x.new_empty(x.shape)
        _product(dz, weight.mT, dx.view(rows, width))
    if need_weight:
        dweight = weight.new_empty(weight.shape)
        _product(dz.mT, flat.mT, dweight)
    return dx, dweight, dz.sum(0) if need_bias else none


IMPLEMENTATIONS = {"linear": _forward, "linear_backward": _backward}


def limits(x: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(x)


def compilations() -> Iterator[Compilation]:
    """The bare product, and each activation with everything."""
    for dtype, pointer in POINTERS.items():
        names = ("p_a", "p_b", "p_bias", "p_residual", "p_pre", "p_out", "p_dout", "p_dz")
        types = dict.fromkeys(names, pointer)
        for precision in precisions(dtype):
            usual = dtype == torch.bfloat16
            for number, name in enumerate(ACTIVATIONS if usual else ACTIVATIONS[:2]):
                every = name is not None
                tile = _tile(dtype, not every)
                options = {k: tile.pop(k) for k in ("num_warps", "num_stages", "maxnreg")}
                constants = {"ACTIVATION": number, "BIAS": every, "RESIDUAL": every, "KEEP": every,
                             "PRECISION": precision, **tile}  # fmt: skip
                yield Compilation(
                    f"product {dtype} {precision} {name or 'bare'}",
                    linear_product_kernel,
                    signature_of(linear_product_kernel, types, constants),
                    constants,
                    options,
                )
        for number, name in enumerate(ACTIVATIONS[1:] if usual else ACTIVATIONS[1:2], 1):
            constants = {"ACTIVATION": number, "BLOCK": BLOCK}
            yield Compilation(
                f"slope {dtype} {name}",
                linear_slope_kernel,
                signature_of(linear_slope_kernel, types, constants),
                constants,
            )
