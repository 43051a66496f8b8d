"""The forward kernels of attention.

Parallel: one program per tile of rows, head and, for decoding, part of the columns. On chip: a tile's rows of
q, its accumulators and a tile of scores, or, where they fit (WHOLE), the whole rows of scores, so that
nothing is rescaled. Bytes: q and the result once; k and v once per tile of rows, which L2 serves. Ragged
edges: columns beyond the end are -inf, rows beyond it are not written.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymm.triton_kernels._attention import dropout, load_rows, logits, store_rows


@triton.jit
def attention_fwd_kernel(
    p_q, p_k, p_v, p_mask, p_padding, p_seed, p_cu_q, p_cu_k, p_sequence, p_first, p_out, p_lse,
    TILES, B, H, G, T, S, D, DV, CHUNK,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, s_ob, s_oh, s_ot, s_lb, s_lh,
    s_mb, s_mh, s_mt, s_ms, s_pb, s_oc, s_lc, scale, threshold, keep,
    MASK: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, PACK: tl.constexpr, WHOLE: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, BS_TAIL: tl.constexpr,
    DH: tl.constexpr, DT: tl.constexpr, VH: tl.constexpr, VT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PACK: the G query heads of a key head are rows of one tile, so that decoding reads k and v once.

    VARLEN: B sequences lie one after the other; a tile finds its own in p_sequence and p_first.
    """
    i = tl.program_id(0)
    i_tile, i_bh, i_c = i % TILES, i // TILES % (B * H), (i // TILES // (B * H)).to(tl.int64)
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    first_row = i_tile * BT
    if VARLEN:
        first_row = tl.load(p_first + i_tile)
        i_b = tl.load(p_sequence + i_tile).to(tl.int64)
        if i_b >= B:
            return
        at_q, at_k = tl.load(p_cu_q + i_b), tl.load(p_cu_k + i_b)
        T = (tl.load(p_cu_q + i_b + 1) - at_q).to(tl.int32)
        S = (tl.load(p_cu_k + i_b + 1) - at_k).to(tl.int32)
        CHUNK = S
        p_q += at_q * s_qt
        p_k += at_k * s_ks
        p_v += at_k * s_vs
        p_out += at_q * s_ot
        p_lse += at_q
    o_r = first_row + tl.arange(0, BT)
    if PACK:
        m_t = o_r < T * G
        o_t, o_g = o_r % T, o_r // T
        heads = i_bh * G + o_g
        head, key_head = i_h.to(tl.int64) * G, i_h.to(tl.int64)
    else:
        m_t = o_r < T
        o_t, o_g = o_r, tl.zeros((BT,), tl.int32)
        heads = i_b.to(tl.int32) * H + i_h + o_g
        head, key_head = i_h.to(tl.int64), (i_h // G).to(tl.int64)
    surplus = 0
    if CAUSAL == 2:
        surplus = S - T
    if VARLEN:
        i_b = i_b * 0  # sequences lie one after the other in the rows, not along a stride
    p_q += i_b * s_qb + head * s_qh
    p_k += i_b * s_kb + key_head * s_kh
    p_v += i_b * s_vb + key_head * s_vh
    p_out += i_c * s_oc + i_b * s_ob + head * s_oh
    p_lse += i_c * s_lc + i_b * s_lb + head * s_lh
    p_mask += i_b * s_mb + head * s_mh
    p_padding += i_b * s_pb
    wide_t, wide_g = o_t.to(tl.int64), o_g.to(tl.int64)
    mask_rows = wide_g * s_mh + wide_t * s_mt
    q_rows = wide_g * s_qh + wide_t * s_qt

    o_dh, o_dt = tl.arange(0, DH), DH + tl.arange(0, DT if DT else 16)
    o_vh, o_vt = tl.arange(0, VH), VH + tl.arange(0, VT if VT else 16)
    q = load_rows(p_q, q_rows, m_t, o_dh, D)
    q_tail = q
    acc = tl.zeros((BT, VH), tl.float32)
    acc_tail = tl.zeros((BT, VT if VT else 16), tl.float32)
    if DT:
        q_tail = load_rows(p_q, q_rows, m_t, o_dt, D)
    if WHOLE:
        o_s = tl.arange(0, BS)
        k_rows, m_s = o_s.to(tl.int64) * s_ks, o_s < S
        k = load_rows(p_k, k_rows, m_s, o_dh, D)
        k_tail = k
        if DT:
            k_tail = load_rows(p_k, k_rows, m_s, o_dt, D)
        x = logits(q, q_tail, k, k_tail, o_t, o_s, m_t, S, scale, surplus, p_mask, mask_rows, s_ms,
                   p_padding, MASK, PADDING, CAUSAL, DT, PRECISION)  # fmt: skip
        top = tl.max(x, 1)
        if BS_TAIL:
            o_z = BS + tl.arange(0, BS_TAIL)
            z_rows, m_z = o_z.to(tl.int64) * s_ks, o_z < S
            k = load_rows(p_k, z_rows, m_z, o_dh, D)
            k_tail = k
            if DT:
                k_tail = load_rows(p_k, z_rows, m_z, o_dt, D)
            z = logits(q, q_tail, k, k_tail, o_t, o_z, m_t, S, scale, surplus, p_mask, mask_rows, s_ms,
                       p_padding, MASK, PADDING, CAUSAL, DT, PRECISION)  # fmt: skip
            top = tl.maximum(top, tl.max(z, 1))
        shift = tl.where(top == float("-inf"), 0.0, top)
        p = tl.exp(x - shift[:, None])
        total = tl.sum(p, 1)
        v_rows = o_s.to(tl.int64) * s_vs
        v = load_rows(p_v, v_rows, m_s, o_vh, DV)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
        if VT:
            v = load_rows(p_v, v_rows, m_s, o_vt, DV)
            acc_tail = tl.dot(p.to(v.dtype), v, acc_tail, input_precision=PRECISION)
        if BS_TAIL:
            p = tl.exp(z - shift[:, None])
            total += tl.sum(p, 1)
            v_rows = o_z.to(tl.int64) * s_vs
            v = load_rows(p_v, v_rows, m_z, o_vh, DV)
            acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
            if VT:
                v = load_rows(p_v, v_rows, m_z, o_vt, DV)
                acc_tail = tl.dot(p.to(v.dtype), v, acc_tail, input_precision=PRECISION)
    else:
        top = tl.full((BT,), float("-inf"), tl.float32)
        total = tl.zeros((BT,), tl.float32)
        begin = i_c.to(tl.int32) * CHUNK
        end = tl.minimum(S, begin + CHUNK)
        if CAUSAL:
            last = T
            if not PACK:
                last = tl.minimum(T, first_row + BT)
            end = tl.minimum(end, last + surplus)
        for first in range(begin, end, BS):
            o_s = first + tl.arange(0, BS)
            m_s = o_s < S
            k_rows, v_rows = o_s.to(tl.int64) * s_ks, o_s.to(tl.int64) * s_vs
            k = load_rows(p_k, k_rows, m_s, o_dh, D)
            k_tail = k
            if DT:
                k_tail = load_rows(p_k, k_rows, m_s, o_dt, D)
            x = logits(q, q_tail, k, k_tail, o_t, o_s, m_t, S, scale, surplus, p_mask, mask_rows, s_ms,
                       p_padding, MASK, PADDING, CAUSAL, DT, PRECISION)  # fmt: skip
            higher = tl.maximum(top, tl.max(x, 1))
            shift = tl.where(higher == float("-inf"), 0.0, higher)
            p = tl.exp(x - shift[:, None])
            before = tl.exp(top - shift)
            total = total * before + tl.sum(p, 1)
            top = higher
            if DROPOUT:
                p *= dropout(p_seed, heads, o_t, first, threshold, keep, BT, BS)
            v = load_rows(p_v, v_rows, m_s, o_vh, DV)
            acc = tl.dot(p.to(v.dtype), v, acc * before[:, None], input_precision=PRECISION)
            if VT:
                v = load_rows(p_v, v_rows, m_s, o_vt, DV)
                acc_tail = tl.dot(p.to(v.dtype), v, acc_tail * before[:, None], input_precision=PRECISION)
    some = total > 0
    inverse = tl.where(some, 1.0 / tl.where(some, total, 1.0), 0.0)
    out_rows = wide_g * s_oh + wide_t * s_ot
    store_rows(p_out, out_rows, m_t, o_vh, DV, acc * inverse[:, None])
    if VT:
        store_rows(p_out, out_rows, m_t, o_vt, DV, acc_tail * inverse[:, None])
    lse = tl.where(some, top + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    tl.store(p_lse + wide_g * s_lh + wide_t, lse, m_t)


@triton.jit
def attention_combine_kernel(
    p_parts, p_part_lse, p_out, p_lse, H, T, DV, CHUNKS, ROWS, s_ob, s_oh, s_ot,
    BC: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One row per program: the parts of its columns, weighted by their share of all exponentials."""
    row = tl.program_id(0).to(tl.int64)
    o_c, o_v = tl.arange(0, BC), tl.arange(0, BV)
    m_c = o_c < CHUNKS
    lse = tl.load(p_part_lse + o_c.to(tl.int64) * ROWS + row, m_c, other=float("-inf"))
    top = tl.max(lse, 0)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weight = tl.exp(lse - shift)
    total = tl.sum(weight, 0)
    some = total > 0
    p_tile = p_parts + (o_c[:, None].to(tl.int64) * ROWS + row) * DV + o_v[None, :]
    parts = tl.load(p_tile, m_c[:, None] & (o_v < DV)[None, :], other=0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.where(some, total, 1.0)
    p_row = p_out + (row // T // H) * s_ob + (row // T % H) * s_oh + (row % T) * s_ot
    tl.store(p_row + o_v, out.to(p_out.dtype.element_ty), o_v < DV)
    tl.store(p_lse + row, tl.where(some, shift + tl.log(tl.where(some, total, 1.0)), float("-inf")))
