"""Pairwise cosine similarity in Triton.

Parallel: one program per tile of the result and batch. On chip: the accumulators of a tile, and the squared
norms of its rows and columns, which are summed from the very blocks that are multiplied, so no normalized
copy exists and no second pass reads x or y. Bytes: x and y once per tile row or column (L2 serves the
repeats), the result once. Ragged edges: every load is masked with zeros, which change neither products nor
norms.

Backward: with T = dout . y^, dx = (T - <T, x^> x^) / ||x||. One kernel makes T tile by tile in float32, one
closes each row; the same pair serves dy with the roles exchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymm.triton_kernels._common import EVERY_REGISTER, POINTERS, Compilation, cdiv, dot_precision, float_only

TILE = 64  # rows and columns of the accumulators of one program


def _depth(dtype: torch.dtype) -> int:
    """The block of the summed dimension: the largest that spills no register."""
    return 16 if dtype == torch.float32 else 32


def _options(dtype: torch.dtype) -> dict[str, int]:
    if dtype == torch.float32:
        return {"num_warps": 8, "num_stages": 2, **EVERY_REGISTER}
    return {"num_warps": 4, "num_stages": 3}


@triton.jit
def cosine_fwd_kernel(
    p_x, p_y, p_out, p_inv_x, p_inv_y,
    N, M, D, s_y, eps,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_n, i_m, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_m = i_m * BM + tl.arange(0, BM)
    m_n, m_m = o_n < N, o_m < M
    p_x += i_b * N * D
    p_y += i_b * s_y
    acc = tl.zeros((BN, BM), tl.float32)
    square_x = tl.zeros((BN,), tl.float32)
    square_y = tl.zeros((BM,), tl.float32)
    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        m_d = o_d < D
        b_x = tl.load(
            p_x + o_n[:, None].to(tl.int64) * D + o_d[None, :], m_n[:, None] & m_d[None, :], other=0.0
        )
        b_y = tl.load(
            p_y + o_m[:, None].to(tl.int64) * D + o_d[None, :], m_m[:, None] & m_d[None, :], other=0.0
        )
        acc = tl.dot(b_x, tl.trans(b_y), acc, input_precision=PRECISION)  # [BN, BM]
        square_x += tl.sum(b_x.to(tl.float32) * b_x.to(tl.float32), 1)
        square_y += tl.sum(b_y.to(tl.float32) * b_y.to(tl.float32), 1)
    inv_x = 1.0 / tl.maximum(tl.sqrt(square_x), eps)
    inv_y = 1.0 / tl.maximum(tl.sqrt(square_y), eps)
    out = acc * inv_x[:, None] * inv_y[None, :]
    p_tile = p_out + (i_b * N + o_n[:, None]) * M + o_m[None, :]
    tl.store(p_tile, out.to(p_out.dtype.element_ty), m_n[:, None] & m_m[None, :])
    if i_m == 0:
        tl.store(p_inv_x + i_b * N + o_n, inv_x, m_n)
    if i_n == 0:
        tl.store(p_inv_y + i_b * M + o_m, inv_y, m_m)


@triton.jit
def cosine_bwd_product_kernel(
    p_g, p_y, p_inv_y, p_t,
    N, M, D, s_gb, s_gn, s_gm, s_y, s_inv, s_t,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """T[n, d] = sum over m of g[n, m] y^[m, d], in float32."""
    i_n, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BN + tl.arange(0, BN)
    o_d = i_d * BD + tl.arange(0, BD)
    m_n, m_d = o_n < N, o_d < D
    acc = tl.zeros((BN, BD), tl.float32)
    for first in range(0, M, BM):
        o_m = first + tl.arange(0, BM)
        m_m = o_m < M
        p_tile = p_g + i_b * s_gb + o_n[:, None].to(tl.int64) * s_gn + o_m[None, :].to(tl.int64) * s_gm
        b_g = tl.load(p_tile, m_n[:, None] & m_m[None, :], other=0.0)
        p_rows = p_y + i_b * s_y + o_m[:, None].to(tl.int64) * D + o_d[None, :]
        b_y = tl.load(p_rows, m_m[:, None] & m_d[None, :], other=0.0)
        inv_y = tl.load(p_inv_y + i_b * s_inv + o_m, m_m, other=0.0)
        b_y = (b_y.to(tl.float32) * inv_y[:, None]).to(b_g.dtype)
        acc = tl.dot(b_g, b_y, acc, input_precision=PRECISION)  # [BN, BD]
    p_tile = p_t + i_b * s_t + o_n[:, None].to(tl.int64) * D + o_d[None, :]
    tl.store(p_tile, acc, m_n[:, None] & m_d[None, :])


@triton.jit
def cosine_bwd_rows_kernel(p_t, p_x, p_inv_x, p_dx, D, limit, BD: tl.constexpr):
    """dx = (T - <T, x^> x^) / ||x||, one row per program; where the norm is below eps it is a constant."""
    i_n = tl.program_id(0).to(tl.int64)
    inv = tl.load(p_inv_x + i_n)
    dot = 0.0
    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        b_t = tl.load(p_t + i_n * D + o_d, o_d < D, other=0.0)
        b_x = tl.load(p_x + i_n * D + o_d, o_d < D, other=0.0).to(tl.float32)
        dot += tl.sum(b_t * b_x)
    dot = tl.where(inv < limit, dot * inv * inv, 0.0)
    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        b_t = tl.load(p_t + i_n * D + o_d, o_d < D, other=0.0)
        b_x = tl.load(p_x + i_n * D + o_d, o_d < D, other=0.0).to(tl.float32)
        tl.store(p_dx + i_n * D + o_d, ((b_t - dot * b_x) * inv).to(p_dx.dtype.element_ty), o_d < D)


def _batch(x: Tensor, y: Tensor) -> tuple[int, int, int, int, bool]:
    """`(batch, N, M, D, shared)`; with one y for all, the leading dimensions are rows like any other."""
    shared = y.ndim == 2
    lead = x.shape[:-2].numel()
    return (
        (1 if shared else lead),
        (lead * x.shape[-2] if shared else x.shape[-2]),
        y.shape[-2],
        x.shape[-1],
        shared,
    )


def _forward(x: Tensor, y: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    batch, n, m, d, _ = _batch(x, y)
    out = x.new_empty((*x.shape[:-1], m))
    inv_x = x.new_empty(x.shape[:-1], dtype=torch.float32)
    inv_y = y.new_empty(y.shape[:-1], dtype=torch.float32)
    # A side without the other still has norms: one empty tile computes them.
    grid = (max(1, cdiv(n, TILE)), max(1, cdiv(m, TILE)), batch)
    if batch and (n or m):
        cosine_fwd_kernel[grid](
            x,
            y,
            out,
            inv_x,
            inv_y,
            n,
            m,
            d,
            m * d,
            eps,
            TILE,
            TILE,
            _depth(x.dtype),
            dot_precision(x),
            **_options(x.dtype),
        )
    return out, inv_x, inv_y


def _side(g: Tensor, strides: tuple[int, int, int], x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor,
          sizes: tuple[int, int, int, int], eps: float) -> Tensor:  # fmt: skip
    batch, n, m, d = sizes
    dx = torch.empty_like(x)
    if dx.numel() == 0:
        return dx
    t = x.new_empty((batch, n, d), dtype=torch.float32)
    cosine_bwd_product_kernel[(cdiv(n, TILE), cdiv(d, TILE), batch)](
        g,
        y,
        inv_y,
        t,
        n,
        m,
        d,
        *strides,
        m * d,
        m,
        n * d,
        TILE,
        _depth(x.dtype),
        TILE,
        dot_precision(x),
        **_options(x.dtype),
    )
    cosine_bwd_rows_kernel[(batch * n,)](
        t, x, inv_x, dx, d, (1 - 1e-6) / eps, min(1024, triton.next_power_of_2(d))
    )
    return dx


def _backward(
    dout: Tensor, x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    dout, x, y = dout.contiguous(), x.contiguous(), y.contiguous()
    batch, n, m, d, _ = _batch(x, y)
    dx = _side(dout, (n * m, m, 1), x, y, inv_x, inv_y, (batch, n, m, d), eps)
    dy = _side(dout, (n * m, 1, m), y, x, inv_y, inv_x, (batch, m, n, d), eps)
    return dx, dy


IMPLEMENTATIONS = {"cosine_similarity": _forward, "cosine_similarity_backward": _backward}


def limits(x: Tensor, y: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(x, y)


def compilations() -> Iterator[Compilation]:
    """Every configuration that the host functions launch."""
    for dtype, pointer in POINTERS.items():
        depth, options = _depth(dtype), _options(dtype)
        for precision in ("ieee", "tf32") if dtype == torch.float32 else ("ieee",):
            constants = {"BN": TILE, "BM": TILE, "BD": depth, "PRECISION": precision}
            integers = dict.fromkeys(("N", "M", "D", "s_y"), "i32")
            yield Compilation(
                f"forward {dtype} {precision}",
                cosine_fwd_kernel,
                {"p_x": pointer, "p_y": pointer, "p_out": pointer, "p_inv_x": "*fp32", "p_inv_y": "*fp32",
                 **integers, "eps": "fp32"},
                constants,
                options,
            )  # fmt: skip
            integers = dict.fromkeys(("N", "M", "D", "s_gb", "s_gn", "s_gm", "s_y", "s_inv", "s_t"), "i32")
            yield Compilation(
                f"backward product {dtype} {precision}",
                cosine_bwd_product_kernel,
                {"p_g": pointer, "p_y": pointer, "p_inv_y": "*fp32", "p_t": "*fp32", **integers},
                {**constants, "BM": depth, "BD": TILE},
                options,
            )
        for block in (16, 1024):
            yield Compilation(
                f"backward rows {dtype} {block}",
                cosine_bwd_rows_kernel,
                {
                    "p_t": "*fp32",
                    "p_x": pointer,
                    "p_inv_x": "*fp32",
                    "p_dx": pointer,
                    "D": "i32",
                    "limit": "fp32",
                },
                {"BD": block},
            )
