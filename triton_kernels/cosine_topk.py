"""The most similar rows of a bank in Triton, without the matrix of similarities.

Parallel: a grid of tiles of queries x groups of tiles of the bank. On chip: a tile of similarities and the
best of each query so far, as 64-bit keys: the similarity's bits in an order that integers share, then the
index reversed, so that one comparison also puts equal similarities in the order of their indices, and no two
keys are equal. What is better than the worst that is kept takes its place, one per query and step, until
nothing is: after the first tiles that is seldom. Bytes: the bank once per tile of queries, k keys per query
and group. Ragged edges: rows beyond the end have the smallest key.

Backward is a gather and a scatter of the chosen rows, which the reference does.
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
from pymm.triton_kernels._tiles import scores

EPS = 1e-12
MOST = 128  # neighbours that stay on chip
PROGRAMS = 264  # two for each multiprocessor of a large GPU
NOTHING = tl.constexpr(-(1 << 63))
LAST_INDEX = (1 << 31) - 1


@triton.jit
def cosine_topk_kernel(
    p_x, p_y, p_inv_x, p_inv_y, p_keys, N, M, D,
    K: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Keys `(N, groups, K)`: the best of each group for each query, in no order."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_g, groups = tl.program_id(1), tl.num_programs(1)
    m_n = o_n < N
    inv_x = tl.load(p_inv_x + o_n, m_n, other=0.0)
    # Distinct, below every key, and above that of no row.
    best = tl.zeros((BN, K), tl.int64) + (tl.arange(0, K).to(tl.int64) + (NOTHING + 1))[None, :]
    worst = tl.min(best, 1)
    tiles = tl.cdiv(M, BM).to(tl.int64)
    for tile in range((tiles * i_g // groups).to(tl.int32), (tiles * (i_g + 1) // groups).to(tl.int32)):
        o_m = tile * BM + tl.arange(0, BM)
        m_m = o_m < M
        inv_y = tl.load(p_inv_y + o_m, m_m, other=0.0)
        s = scores(p_x, p_y, o_n, o_m, m_n, m_m, D, BN, BM, BD, PRECISION) * inv_x[:, None] * inv_y[None, :]
        s = tl.where(s == 0.0, 0.0, s)  # -0 is 0
        s = tl.where(s != s, float("nan"), s)  # of positive sign: the largest
        bits = s.to(tl.int32, bitcast=True)
        ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
        key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - o_m)[None, :].to(tl.int64)
        key = tl.where(m_n[:, None] & m_m[None, :], key, NOTHING)
        top = tl.max(key, 1)
        while tl.max((top > worst).to(tl.int32), 0) > 0:
            place = (best == worst[:, None]) & (top > worst)[:, None]
            best = tl.where(place, top[:, None], best)
            key = tl.where(key == top[:, None], NOTHING, key)
            worst = tl.min(best, 1)
            top = tl.max(key, 1)
    o_k = tl.arange(0, K)
    p_tile = p_keys + (o_n[:, None].to(tl.int64) * groups + i_g) * K + o_k[None, :]
    tl.store(p_tile, best, m_n[:, None])


def _kept(k: int) -> int:
    return max(8, triton.next_power_of_2(k))


def _tile(dtype: torch.dtype) -> dict[str, Any]:
    return {"BN": 32, "BM": 64, "BD": 16 if dtype == torch.float32 else 32}


def _options(dtype: torch.dtype, k: int) -> dict[str, int]:
    warps = 4 if k <= 32 else 8
    return {"num_warps": warps, "num_stages": 1 if dtype == torch.float32 else 2, **EVERY_REGISTER}


def _inverse_norms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32).clamp_min(EPS).reciprocal()


def _forward(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    x, y = x.contiguous(), y.contiguous()
    tile = _tile(x.dtype)
    tiles = cdiv(x.shape[0], tile["BN"])
    groups = max(1, min(cdiv(y.shape[0], tile["BM"]), PROGRAMS // max(tiles, 1)))
    keys = y.new_empty((x.shape[0], groups, _kept(k)), dtype=torch.int64)
    if x.shape[0]:
        cosine_topk_kernel[(tiles, groups)](
            x, y, _inverse_norms(x), _inverse_norms(y), keys, x.shape[0], y.shape[0], x.shape[1],
            K=_kept(k), **tile, PRECISION=dot_precision(x), **_options(x.dtype, k),
        )  # fmt: skip
    best = keys.flatten(1).topk(k, dim=1).values
    ordered = (best >> 32).to(torch.int32)
    values = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).view(torch.float32)
    return values.to(x.dtype), LAST_INDEX - (best & 0xFFFFFFFF)


IMPLEMENTATIONS = {"cosine_topk": _forward}


def limits(x: Tensor, y: Tensor, k: int) -> str | None:
    """Why these arguments are left to the reference, or None."""
    if k > MOST:
        return f"the Triton kernel keeps at most {MOST} neighbours, not {k}"
    return float_only(x, y)


def compilations() -> Iterator[Compilation]:
    """The fewest and the most neighbours, and a bank of a narrower type."""
    pairs = [(dtype, dtype) for dtype in POINTERS]
    pairs += [(torch.float32, torch.bfloat16), (torch.float32, torch.float16)]
    for dtype, of_y in pairs:
        types = {"p_x": POINTERS[dtype], "p_y": POINTERS[of_y], "p_keys": "*i64"}
        types |= {"p_inv_x": "*fp32", "p_inv_y": "*fp32"}
        for precision in precisions(dtype):
            for k in (1, MOST):
                constants = {"K": _kept(k), **_tile(dtype), "PRECISION": precision}
                yield Compilation(
                    f"forward {dtype} {of_y} {precision} k={k}",
                    cosine_topk_kernel,
                    signature_of(cosine_topk_kernel, types, constants),
                    constants,
                    _options(dtype, k),
                )
