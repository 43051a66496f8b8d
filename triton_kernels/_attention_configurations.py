"""The configurations of attention's kernels that are compiled without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from pymm.triton_kernels._attention import BIAS, BOOL_MASK, NO_MASK
from pymm.triton_kernels._attention_backward import (
    attention_bwd_columns_kernel,
    attention_bwd_mask_kernel,
    attention_bwd_rows_kernel,
    attention_delta_kernel,
)
from pymm.triton_kernels._attention_forward import attention_combine_kernel, attention_fwd_kernel
from pymm.triton_kernels._attention_tiles import (
    CHUNKS,
    TOGETHER,
    WIDEST,
    backward_tile,
    decode_tile,
    forward_tile,
    one_kernel,
)
from pymm.triton_kernels._common import POINTERS, Compilation, signature_of

EXACT = "tf32x3"  # of float32; bfloat16 and float16 have one precision, whatever it is called
VISION_LENGTHS = (50, 197, 257, 577)
# (type, precision, D, Dv, columns): the vision lengths at the usual head dimension, and the other dimensions.
_PLAIN: list[tuple[torch.dtype, str, int, int, tuple[int, ...]]] = [
    (torch.bfloat16, "ieee", 64, 64, (*VISION_LENGTHS, TOGETHER))
]
_PLAIN += [
    (torch.bfloat16, "ieee", d, dv, (257, TOGETHER))
    for d, dv in ((8, 8), (20, 11), (72, 72), (88, 88), (128, 128), (136, 136), (256, 256))
]
_PLAIN += [
    (torch.float16, "ieee", 64, 64, (197, TOGETHER)),
    (torch.float32, EXACT, 64, 64, (TOGETHER,)),
    (torch.float32, "tf32", 64, 64, (TOGETHER,)),
]
# (type, mask, padding, causal, dropout)
_SWITCHED = [
    (torch.bfloat16, BOOL_MASK, True, 1, False),
    (torch.bfloat16, BIAS, True, 0, False),
    (torch.bfloat16, BIAS, False, 2, True),
    (torch.float32, BIAS, True, 2, True),
]


def compilations() -> Iterator[Compilation]:
    """The vision lengths, every shape of head dimension, and every switch at the usual one."""
    for dtype, precision, d, dv, lengths in _PLAIN:
        yield from compiled_at(dtype, precision, d, dv, lengths)
    for dtype, mask, padding, causal, dropout in _SWITCHED:
        switches = {"MASK": mask, "PADDING": padding, "CAUSAL": causal, "DROPOUT": dropout}
        yield from compiled_at(dtype, EXACT, 64, 64, (TOGETHER,), switches)
    for dtype in (torch.bfloat16, torch.float32):
        yield from _compiled_mask(dtype, EXACT)
    for dtype, pointer in POINTERS.items():
        types = {"p_dout": pointer, "p_out": pointer, "p_dlse": "*fp32", "p_delta": "*fp32"}
        constants = {"DLSE": True, "BR": 16, "BV": WIDEST}
        yield Compilation(
            f"backward delta {dtype}",
            attention_delta_kernel,
            signature_of(attention_delta_kernel, types, constants),
            constants,
        )
        types = {"p_out": pointer, "p_parts": "*fp32", "p_part_lse": "*fp32", "p_lse": "*fp32"}
        constants = {"BC": CHUNKS, "BV": WIDEST}
        yield Compilation(
            f"decoding's sum {dtype}",
            attention_combine_kernel,
            signature_of(attention_combine_kernel, types, constants),
            constants,
        )


def compiled_at(
    dtype: torch.dtype, precision: str, d: int, dv: int, lengths: tuple[int, ...],
    switches: dict[str, Any] | None = None, varlen: bool = False,
) -> Iterator[Compilation]:  # fmt: skip
    """The kernels of one head dimension, plain or with some switches."""
    plain = {"MASK": NO_MASK, "PADDING": False, "CAUSAL": 0, "DROPOUT": False}
    options = switches or plain
    base = {**options, "PRECISION": precision, "VARLEN": varlen}
    label = f"{dtype} {precision} D={d},{dv} {'varlen ' if varlen else ''}" + " ".join(
        f"{k.lower()}={int(v)}" for k, v in options.items() if v
    )
    mask, dropout = bool(options["MASK"]), options["DROPOUT"]
    for capabilities in ((80,), (90, 100)):
        for columns in lengths:
            tile = forward_tile(dtype, d, dv, columns, mask, dropout, varlen, capabilities[0])
            yield _compiled("forward", f"{label} S={columns}", attention_fwd_kernel, dtype,
                            {**base, **tile, "PACK": False}, capabilities)  # fmt: skip
        if not varlen:
            tile = decode_tile(dtype, d, dv, mask, dropout, capabilities[0])
            yield _compiled("decoding", label, attention_fwd_kernel, dtype,
                            {**base, **tile, "PACK": True}, capabilities)  # fmt: skip
    tile = backward_tile(dtype, d, dv, mask, dropout)
    for together in (False, True) if not varlen and one_kernel(dtype, d, dv, mask, dropout) else (False,):
        yield _compiled("backward columns" + (" and rows" if together else ""), label,
                        attention_bwd_columns_kernel, dtype,
                        {**base, **tile, "TOGETHER": together})  # fmt: skip
    yield _compiled("backward rows", label, attention_bwd_rows_kernel, dtype, {**base, **tile})


def _compiled(
    what: str, label: str, kernel: Any, dtype: torch.dtype, constants: dict[str, Any],
    capabilities: tuple[int, ...] = (80, 90, 100),
) -> Compilation:  # fmt: skip
    pointer = POINTERS[dtype]
    options = {k: constants.pop(k) for k in ("num_warps", "num_stages", "maxnreg") if k in constants}
    mask = "*u8" if constants["MASK"] == BOOL_MASK else pointer
    types = dict.fromkeys(("p_q", "p_k", "p_v", "p_dout", "p_dq", "p_dk", "p_dv"), pointer)
    types |= dict.fromkeys(("p_lse", "p_delta", "p_sum"), "*fp32") | {"p_mask": mask, "p_padding": "*u8"}
    types |= dict.fromkeys(("p_cu_q", "p_cu_k"), "*i64") | dict.fromkeys(("p_sequence", "p_first"), "*i32")
    # Parts of decoding are kept in float32.
    types |= {"p_seed": "*i64", "p_out": "*fp32" if constants.get("PACK") else pointer, "p_dmask": pointer}
    types |= dict.fromkeys(("scale", "keep"), "fp32") | {"threshold": "i64"}
    names = set(kernel.arg_names)
    return Compilation(
        f"{what} {label}".strip(), kernel, signature_of(kernel, types, constants),
        {k: v for k, v in constants.items() if k in names}, options, capabilities,
    )  # fmt: skip


def _compiled_mask(dtype: torch.dtype, precision: str) -> Iterator[Compilation]:
    for label, ones in (("over the batch", (True, False, False, False)),
                        ("over all but columns", (True, True, True, False)),
                        ("over columns", (False, True, False, True))):  # fmt: skip
        shared = dict(zip(("ONE_B", "ONE_H", "ONE_T", "ONE_S"), ones, strict=True))
        switches = {"MASK": BIAS, "PADDING": True, "CAUSAL": 2, "DROPOUT": True}
        yield _compiled(
            "backward mask", f"{dtype} {precision} {label}", attention_bwd_mask_kernel, dtype,
            {**shared, **switches, "PRECISION": precision, **backward_tile(dtype, 64, 64, True, True)},
        )  # fmt: skip
