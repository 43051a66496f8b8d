"""The kernels of InfoNCE: statistics of rows and columns, and tiles of the logits' gradient.

A row's statistics over its candidates, in this order: the largest logit; the sum of exp(logit - largest); the
sums of the logits of its positives, under the teacher's weights, and of all.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymm.triton_kernels._tiles import scores

STATISTICS = tl.constexpr(5)


@triton.jit
def info_nce_fwd_kernel(
    p_a, p_c, p_inv_a, p_inv_c, p_scale, p_id_a, p_id_c,
    p_ta, p_tc, p_inv_ta, p_inv_tc, p_tlse_a, p_tlse_c, p_rows, p_columns,
    A, C, E,
    COLUMNS: tl.constexpr, HARD: tl.constexpr, TEACHER: tl.constexpr,
    BA: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Slots `(groups, 5, A)` of rows and `(groups, 5, C)` of columns."""
    i_a, i_c = tl.program_id(0), tl.program_id(1)
    groups_a, groups_c = tl.num_programs(0), tl.num_programs(1)
    scale = tl.load(p_scale).to(tl.float32)
    tiles_a, tiles_c = tl.cdiv(A, BA), tl.cdiv(C, BC)
    p_columns += i_a.to(tl.int64) * STATISTICS * C
    p_rows += i_c.to(tl.int64) * STATISTICS * A
    for tile_a in range(tiles_a * i_a // groups_a, tiles_a * (i_a + 1) // groups_a):
        o_a = tile_a * BA + tl.arange(0, BA)
        m_a = o_a < A
        inv_a = tl.load(p_inv_a + o_a, m_a, other=0.0) * scale
        top = tl.full((BA,), float("-inf"), tl.float32)
        total = tl.zeros((BA,), tl.float32)
        hard = tl.zeros((BA,), tl.float32)
        soft = tl.zeros((BA,), tl.float32)
        every = tl.zeros((BA,), tl.float32)
        for tile_c in range(tiles_c * i_c // groups_c, tiles_c * (i_c + 1) // groups_c):
            o_c = tile_c * BC + tl.arange(0, BC)
            m_c = o_c < C
            inside = m_a[:, None] & m_c[None, :]
            inv_c = tl.load(p_inv_c + o_c, m_c, other=0.0)
            if COLUMNS:
                # Far ahead of their stores, with barriers between: other threads may hold copies of them.
                p_slot = p_columns + o_c
                top_c = tl.load(p_slot, m_c, other=float("-inf"))
                total_c = tl.load(p_slot + C, m_c, other=0.0)
                hard_c = tl.load(p_slot + 2 * C, m_c, other=0.0)
                soft_c = tl.load(p_slot + 3 * C, m_c, other=0.0)
                every_c = tl.load(p_slot + 4 * C, m_c, other=0.0)
            s = scores(p_a, p_c, o_a, o_c, m_a, m_c, E, BA, BC, BE, PRECISION)
            s = s * inv_a[:, None] * inv_c[None, :]  # 0 where it is outside
            every += tl.sum(s, 1)
            if COLUMNS:
                every_c += tl.sum(s, 0)
            if HARD:
                id_a = tl.load(p_id_a + o_a, m_a, other=0)
                id_c = tl.load(p_id_c + o_c, m_c, other=0)
                positive = tl.where(id_a[:, None] == id_c[None, :], s, 0.0)
                hard += tl.sum(positive, 1)
                if COLUMNS:
                    hard_c += tl.sum(positive, 0)
            if TEACHER:
                inv_ta = tl.load(p_inv_ta + o_a, m_a, other=0.0) * scale
                inv_tc = tl.load(p_inv_tc + o_c, m_c, other=0.0)
                t = scores(p_ta, p_tc, o_a, o_c, m_a, m_c, E, BA, BC, BE, PRECISION)
                t = t * inv_ta[:, None] * inv_tc[None, :]
                tlse_a = tl.load(p_tlse_a + o_a, m_a, other=0.0)
                soft += tl.sum(tl.exp(t - tlse_a[:, None]) * s, 1)
                if COLUMNS:
                    tlse_c = tl.load(p_tlse_c + o_c, m_c, other=0.0)
                    soft_c += tl.sum(tl.exp(t - tlse_c[None, :]) * s, 0)
            s = tl.where(inside, s, float("-inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
            top = higher
            if COLUMNS:
                higher = tl.maximum(top_c, tl.max(s, 0))
                shift = tl.where(higher == float("-inf"), 0.0, higher)
                total_c = total_c * tl.exp(top_c - shift) + tl.sum(tl.exp(s - shift[None, :]), 0)
                tl.store(p_slot, higher, m_c)
                tl.store(p_slot + C, total_c, m_c)
                if HARD:
                    tl.store(p_slot + 2 * C, hard_c, m_c)
                if TEACHER:
                    tl.store(p_slot + 3 * C, soft_c, m_c)
                tl.store(p_slot + 4 * C, every_c, m_c)
                tl.debug_barrier()  # for the next tile of rows, other threads read what these wrote
        p_slot = p_rows + o_a
        tl.store(p_slot, top, m_a)
        tl.store(p_slot + A, total, m_a)
        tl.store(p_slot + 2 * A, hard, m_a)
        tl.store(p_slot + 3 * A, soft, m_a)
        tl.store(p_slot + 4 * A, every, m_a)


@triton.jit
def info_nce_bwd_kernel(
    p_a, p_c, p_inv_a, p_inv_c, p_scale, p_id_a, p_id_c,
    p_ta, p_tc, p_inv_ta, p_inv_tc, p_tlse_a, p_tlse_c,
    p_lse_a, p_lse_c, p_weight_a, p_weight_c, p_share_a, p_share_c, p_center, p_out, p_dscale,
    A, C, E, FIRST_A, FIRST_C, hard_part, soft_part, even_a, even_c, s_out,
    COLUMNS: tl.constexpr, HARD: tl.constexpr, TEACHER: tl.constexpr,
    BA: tl.constexpr, BC: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[i, j] = dlogits[i, j] / (||a_i|| ||c_j||), the factor of both products of the backward pass.

    share: the target of one positive, 1 / their number; even: what label smoothing gives to each candidate.
    A log-sum-exp is float64, of which float32 would lose what a probability needs. dscale is the tile's sum
    of dlogits (cosine - center): all dlogits sum to 0, and a center near the cosines of the pairs keeps the
    rounding of probabilities near 1 out of the sum.
    """
    o_a = FIRST_A + tl.program_id(0) * BA + tl.arange(0, BA)
    o_c = FIRST_C + tl.program_id(1) * BC + tl.arange(0, BC)
    m_a, m_c = o_a < A, o_c < C
    inv_a = tl.load(p_inv_a + o_a, m_a, other=0.0)
    inv_c = tl.load(p_inv_c + o_c, m_c, other=0.0)
    scale = tl.load(p_scale).to(tl.float32)
    s = scores(p_a, p_c, o_a, o_c, m_a, m_c, E, BA, BC, BE, PRECISION)
    from_center = s * inv_a[:, None] * inv_c[None, :] - tl.load(p_center)
    s = s * (inv_a * scale)[:, None] * inv_c[None, :]
    lse_a = tl.load(p_lse_a + o_a, m_a, other=0.0)
    near = lse_a.to(tl.float32)
    rest = (lse_a - near.to(tl.float64)).to(tl.float32)
    d = tl.exp((s - near[:, None]) - rest[:, None]) - even_a
    if TEACHER:
        inv_ta = tl.load(p_inv_ta + o_a, m_a, other=0.0) * scale
        inv_tc = tl.load(p_inv_tc + o_c, m_c, other=0.0)
        t = scores(p_ta, p_tc, o_a, o_c, m_a, m_c, E, BA, BC, BE, PRECISION)
        t = t * inv_ta[:, None] * inv_tc[None, :]
        d -= soft_part * tl.exp(t - tl.load(p_tlse_a + o_a, m_a, other=0.0)[:, None])
    if HARD:
        same = tl.load(p_id_a + o_a, m_a, other=0)[:, None] == tl.load(p_id_c + o_c, m_c, other=0)[None, :]
        d -= tl.where(same, hard_part * tl.load(p_share_a + o_a, m_a, other=0.0)[:, None], 0.0)
    d *= tl.load(p_weight_a + o_a, m_a, other=0.0)[:, None]
    if COLUMNS:
        lse_c = tl.load(p_lse_c + o_c, m_c, other=0.0)
        near = lse_c.to(tl.float32)
        rest = (lse_c - near.to(tl.float64)).to(tl.float32)
        other = tl.exp((s - near[None, :]) - rest[None, :]) - even_c
        if TEACHER:
            other -= soft_part * tl.exp(t - tl.load(p_tlse_c + o_c, m_c, other=0.0)[None, :])
        if HARD:
            other -= tl.where(same, hard_part * tl.load(p_share_c + o_c, m_c, other=0.0)[None, :], 0.0)
        d += other * tl.load(p_weight_c + o_c, m_c, other=0.0)[None, :]
    inside = m_a[:, None] & m_c[None, :]
    p_part = p_dscale + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(p_part, tl.sum(tl.where(inside, d * from_center, 0.0)))
    out = d * inv_a[:, None] * inv_c[None, :]
    p_tile = p_out + (o_a - FIRST_A)[:, None].to(tl.int64) * s_out + (o_c - FIRST_C)[None, :]
    tl.store(p_tile, out.to(p_out.dtype.element_ty), inside)
