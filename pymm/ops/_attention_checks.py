"""What `attention` and `attention_varlen` share: argument checks and the choice of scale, mask and seed."""

from __future__ import annotations

import torch
from torch import Tensor

from pymm.ops._attention_reference import CAUSAL, NOT_CAUSAL
from pymm.ops._checks import DTYPES, check_device, fail, shape


def check_heads(op: str, heads: int, groups: int, enable_gqa: bool) -> None:
    """Require equal numbers of heads, or, with `enable_gqa`, a multiple."""
    if heads == groups:
        return
    if not enable_gqa:
        fail(
            op,
            "enable_gqa",
            "True when q and k have different numbers of heads",
            f"False for {heads} and {groups}",
        )
    if groups == 0 or heads % groups:
        fail(op, "q", "of a multiple of k's number of heads", f"{heads} for {groups}")


def check_mask(op: str, q: Tensor, attn_mask: Tensor, full: tuple[int, int, int, int]) -> Tensor:
    """The mask as a view of four dimensions, each 1 or that of `full` = (B, H, T, S).

    A float mask of neither q's type nor the accumulator's is cast to the latter.
    """
    if not isinstance(attn_mask, Tensor):
        fail(op, "attn_mask", "a tensor", type(attn_mask).__name__)
    if attn_mask.dtype != torch.bool and attn_mask.dtype not in DTYPES:
        fail(op, "attn_mask", "bool, float32, bfloat16, float16 or float64", attn_mask.dtype)
    check_device(op, "q", q, "attn_mask", attn_mask)
    mask = attn_mask
    while mask.ndim < 4:
        mask = mask.unsqueeze(0)
    if mask.ndim > 4 or any(m not in (1, n) for m, n in zip(mask.shape, full, strict=True)):
        fail(op, "attn_mask", f"broadcastable to ({', '.join(str(n) for n in full)})", shape(attn_mask))
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return mask if mask.dtype in (torch.bool, q.dtype, accumulator) else mask.to(accumulator)


def check_key_padding(op: str, q: Tensor, key_padding_mask: Tensor, batch: int, columns: int) -> None:
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        got = getattr(key_padding_mask, "dtype", type(key_padding_mask).__name__)
        fail(op, "key_padding_mask", "a bool tensor, True where a key is valid", got)
    if tuple(key_padding_mask.shape) != (batch, columns):
        fail(op, "key_padding_mask", f"({batch}, {columns})", shape(key_padding_mask))
    check_device(op, "q", q, "key_padding_mask", key_padding_mask)


def causal_mode(op: str, is_causal: bool, causal_alignment: str) -> int:
    if causal_alignment not in CAUSAL:
        fail(op, "causal_alignment", " or ".join(repr(name) for name in CAUSAL), repr(causal_alignment))
    return CAUSAL[causal_alignment] if is_causal else NOT_CAUSAL


def default_scale(scale: float | None, width: int) -> float:
    if scale is not None:
        return float(scale)
    return width**-0.5 if width else 1.0


def dropout_seed(op: str, q: Tensor, dropout_p: float) -> Tensor | None:
    """The one number that dropout's mask follows from; `torch.manual_seed` governs it."""
    if not 0 <= dropout_p <= 1:
        fail(op, "dropout_p", "in [0, 1]", dropout_p)
    if dropout_p == 0:
        return None
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
