"""The sigmoid loss of pairs in Triton.

Forward, parallel: one program per tile of logits; on chip its accumulators, and out of it comes one number
per tile, which are added in one order. Backward: tiles of the logits' gradient go to a buffer that is one
block of the matrix, of bounded size, which feeds the product for x and the one for y; so memory is O(N).
Ragged edges: masked loads give zeros, which the loss leaves out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymm.triton_kernels._common import (
    POINTERS,
    Compilation,
    cdiv,
    dot_precision,
    float_only,
    precisions,
    product,
    through_norms,
)
from pymm.triton_kernels._tiles import scores

EPS = 1e-12
BUFFER_ROWS, BUFFER_BYTES = 8192, 256 << 20  # of the block of the logits' gradient


@triton.jit
def _signed(
    p_x, p_y, p_inv_x, p_inv_y, p_scale, p_bias, o_x, o_y, m_x, m_y, E,
    BX: tl.constexpr, BY: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosines, the signs z, and log(1 + exp(-z logit)) with its argument's sigmoid, `[BX, BY]` each."""
    inv_x = tl.load(p_inv_x + o_x, m_x, other=0.0)
    inv_y = tl.load(p_inv_y + o_y, m_y, other=0.0)
    cosine = scores(p_x, p_y, o_x, o_y, m_x, m_y, E, BX, BY, BE, PRECISION) * inv_x[:, None] * inv_y[None, :]
    sign = tl.where(o_x[:, None] == o_y[None, :], 1.0, -1.0)
    wrong = -sign * (cosine * tl.load(p_scale).to(tl.float32) + tl.load(p_bias).to(tl.float32))
    small = tl.exp(-tl.abs(wrong))  # at most 1
    # log(1 + small), whose plain form loses a small one in the 1.
    sum_ = 1.0 + small
    log1p = tl.where(sum_ == 1.0, small, tl.log(sum_) * (small / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))
    loss = tl.maximum(wrong, 0.0) + log1p
    sigmoid = tl.where(wrong >= 0, 1.0, small) / sum_
    return cosine, sign, loss, sigmoid, inv_x, inv_y


@triton.jit
def sigmoid_fwd_kernel(
    p_x, p_y, p_inv_x, p_inv_y, p_scale, p_bias, p_parts, N, E,
    BX: tl.constexpr, BY: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    o_x = tl.program_id(0) * BX + tl.arange(0, BX)
    o_y = tl.program_id(1) * BY + tl.arange(0, BY)
    m_x, m_y = o_x < N, o_y < N
    _, _, loss, _, _, _ = _signed(p_x, p_y, p_inv_x, p_inv_y, p_scale, p_bias, o_x, o_y, m_x, m_y, E,
                                  BX, BY, BE, PRECISION)  # fmt: skip
    p_part = p_parts + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_part, tl.sum(tl.where(m_x[:, None] & m_y[None, :], loss, 0.0)))


@triton.jit
def sigmoid_bwd_kernel(
    p_x, p_y, p_inv_x, p_inv_y, p_scale, p_bias, p_dloss, p_out, p_dscale, p_dbias,
    END_X, END_Y, E, FIRST_X, FIRST_Y, s_out,
    BX: tl.constexpr, BY: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i, j] = dlogits[i, j] / (||x_i|| ||y_j||); and the tile's sums of dlogits cosine and of dlogits."""
    o_x = FIRST_X + tl.program_id(0) * BX + tl.arange(0, BX)
    o_y = FIRST_Y + tl.program_id(1) * BY + tl.arange(0, BY)
    m_x, m_y = o_x < END_X, o_y < END_Y
    inside = m_x[:, None] & m_y[None, :]
    cosine, sign, _, sigmoid, inv_x, inv_y = _signed(
        p_x, p_y, p_inv_x, p_inv_y, p_scale, p_bias, o_x, o_y, m_x, m_y, E, BX, BY, BE, PRECISION
    )
    d = tl.where(inside, -sign * sigmoid * tl.load(p_dloss).to(tl.float32), 0.0)
    part = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_dscale + part, tl.sum(d * cosine))
    tl.store(p_dbias + part, tl.sum(d))
    p_tile = p_out + (o_x - FIRST_X)[:, None].to(tl.int64) * s_out + (o_y - FIRST_Y)[None, :]
    tl.store(p_tile, (d * inv_x[:, None] * inv_y[None, :]).to(p_out.dtype.element_ty), inside)


def _blocks(dtype: torch.dtype) -> dict[str, int]:
    """The largest tile that spills no register."""
    return {"BX": 64, "BY": 64, "BE": 16} if dtype == torch.float32 else {"BX": 128, "BY": 64, "BE": 32}


OPTIONS = {"num_warps": 8, "num_stages": 2}


def _inverse_norms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32).clamp_min(EPS).reciprocal()


def _forward(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    x, y = x.contiguous(), y.contiguous()
    n, blocks = x.shape[0], _blocks(x.dtype)
    grid = cdiv(n, blocks["BX"]), cdiv(n, blocks["BY"])
    parts = scale.new_empty(grid)
    if n:
        sigmoid_fwd_kernel[grid](
            x, y, _inverse_norms(x), _inverse_norms(y), scale, bias, parts, n, x.shape[1],
            **blocks, PRECISION=dot_precision(x), **OPTIONS,
        )  # fmt: skip
    total = parts.sum(dtype=torch.float64)
    return (total / n if n else total * float("nan")).to(scale.dtype)


def _backward(dloss: Tensor, x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    x, y = x.contiguous(), y.contiguous()
    n, blocks = x.shape[0], _blocks(x.dtype)
    inv_x, inv_y = _inverse_norms(x), _inverse_norms(y)
    # The buffer is of the features' type; float16 would lose small numbers, so it goes through float32.
    factor = torch.float32 if x.dtype == torch.float16 else x.dtype
    du, dv = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(y, dtype=torch.float32)
    dscale, dbias = (torch.zeros((), dtype=torch.float64, device=x.device) for _ in range(2))
    step_x = min(n, BUFFER_ROWS)
    step_y = min(n, BUFFER_BYTES // (max(step_x, 1) * factor.itemsize))
    buffer = x.new_empty((step_x, step_y), dtype=factor)
    of_pair = dloss / max(n, 1)
    for first_x in range(0, n, max(step_x, 1)):
        a = x[first_x : first_x + step_x].to(factor)
        for first_y in range(0, n, max(step_y, 1)):
            b = y[first_y : first_y + step_y].to(factor)
            part = buffer[: a.shape[0], : b.shape[0]]
            grid = cdiv(a.shape[0], blocks["BX"]), cdiv(b.shape[0], blocks["BY"])
            of_scale, of_bias = scale.new_empty((2, *grid))
            sigmoid_bwd_kernel[grid](
                x, y, inv_x, inv_y, scale, bias, of_pair, part, of_scale, of_bias,
                first_x + a.shape[0], first_y + b.shape[0], x.shape[1], first_x, first_y, step_y,
                **blocks, PRECISION=dot_precision(x), **OPTIONS,
            )  # fmt: skip
            dscale += of_scale.sum(dtype=torch.float64)
            dbias += of_bias.sum(dtype=torch.float64)
            du[first_x : first_x + step_x] += product(part, b)
            dv[first_y : first_y + step_y] += product(part.mT, a)
    dx = through_norms(du.mul_(scale), x, inv_x, EPS)
    dy = through_norms(dv.mul_(scale), y, inv_y, EPS)
    return dx, dy, dscale.to(scale.dtype), dbias.to(bias.dtype)


IMPLEMENTATIONS = {"sigmoid_contrastive": _forward, "sigmoid_contrastive_backward": _backward}


def limits(x: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(x)


def compilations() -> Iterator[Compilation]:
    """Every configuration that the host functions launch."""
    floats = dict.fromkeys(("p_inv_x", "p_inv_y", "p_scale", "p_bias"), "*fp32")
    outputs = dict.fromkeys(("p_dloss", "p_dscale", "p_dbias"), "*fp32")
    integers = dict.fromkeys(("END_X", "END_Y", "E", "FIRST_X", "FIRST_Y", "s_out"), "i32")
    for dtype, pointer in POINTERS.items():
        features = {"p_x": pointer, "p_y": pointer, **floats}
        for precision in precisions(dtype):
            constants = {**_blocks(dtype), "PRECISION": precision}
            yield Compilation(
                f"forward {dtype} {precision}",
                sigmoid_fwd_kernel,
                {**features, "p_parts": "*fp32", "N": "i32", "E": "i32"},
                constants,
                OPTIONS,
            )
            out = "*fp32" if dtype == torch.float16 else pointer
            yield Compilation(
                f"backward {dtype} {precision}",
                sigmoid_bwd_kernel,
                {**features, **outputs, "p_out": out, **integers},
                constants,
                OPTIONS,
            )
