"""Tiles of the scores of two sets of rows, which the contrastive ops, mining and search are made of."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scores(
    p_a, p_c, o_a, o_c, m_a, m_c, E,
    BA: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`a . c` of dense rows o_a and o_c in float32, `[BA, BC]`; 0 where a row or a column is masked.

    c may be of a narrower type than a.
    """
    acc = tl.zeros((BA, BC), tl.float32)
    for first in range(0, E, BE):
        o_e = first + tl.arange(0, BE)
        m_e = o_e < E
        p_rows = p_a + o_a[:, None].to(tl.int64) * E + o_e[None, :]
        b_a = tl.load(p_rows, m_a[:, None] & m_e[None, :], other=0.0)
        p_columns = p_c + o_c[:, None].to(tl.int64) * E + o_e[None, :]
        b_c = tl.load(p_columns, m_c[:, None] & m_e[None, :], other=0.0)
        acc = tl.dot(b_a, tl.trans(b_c.to(b_a.dtype)), acc, input_precision=PRECISION)
    return acc
