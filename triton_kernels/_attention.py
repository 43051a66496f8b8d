"""What the kernels of attention share: loads, the scores of a tile, dropout, and the shapes of tiles.

A dimension that is no power of two is cut into a head and a tail, both powers of two: 72 = 64 + 16 and 257 =
256 + 16, so that little is multiplied for nothing. A tail of 0 does not exist. A head dimension beyond 128
has none, because registers would not hold both accumulators.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# What kind of mask the scores get (constants of the kernels).
NO_MASK, BOOL_MASK, BIAS = range(3)
UPPER_LEFT, LOWER_RIGHT = 1, 2


@triton.jit
def load_rows(p, offsets, m_rows, o_d, D):
    """`[rows, d]`: dense in d, 0 outside."""
    return tl.load(p + offsets[:, None] + o_d[None, :], m_rows[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_rows(p, offsets, m_rows, o_d, D, values):
    tl.store(
        p + offsets[:, None] + o_d[None, :],
        values.to(p.dtype.element_ty),
        m_rows[:, None] & (o_d < D)[None, :],
    )


@triton.jit
def logits(
    q, q_tail, k, k_tail, o_t, o_s, m_t, S, scale, surplus, p_mask, mask_rows, s_mask, p_padding,
    MASK: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`[t, s]`: `scale q . k + mask`, -inf where t may not attend to s.

    o_t: the positions of the rows; mask_rows: the offsets of their rows in the mask; s_mask: its stride in s.
    """
    x = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL:
        x = tl.dot(q_tail, tl.trans(k_tail), x, input_precision=PRECISION)
    x *= scale
    allowed = (o_s < S)[None, :] & m_t[:, None]
    if PADDING:
        valid = tl.load(p_padding + o_s, o_s < S, other=0) != 0
        allowed = allowed & valid[None, :]
    if CAUSAL:
        allowed = allowed & (o_s[None, :] <= o_t[:, None] + surplus)
    if MASK != 0:
        p_tile = p_mask + mask_rows[:, None] + o_s[None, :].to(tl.int64) * s_mask
        if MASK == 1:
            allowed = allowed & (tl.load(p_tile, allowed, other=0) != 0)
        else:
            x += tl.load(p_tile, allowed, other=0.0).to(tl.float32)
    return tl.where(allowed, x, float("-inf"))


@triton.jit
def dropout(p_seed, heads, o_t, first, threshold, keep, BT: tl.constexpr, BS: tl.constexpr):
    """What dropout multiplies the weights of columns first.. by, `[BT, BS]`; BS, 16, 32 or 64, divides first.

    One call of Philox gives the words of four vectors of 16 columns, see `pymm.ops._attention_reference`.
    """
    zero = tl.zeros((BT, 16), tl.uint32)
    columns = zero + (first // 64 * 16 + tl.arange(0, 16))[None, :].to(tl.uint32)
    rows = zero + o_t[:, None].to(tl.uint32)
    words = zero + heads[:, None].to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(tl.load(p_seed), columns, rows, words, zero)
    if BS == 64:
        words = tl.join(tl.join(w0, w1), tl.join(w2, w3))  # word number 2 j + i at [.., i, j]
        words = tl.reshape(tl.permute(words, (0, 3, 2, 1)), (BT, BS))
    else:
        second = first // 32 % 2
        low, high = tl.where(second == 0, w0, w2), tl.where(second == 0, w1, w3)
        if BS == 32:
            words = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BT, BS))
        else:
            words = tl.where(first // 16 % 2 == 0, low, high)
    return tl.where(words.to(tl.int64) >= threshold, keep, 0.0)


def split(n: int) -> tuple[int, int]:
    """`n` as a power of two and a tail, each at least 16 (what a product of tensor cores takes) or 0."""
    head = max(16, 1 << (max(n, 1).bit_length() - 1))
    if n <= head:
        return head, 0
    tail = max(16, triton.next_power_of_2(n - head))
    return (2 * head, 0) if tail == head else (head, tail)


def dense_rows(x: Tensor) -> Tensor:
    """x, copied where its last dimension is not dense."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def rows_first(like: Tensor, width: int) -> Tensor:
    """Uninitialized `(B, H, T, width)` stored as `(B, T, H, width)`."""
    batch, heads, rows = like.shape[:3]
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The least random word of a weight that is kept, and what the weight is multiplied by."""
    return round(dropout_p * 2**32), 1 / (1 - dropout_p) if dropout_p < 1 else 1.0


def mask_arguments(mask: Tensor | None, unused: Tensor) -> tuple[int, Tensor, tuple[int, int, int, int]]:
    """The kind of mask, its pointer, and its strides over `(B, H, T, S)`, 0 where it is broadcast."""
    if mask is None:
        return NO_MASK, unused, (0, 0, 0, 0)
    strides = tuple(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True))
    kind = BOOL_MASK if mask.dtype == torch.bool else BIAS
    return kind, mask.view(torch.uint8) if kind == BOOL_MASK else mask, strides  # type: ignore[return-value]


def tiles_of_sequences(cu: Tensor, rows: int, tile: int) -> tuple[Tensor, Tensor, int]:
    """For packed sequences: the sequence of each tile of rows, its first row in it, and how many tiles.

    There are at most rows / tile + N of them; those beyond the last have sequence N. Nothing waits for the
    device.
    """
    count = rows // tile + cu.shape[0] - 1
    ends = ((cu.diff() + tile - 1) // tile).cumsum(0)
    at = torch.arange(count, device=cu.device)
    sequence = torch.searchsorted(ends, at, right=True)
    before = torch.cat([ends.new_zeros(1), ends])[sequence]
    return sequence.int(), ((at - before) * tile).int(), count
