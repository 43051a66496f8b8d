"""Softmax attention and its gradient in plain torch: the specification that every kernel is tested against.

Shapes: q `(B, H, T, D)`, k `(B, Hkv, S, D)`, v `(B, Hkv, S, Dv)` with H a multiple of Hkv; statistics `(B, H,
T)`. Everything is computed in float32 at least, with the T×S scores in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

# How a causal mask is laid over T != S: row t sees columns up to t, or up to t + S - T.
CAUSAL = {"upper_left": 1, "lower_right": 2}
NOT_CAUSAL = 0

_WORD = 0xFFFFFFFF
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random 32-bit words per counter: Philox-4x32-10 (Salmon et al. 2011, "Parallel random numbers").

    Args:
        counter: four int64 tensors of one shape (or broadcastable), each below 2^32.
        seed: int64 of one element, the key.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(10):
        # A product below 2^64 wraps to a negative int64; the shift and the mask recover its halves.
        a, b = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1 = ((b >> 32) & _WORD) ^ c1 ^ k0, b & _WORD
        c2, c3 = ((a >> 32) & _WORD) ^ c3 ^ k1, a & _WORD
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def dropout_factor(
    seed: Tensor | None, dropout_p: float, heads: Tensor, rows: Tensor, columns: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """What dropout multiplies each weight by: 0 or 1 / (1 - dropout_p), a function of seed and position only.

    The counter of a weight is (16 ⌊s / 64⌋ + s mod 16, t, head mod 2^32, ⌊head / 2^32⌋) and its word number
    ⌊s / 16⌋ mod 4, so that neighbouring columns are neighbouring counters and one call serves four vectors of
    16. A weight is kept where its word is at least `dropout_p` · 2^32.

    Args:
        seed: of one element, or None without dropout.
        heads, rows, columns: int64, the indices b · H + h, t and s, broadcastable to the weights' shape.
    """
    if seed is None:
        return None
    counter = columns // 64 * 16 + columns % 16, rows, heads & _WORD, heads >> 32
    words = philox(counter, seed)
    number = columns // 16 % 4
    low, high = (torch.where(number % 2 == 0, words[i], words[i + 1]) for i in (0, 2))
    keep = (torch.where(number < 2, low, high) >= round(dropout_p * 2**32)).to(dtype)
    return keep / (1 - dropout_p) if dropout_p < 1 else keep


def _widen(x: Tensor, heads: int) -> Tensor:
    """x in the accumulator's type, its heads repeated for the query heads that share them."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _scores(q: Tensor, k: Tensor, bias: Tensor | None, allowed: Tensor | None, scale: float) -> Tensor:
    """`(B, H, T, S)`, -inf where a row may not attend."""
    s = (q @ k.mT) * scale
    if bias is not None:
        s = s + bias.to(s.dtype)
    return s if allowed is None else s.masked_fill(~allowed, -torch.inf)


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), zero in rows that attend nowhere, whose lse is -inf."""
    return (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    factor: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output in v's type, and the log-sum-exp of each row's scores.

    Args:
        bias: added to the scores, broadcastable to them, as the next two.
        allowed: bool, True where a row may attend.
        factor: what dropout multiplies the weights by.
    """
    heads = q.shape[1]
    s = _scores(_widen(q, heads), _widen(k, heads), bias, allowed, scale)
    lse = torch.logsumexp(s, dim=-1)
    p = _probabilities(s, lse)
    weights = p if factor is None else p * factor
    return (weights @ _widen(v, heads)).to(v.dtype), lse


def attend_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    allowed: Tensor | None,
    factor: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and ds, the gradient of the scores.

    With P the probabilities, M dropout's factor and dP = M ∘ (dout vᵀ):
    ds = P ∘ (dP - Σ_d dout ∘ out + dlse), dq = scale · ds k, dk = scale · dsᵀ q, dv = (M ∘ P)ᵀ dout; where
    query heads share a key head, dk and dv are summed over them.
    """
    heads, groups = q.shape[1], k.shape[1]
    qa, ka, va, g = (_widen(x, heads) for x in (q, k, v, dout))
    p = weights = _probabilities(_scores(qa, ka, bias, allowed, scale), lse)
    dp = g @ va.mT
    if factor is not None:
        dp, weights = dp * factor, p * factor
    offset = (g * _widen(out, heads)).sum(-1)
    if dlse is not None:
        offset = offset - dlse
    ds = p * (dp - offset[..., None])

    def shared(x: Tensor) -> Tensor:
        return x if heads == groups else x.unflatten(1, (groups, heads // groups)).sum(2)

    dq = (ds @ ka) * scale
    dk = shared(ds.mT @ qa) * scale
    dv = shared(weights.mT @ g)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), ds
