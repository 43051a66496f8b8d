"""Attention over packed sequences in Triton: the kernels of `attention`, whose tiles find their sequence.

A launch has as many tiles as the packed rows could at most need, total / tile + N, so that nothing waits for
the lengths; a table made on the device gives each its sequence and first row, and those left over return.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pymm.triton_kernels._attention import tiles_of_sequences
from pymm.triton_kernels._attention_backward import attention_bwd_columns_kernel, attention_bwd_rows_kernel
from pymm.triton_kernels._attention_configurations import EXACT, compiled_at
from pymm.triton_kernels._attention_forward import attention_fwd_kernel
from pymm.triton_kernels._attention_tiles import TOGETHER, backward_tile, forward_tile
from pymm.triton_kernels._common import POINTERS, Compilation, capability, float_only
from pymm.triton_kernels.attention import Problem, row_sums, strides_of, width_limit


def _heads_first(x: Tensor) -> Tensor:
    """`(rows, H, D)` -> `(1, H, rows, D)`."""
    return x.transpose(0, 1).unsqueeze(0)


class _Packed:
    """The problem of one call as one batch element, and where its sequences begin."""

    def __init__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, seed: Tensor | None,
        dropout_p: float, scale: float, causal: int,
    ) -> None:  # fmt: skip
        self.problem = Problem(
            _heads_first(q), _heads_first(k), _heads_first(v), None, None, seed, dropout_p, scale, causal
        )
        self.count = cu_q.shape[0] - 1
        self.cu_q, self.cu_k = cu_q.contiguous(), cu_k.contiguous()
        self.offsets = {"p_cu_q": self.cu_q, "p_cu_k": self.cu_k, "VARLEN": True}

    def tiles(self, cu: Tensor, rows: int, tile: int) -> dict[str, Any]:
        sequence, first, count = tiles_of_sequences(cu, rows, tile)
        return {"p_sequence": sequence, "p_first": first, "TILES": count, **self.offsets}


def _forward(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, seed: Tensor | None, dropout_p: float,
    scale: float, causal: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    packed = _Packed(q, k, v, cu_q, cu_k, seed, dropout_p, scale, causal)
    p = packed.problem
    out = q.new_empty((p.rows, p.heads, p.value_width))
    lse = q.new_empty((p.heads, p.rows), dtype=torch.float32)
    tile = forward_tile(q.dtype, p.width, p.value_width, TOGETHER, dropout=p.dropout, varlen=True,
                        capability=capability(q))  # fmt: skip
    tiles = packed.tiles(packed.cu_q, p.rows, tile["BT"])
    if lse.numel():
        attention_fwd_kernel[(tiles["TILES"] * p.heads,)](
            **p.arguments, **tiles, p_out=out, p_lse=lse, B=packed.count, H=p.heads, CHUNK=p.columns,
            **strides_of("o", _heads_first(out), "bht"), s_oc=0, s_lc=0, PACK=False, **tile,
        )  # fmt: skip
    return out, lse


def _backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_q: Tensor, cu_k: Tensor, seed: Tensor | None, dropout_p: float, scale: float, causal: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    packed = _Packed(q, k, v, cu_q, cu_k, seed, dropout_p, scale, causal)
    p = packed.problem
    lse = lse.contiguous()
    g = _heads_first(dout if dout.stride(-1) == 1 else dout.contiguous())
    delta = row_sums(g, _heads_first(out.contiguous()), dlse, lse)
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    tile = backward_tile(q.dtype, p.width, p.value_width, dropout=p.dropout)
    common = {**p.arguments, "p_dout": g, "p_lse": lse, "p_delta": delta, "p_dq": dq,
              **strides_of("g", g, "bht"), **tile, "N": packed.count,
              **strides_of("dq", _heads_first(dq), "bht")}  # fmt: skip
    if dk.numel() or dv.numel():
        tiles = packed.tiles(packed.cu_k, p.columns, tile["BS"])
        attention_bwd_columns_kernel[(tiles["TILES"] * p.groups,)](
            **common, **tiles, p_sum=lse, p_dk=dk, p_dv=dv, HK=p.groups,
            **strides_of("dk", _heads_first(dk), "bhs"), **strides_of("dv", _heads_first(dv), "bhs"),
            TOGETHER=False,
        )  # fmt: skip
    if dq.numel():
        tiles = packed.tiles(packed.cu_q, p.rows, tile["BT"])
        attention_bwd_rows_kernel[(tiles["TILES"] * p.heads,)](**common, **tiles, H=p.heads)
    return dq, dk, dv


IMPLEMENTATIONS = {"attention_varlen": _forward, "attention_varlen_backward": _backward}


def limits(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(q) or width_limit(q, v)


def compilations() -> Iterator[Compilation]:
    """The usual head dimension, plain and with every switch; the others are attention's."""
    for dtype in POINTERS:
        for causal, dropout in ((0, False), (2, True)):
            switches = {"MASK": 0, "PADDING": False, "CAUSAL": causal, "DROPOUT": dropout}
            yield from compiled_at(dtype, EXACT, 64, 64, (TOGETHER,), switches, varlen=True)
