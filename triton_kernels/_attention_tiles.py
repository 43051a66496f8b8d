"""The shapes of attention's tiles, and the launch's options: the largest that spill no register."""

from __future__ import annotations

from typing import Any

import torch
import triton

from pymm.triton_kernels._attention import split
from pymm.triton_kernels._common import EVERY_REGISTER

WIDEST, WIDEST_EXACT = 256, 64  # head dimension, and that of float32, whose products are three
WHOLE_ROW = 288  # columns up to which a tile's rows of scores stay on chip
FEW_ROWS = 16  # query rows of one key head up to which a call is decoding
CHUNKS = 32  # parts of decoding, at most
TOGETHER = 1088  # rows and columns up to which one kernel makes dq, dk and dv


def _widths(dtype: torch.dtype, d: int, dv: int) -> dict[str, int]:
    """In float32 there are no tails: the parts of their products take more registers than the zeros."""
    exact = dtype == torch.float32
    parts = ((max(16, triton.next_power_of_2(n)), 0) if exact or n > 128 else split(n) for n in (d, dv))
    (dh, dt), (vh, vt) = parts
    return {"DH": dh, "DT": dt, "VH": vh, "VT": vt}


def forward_tile(
    dtype: torch.dtype, d: int, dv: int, columns: int, mask: bool = False, dropout: bool = False,
    varlen: bool = False, capability: int = 90,
) -> dict[str, Any]:  # fmt: skip
    """Of the forward kernel.

    A mask's addresses and dropout's words take the registers of whole rows; so, less, do packed sequences.
    On capability 8.0 rows that are not aligned to 16 bytes pass through registers on their way to the chip.
    """
    widths, wide = _widths(dtype, d, dv), max(d, dv)
    if dtype == torch.float32:
        return {**widths, "WHOLE": False, "BS_TAIL": 0, **EXACT_TILE}
    if columns <= WHOLE_ROW and wide <= 128 and not (mask or dropout):
        bs, tail = split(columns)
        if bs + tail <= 128:
            return {**widths, "WHOLE": True, "BT": 64, "BS": bs, "BS_TAIL": tail,
                    "num_warps": 4, "num_stages": 1}  # fmt: skip
        if wide <= 64 and not widths["DT"] and not widths["VT"]:
            return {**widths, "WHOLE": True, "BT": 32, "BS": bs, "BS_TAIL": tail,
                    "num_warps": 8, "num_stages": 1}  # fmt: skip
    warps = 4 if wide <= 64 and not (mask or dropout or varlen) else 8
    stages = 1 if mask or dropout else 2
    side = 64 if wide <= 128 else 32
    columns_at_once = side // (2 if mask and dropout else 1) // (1 if capability >= 90 else 2)
    return {**widths, "WHOLE": False, "BT": side, "BS": columns_at_once,
            "BS_TAIL": 0, "num_warps": warps, "num_stages": stages, **EVERY_REGISTER}  # fmt: skip


# In float32, forward and backward alike: then both add up a score in one order, and find one number.
EXACT_TILE = {"BT": 16, "BS": 32, "num_warps": 8, "num_stages": 1, **EVERY_REGISTER}


def decode_tile(
    dtype: torch.dtype, d: int, dv: int, mask: bool = False, dropout: bool = False, capability: int = 90
) -> dict[str, Any]:
    """Of the forward kernel for at most `FEW_ROWS` rows."""
    tile = forward_tile(dtype, d, dv, WHOLE_ROW + 1, mask, dropout, capability=capability)
    columns = min(tile["BS"], 32) if tile["DT"] or tile["VT"] else tile["BS"]
    return {**tile, "BT": FEW_ROWS, "BS": columns, "num_warps": 4 if max(d, dv) <= 64 else 8}


def backward_tile(
    dtype: torch.dtype, d: int, dv: int, mask: bool = False, dropout: bool = False
) -> dict[str, Any]:
    """Of the backward kernels."""
    widths, wide = _widths(dtype, d, dv), max(d, dv)
    if dtype == torch.float32:
        return {**widths, **EXACT_TILE}
    tails = widths["DT"] or widths["VT"]
    bt = 16 if tails or wide > 128 or mask or dropout else 32
    bs = 32 if tails or wide > 64 or mask or dropout else 64
    stages = 2 if wide <= 32 or wide > 128 or (dropout and not mask) else 1
    return {**widths, "BT": bt, "BS": bs, "num_warps": 8, "num_stages": stages, **EVERY_REGISTER}


def one_kernel(dtype: torch.dtype, d: int, dv: int, mask: bool = False, dropout: bool = False) -> bool:
    """Whether one backward kernel may make dq, dk and dv: where the registers allow it."""
    return max(d, dv) <= 128 and not (dtype == torch.float32 and mask and dropout)
