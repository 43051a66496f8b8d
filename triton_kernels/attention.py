"""Attention in Triton: which kernel runs which call, and with what shapes of tiles.

The kernels are in `_attention_forward.py` and `_attention_backward.py`. Whole rows of scores stay on chip
where they are short; longer ones go through the flash scheme; a few rows against many columns (decoding) are
split over the columns, and the parts combined. float32 is multiplied as three TF32 products.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from pymm.triton_kernels._attention import dense_rows, dropout_numbers, mask_arguments, rows_first
from pymm.triton_kernels._attention_backward import (
    attention_bwd_columns_kernel,
    attention_bwd_mask_kernel,
    attention_bwd_rows_kernel,
    attention_delta_kernel,
)
from pymm.triton_kernels._attention_configurations import compilations
from pymm.triton_kernels._attention_forward import attention_combine_kernel, attention_fwd_kernel
from pymm.triton_kernels._attention_tiles import (
    CHUNKS,
    FEW_ROWS,
    TOGETHER,
    WIDEST,
    WIDEST_EXACT,
    backward_tile,
    decode_tile,
    forward_tile,
    one_kernel,
)
from pymm.triton_kernels._common import capability, cdiv, dot_precision, float_only

__all__ = ["IMPLEMENTATIONS", "compilations", "limits"]

CHUNK = 256  # columns of a part of decoding, at least
ENOUGH = 132  # programs that occupy a GPU: its multiprocessors


class Problem:
    """What the kernels of one call share, by the names of their arguments."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None,
        seed: Tensor | None, dropout_p: float, scale: float, causal: int,
    ) -> None:  # fmt: skip
        q, k, v = dense_rows(q), dense_rows(k), dense_rows(v)
        self.q, self.k, self.v = q, k, v
        self.batch, self.heads, self.rows, self.width = q.shape
        self.groups, self.columns, self.value_width = k.shape[1], k.shape[2], v.shape[3]
        self.shared = self.heads // self.groups if self.groups else 1
        kind, mask, strides = mask_arguments(attn_mask, q)
        threshold, keep = dropout_numbers(dropout_p)
        padding = q if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
        self.mask, self.dropout = attn_mask is not None, seed is not None
        self.arguments = {
            "p_q": q, "p_k": k, "p_v": v, "p_mask": mask, "p_padding": padding,
            "p_seed": q if seed is None else seed,
            "G": self.shared, "T": self.rows, "S": self.columns, "D": self.width, "DV": self.value_width,
            **strides_of("q", q, "bht"), **strides_of("k", k, "bhs"), **strides_of("v", v, "bhs"),
            **dict(zip(("s_mb", "s_mh", "s_mt", "s_ms"), strides, strict=True)),
            "s_pb": self.columns, "s_lb": self.heads * self.rows, "s_lh": self.rows,
            "scale": scale, "threshold": threshold, "keep": keep,
            "MASK": kind, "PADDING": key_padding_mask is not None, "CAUSAL": causal,
            "DROPOUT": seed is not None,
            "PRECISION": precision(q),
        }  # fmt: skip


def precision(q: Tensor) -> str:
    """How products are made. In float32 of three TF32 products, whose error is near float32's.

    Plain float32 products have no tensor cores, and keep whole rows of a head in registers.
    """
    return "tf32x3" if q.dtype == torch.float32 and dot_precision(q) == "ieee" else dot_precision(q)


def strides_of(name: str, t: Tensor, dimensions: str) -> dict[str, int]:
    """`s_qb, s_qh, s_qt` for `("q", q, "bht")`."""
    return {f"s_{name}{d}": t.stride(i) for i, d in enumerate(dimensions)}


def packed(q: Tensor) -> dict[str, Any]:
    """The arguments of packed sequences, for a call that has none."""
    return {"p_cu_q": q, "p_cu_k": q, "p_sequence": q, "p_first": q, "VARLEN": False}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None,
    seed: Tensor | None, dropout_p: float, scale: float, causal: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    p = Problem(q, k, v, attn_mask, key_padding_mask, seed, dropout_p, scale, causal)
    out = rows_first(q, p.value_width)
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    if lse.numel() == 0:
        return out, lse
    common = {**p.arguments, **packed(p.q), "B": p.batch}
    if p.shared * p.rows <= FEW_ROWS:
        _decode(p, common, out, lse)
        return out, lse
    tile = forward_tile(q.dtype, p.width, p.value_width, p.columns, p.mask, p.dropout,
                        capability=capability(q))  # fmt: skip
    tiles = cdiv(p.rows, tile["BT"])
    attention_fwd_kernel[(tiles * p.batch * p.heads,)](
        **common, p_out=out, p_lse=lse, TILES=tiles, H=p.heads, CHUNK=p.columns,
        **strides_of("o", out, "bht"), s_oc=0, s_lc=0, PACK=False, **tile,
    )  # fmt: skip
    return out, lse


def _decode(p: Problem, common: dict[str, Any], out: Tensor, lse: Tensor) -> None:
    tile = decode_tile(out.dtype, p.width, p.value_width, p.mask, p.dropout, capability(out))
    programs = p.batch * p.groups
    chunks = max(1, min(cdiv(p.columns, CHUNK), 2 * ENOUGH // programs, CHUNKS))
    chunk = cdiv(cdiv(p.columns, chunks), tile["BS"]) * tile["BS"]
    chunks = max(1, cdiv(p.columns, max(chunk, 1)))
    part, part_lse = out, lse
    if chunks > 1:
        part = out.new_empty((chunks, *out.shape), dtype=torch.float32)
        part_lse = lse.new_empty((chunks, *lse.shape))
    attention_fwd_kernel[(programs * chunks,)](
        **common, p_out=part, p_lse=part_lse, TILES=1, H=p.groups, CHUNK=max(chunk, 1),
        **strides_of("o", part[0] if chunks > 1 else part, "bht"),
        s_oc=part.stride(0), s_lc=lse.numel(), PACK=True, **tile,
    )  # fmt: skip
    if chunks > 1:
        attention_combine_kernel[(lse.numel(),)](
            part, part_lse, out, lse, p.heads, p.rows, p.value_width, chunks, lse.numel(),
            *out.stride()[:3], triton.next_power_of_2(chunks), triton.next_power_of_2(p.value_width),
        )  # fmt: skip


def row_sums(dout: Tensor, out: Tensor, dlse: Tensor | None, like: Tensor) -> Tensor:
    """delta, `(B, H, T)`: the sum of dout out over the last dimension, minus dlse."""
    delta = torch.empty_like(like)
    heads, rows, width = out.shape[1:]
    if delta.numel():
        attention_delta_kernel[(cdiv(delta.numel(), 16),)](
            dout, out, delta if dlse is None else dlse.contiguous(), delta, delta.numel(), heads, rows, width,
            *dout.stride()[:3], *out.stride()[:3],
            dlse is not None, 16, triton.next_power_of_2(max(width, 1)),
        )  # fmt: skip
    return delta


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, seed: Tensor | None, dropout_p: float,
    scale: float, causal: int, mask_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    p = Problem(q, k, v, attn_mask, key_padding_mask, seed, dropout_p, scale, causal)
    dout, lse = dense_rows(dout), lse.contiguous()
    dq, dk, dv = (rows_first(x, x.shape[3]) for x in (q, k, v))
    delta = row_sums(dout, dense_rows(out), dlse, lse)
    tile = backward_tile(q.dtype, p.width, p.value_width, p.mask, p.dropout)
    tiles_t, tiles_s = cdiv(p.rows, tile["BT"]), cdiv(p.columns, tile["BS"])
    common = {**p.arguments, "p_dout": dout, "p_lse": lse, "p_delta": delta,
              **strides_of("g", dout, "bht"), **tile}  # fmt: skip
    one = {**common, **packed(p.q), "N": 0, **strides_of("dq", dq, "bht")}
    programs = p.batch * p.groups
    short = max(p.rows, p.columns) <= TOGETHER and programs >= ENOUGH
    together = tiles_s > 0 and (tiles_s == 1 or short)
    together &= one_kernel(q.dtype, p.width, p.value_width, p.mask, p.dropout)
    if programs * tiles_s:
        sums = q.new_empty(q.shape if together and tiles_s > 1 else (1,), dtype=torch.float32)
        attention_bwd_columns_kernel[(programs * (1 if together else tiles_s),)](
            **one, p_dq=dq, p_sum=sums, p_dk=dk, p_dv=dv, TILES=1 if together else tiles_s, HK=p.groups,
            **strides_of("dk", dk, "bhs"), **strides_of("dv", dv, "bhs"), TOGETHER=together,
        )  # fmt: skip
    if not together and p.batch * p.heads * tiles_t:
        attention_bwd_rows_kernel[(p.batch * p.heads * tiles_t,)](**one, p_dq=dq, TILES=tiles_t, H=p.heads)
    dmask = q.new_empty(0)
    if mask_gradient:
        assert attn_mask is not None
        dmask = torch.empty(attn_mask.shape, dtype=attn_mask.dtype, device=q.device)
        _mask_gradient(p, common, dmask)
    return dq, dk, dv, dmask


def _mask_gradient(p: Problem, common: dict[str, Any], dmask: Tensor) -> None:
    batch, heads, rows, columns = dmask.shape
    tiles = cdiv(rows, common["BT"]), cdiv(columns, common["BS"])
    if dmask.numel():
        attention_bwd_mask_kernel[(batch * heads * tiles[0] * tiles[1],)](
            **common, p_dmask=dmask, B=p.batch, H=p.heads, HM=heads, TILES_T=tiles[0], TILES_S=tiles[1],
            ONE_B=batch == 1, ONE_H=heads == 1, ONE_T=rows == 1, ONE_S=columns == 1,
        )  # fmt: skip


IMPLEMENTATIONS = {"attention": _forward, "attention_backward": _backward}


def limits(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(q) or width_limit(q, v)


def width_limit(q: Tensor, v: Tensor) -> str | None:
    d, dv = q.shape[-1], v.shape[-1]
    widest = WIDEST_EXACT if q.dtype == torch.float32 else WIDEST
    if min(d, dv) < 1 or max(d, dv) > widest:
        return f"the Triton kernels take {q.dtype} heads of dimension 1 to {widest}, not {d} and {dv}"
    return None
