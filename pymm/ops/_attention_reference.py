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


def dropout_keep(seed: Tensor, dropout_p: float, heads: Tensor, rows: int, columns: int) -> Tensor:
    """Which weights survive dropout, `(heads, rows, columns)` bool, a function of seed and position only.

    One counter serves a row's columns s, s + 16, s + 32 and s + 48 of each block of 64, so that a vector of
    lanes draws neighbouring columns. The counter is (16 ⌊s / 64⌋ + s mod 16, t, head mod 2^32, ⌊head / 2^32⌋)
    and the word number ⌊s / 16⌋ mod 4; a weight is kept where its word is at least `dropout_p` · 2^32.

    Args:
        heads: int64, the index b · H + h of each head.
    """
    device = seed.device
    blocks = -(-columns // 64)
    c0 = torch.arange(16 * blocks, device=device)
    c1 = torch.arange(rows, device=device)[:, None]
    c2, c3 = (heads & _WORD)[:, None, None], (heads >> 32)[:, None, None]
    words = torch.stack(
        [w.expand(heads.numel(), rows, 16 * blocks) for w in philox((c0, c1, c2, c3), seed)], -1
    )
    words = words.unflatten(2, (blocks, 16)).transpose(-1, -2).flatten(2)  # (heads, rows, blocks * 4 * 16)
    return words[..., :columns] >= round(dropout_p * 2**32)


def _scores(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    scale: float,
    causal: int,
) -> Tensor:
    """`(B, H, T, S)`, -inf where a row may not attend; q and k in the accumulator's type, k with H heads."""
    rows, columns = q.shape[-2], k.shape[-2]
    s = (q @ k.mT) * scale
    if attn_mask is not None:
        if attn_mask.dtype == torch.bool:
            s = s.masked_fill(~attn_mask, -torch.inf)
        else:
            s = s + attn_mask.to(s.dtype)
    if key_padding_mask is not None:
        s = s.masked_fill(~key_padding_mask[:, None, None, :], -torch.inf)
    if causal != NOT_CAUSAL:
        diagonal = columns - rows if causal == CAUSAL["lower_right"] else 0
        seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(diagonal)
        s = s.masked_fill(~seen, -torch.inf)
    return s


def _probabilities(s: Tensor, lse: Tensor) -> Tensor:
    """exp(s - lse), zero in rows that attend nowhere, whose lse is -inf."""
    return (s - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()


def _widen(x: Tensor, heads: int | None = None) -> Tensor:
    """x in the accumulator's type, its heads repeated for the query heads that share them."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x if heads is None or x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _dropout_factor(seed: Tensor | None, dropout_p: float, first_head: int, s: Tensor) -> Tensor | None:
    """What dropout multiplies each weight by, or None where there is none."""
    if seed is None:
        return None
    batch, heads, rows, columns = s.shape
    index = torch.arange(first_head, first_head + batch * heads, device=s.device)
    keep = dropout_keep(seed, dropout_p, index, rows, columns).view(s.shape).to(s.dtype)
    return keep / (1 - dropout_p) if dropout_p < 1 else keep


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    causal: int,
    first_head: int = 0,
) -> tuple[Tensor, Tensor]:
    """Output in v's type, and the log-sum-exp of each row's scores.

    Args:
        first_head: index of the first head in dropout's counter.
    """
    heads = q.shape[1]
    s = _scores(_widen(q), _widen(k, heads), attn_mask, key_padding_mask, scale, causal)
    lse = torch.logsumexp(s, dim=-1)
    p = _probabilities(s, lse)
    factor = _dropout_factor(seed, dropout_p, first_head, s)
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
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    causal: int,
    mask_gradient: bool,
    first_head: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gradient of a float mask (empty when it is not wanted).

    With P the probabilities, M dropout's factor and dP = M ∘ (dout vᵀ):
    ds = P ∘ (dP - Σ_d dout ∘ out + dlse), dq = scale · ds k, dk = scale · dsᵀ q, dv = (M ∘ P)ᵀ dout, and the
    mask's gradient is ds summed over the dimensions along which the mask was broadcast.
    """
    heads, groups = q.shape[1], k.shape[1]
    qa, ka, va, g = _widen(q), _widen(k, heads), _widen(v, heads), _widen(dout)
    s = _scores(qa, ka, attn_mask, key_padding_mask, scale, causal)
    p = _probabilities(s, lse)
    dp = g @ va.mT
    weights = p
    factor = _dropout_factor(seed, dropout_p, first_head, s)
    if factor is not None:
        dp, weights = dp * factor, p * factor
    offset = (g * _widen(out)).sum(-1)
    if dlse is not None:
        offset = offset - dlse
    ds = p * (dp - offset[..., None])

    def shared(x: Tensor) -> Tensor:
        return x if heads == groups else x.unflatten(1, (groups, heads // groups)).sum(2)

    dq = (ds @ ka) * scale
    dk = shared(ds.mT @ qa) * scale
    dv = shared(weights.mT @ g)
    if mask_gradient:
        assert attn_mask is not None
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype)
    else:
        dmask = q.new_empty(0)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dmask
