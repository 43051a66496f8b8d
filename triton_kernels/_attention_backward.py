"""The backward kernels of attention; each gradient is written by one program, so nothing is added atomically.

Scores are made again from q, k and the log-sum-exp. Columns: one program per tile of columns owns their dk
and dv and goes over the rows. Rows: one program per tile of rows owns their dq and goes over the columns. For
short sequences both are one kernel (TOGETHER): one program per key head goes over all of its columns and adds
up dq in memory that only it writes, five products instead of seven. The mask's gradient has a kernel that
owns a tile of the mask and goes over whatever the mask is broadcast to.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pymm.triton_kernels._attention import dropout, load_rows, logits, store_rows


@triton.jit
def attention_delta_kernel(
    p_dout, p_out, p_dlse, p_delta, ROWS, H, T, DV, s_gb, s_gh, s_gt, s_ob, s_oh, s_ot,
    DLSE: tl.constexpr, BR: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """delta[row] = sum over d of dout out, minus dlse; dlse and delta are dense `(B, H, T)`."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < ROWS
    o_b, o_h, o_t = o_r // T // H, o_r // T % H, o_r % T
    o_v = tl.arange(0, BV)
    dout = load_rows(p_dout, o_b * s_gb + o_h * s_gh + o_t * s_gt, m_r, o_v, DV).to(tl.float32)
    out = load_rows(p_out, o_b * s_ob + o_h * s_oh + o_t * s_ot, m_r, o_v, DV).to(tl.float32)
    delta = tl.sum(dout * out, 1)
    if DLSE:
        delta -= tl.load(p_dlse + o_r, m_r, other=0.0)
    tl.store(p_delta + o_r, delta, m_r)


@triton.jit
def _score_gradients(
    q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, lse, delta, heads, o_t, o_s, first, m_t, S,
    scale, surplus, threshold, keep, p_mask, mask_rows, s_ms, p_padding, p_seed,
    MASK: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr, DT: tl.constexpr, VT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The weights that met v, and the gradient of the scores, `[t, s]` each."""
    x = logits(q, q_tail, k, k_tail, o_t, o_s, m_t, S, scale, surplus, p_mask, mask_rows, s_ms, p_padding,
               MASK, PADDING, CAUSAL, DT, PRECISION)  # fmt: skip
    shift = tl.where(lse == float("-inf"), 0.0, lse)
    p = tl.exp(x - shift[:, None])
    dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
    if VT:
        dp = tl.dot(dout_tail, tl.trans(v_tail), dp, input_precision=PRECISION)
    weights = p
    if DROPOUT:
        factor = dropout(p_seed, heads, o_t, first, threshold, keep, BT, BS)
        weights = p * factor
        dp *= factor
    return weights, p * (dp - delta[:, None])


@triton.jit
def attention_bwd_columns_kernel(
    p_q, p_k, p_v, p_mask, p_padding, p_seed, p_cu_q, p_cu_k, p_sequence, p_first, p_dout, p_lse, p_delta,
    p_dq, p_sum, p_dk, p_dv,
    TILES, N, HK, G, T, S, D, DV,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, s_gb, s_gh, s_gt, s_lb, s_lh,
    s_mb, s_mh, s_mt, s_ms, s_pb, s_dqb, s_dqh, s_dqt, s_dkb, s_dkh, s_dks, s_dvb, s_dvh, s_dvs,
    scale, threshold, keep,
    MASK: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, TOGETHER: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    DH: tl.constexpr, DT: tl.constexpr, VH: tl.constexpr, VT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dv = weights^T dout and dk = scale ds^T q of a tile of columns, or of all (TOGETHER), then dq too.

    p_sum: with TOGETHER, dense `(B, H, T, D)` in float32, where dq is added up until its last part.
    """
    i = tl.program_id(0)
    i_tile, i_bh = i % TILES, i // TILES
    i_b, i_h = (i_bh // HK).to(tl.int64), i_bh % HK
    first_column = i_tile * BS
    if VARLEN:
        first_column = tl.load(p_first + i_tile)
        i_b = tl.load(p_sequence + i_tile).to(tl.int64)
        if i_b >= N:
            return
        at_q, at_k = tl.load(p_cu_q + i_b), tl.load(p_cu_k + i_b)
        T = (tl.load(p_cu_q + i_b + 1) - at_q).to(tl.int32)
        S = (tl.load(p_cu_k + i_b + 1) - at_k).to(tl.int32)
        p_q += at_q * s_qt
        p_k += at_k * s_ks
        p_v += at_k * s_vs
        p_dout += at_q * s_gt
        p_lse += at_q
        p_delta += at_q
        p_dk += at_k * s_dks
        p_dv += at_k * s_dvs
    first_head = (i_b.to(tl.int32) * HK + i_h) * G
    if VARLEN:
        i_b = i_b * 0
    surplus = 0
    if CAUSAL == 2:
        surplus = S - T
    wide_h = i_h.to(tl.int64)
    p_k += i_b * s_kb + wide_h * s_kh
    p_v += i_b * s_vb + wide_h * s_vh
    p_dk += i_b * s_dkb + wide_h * s_dkh
    p_dv += i_b * s_dvb + wide_h * s_dvh
    p_padding += i_b * s_pb
    o_dh, o_dt = tl.arange(0, DH), DH + tl.arange(0, DT if DT else 16)
    o_vh, o_vt = tl.arange(0, VH), VH + tl.arange(0, VT if VT else 16)
    last_column = first_column + BS
    if TOGETHER:
        last_column = S
    for first in range(first_column, last_column, BS):
        o_s = first + tl.arange(0, BS)
        m_s = o_s < S
        wide_s = o_s.to(tl.int64)
        k = load_rows(p_k, wide_s * s_ks, m_s, o_dh, D)
        v = load_rows(p_v, wide_s * s_vs, m_s, o_vh, DV)
        k_tail, v_tail = k, v
        if DT:
            k_tail = load_rows(p_k, wide_s * s_ks, m_s, o_dt, D)
        if VT:
            v_tail = load_rows(p_v, wide_s * s_vs, m_s, o_vt, DV)
        dk = tl.zeros((BS, DH), tl.float32)
        dv = tl.zeros((BS, VH), tl.float32)
        dk_tail = tl.zeros((BS, DT if DT else 16), tl.float32)
        dv_tail = tl.zeros((BS, VT if VT else 16), tl.float32)
        begin = 0
        if CAUSAL and not TOGETHER:
            begin = tl.maximum(0, first - surplus) // BT * BT
        for g in range(G):
            head = wide_h * G + g
            p_qh = p_q + i_b * s_qb + head * s_qh
            p_gh = p_dout + i_b * s_gb + head * s_gh
            statistics = i_b * s_lb + head * s_lh
            p_mh = p_mask + i_b * s_mb + head * s_mh
            for first_t in range(begin, T, BT):
                o_t = first_t + tl.arange(0, BT)
                m_t = o_t < T
                wide_t = o_t.to(tl.int64)
                heads = first_head + g + tl.zeros((BT,), tl.int32)
                q = load_rows(p_qh, wide_t * s_qt, m_t, o_dh, D)
                dout = load_rows(p_gh, wide_t * s_gt, m_t, o_vh, DV)
                q_tail, dout_tail = q, dout
                if DT:
                    q_tail = load_rows(p_qh, wide_t * s_qt, m_t, o_dt, D)
                if VT:
                    dout_tail = load_rows(p_gh, wide_t * s_gt, m_t, o_vt, DV)
                lse = tl.load(p_lse + statistics + o_t, m_t, other=0.0)
                delta = tl.load(p_delta + statistics + o_t, m_t, other=0.0)
                weights, ds = _score_gradients(
                    q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, lse, delta, heads, o_t, o_s, first,
                    m_t, S, scale, surplus, threshold, keep, p_mh, wide_t * s_mt, s_ms, p_padding, p_seed,
                    MASK, PADDING, CAUSAL, DROPOUT, BT, BS, DT, VT, PRECISION,
                )  # fmt: skip
                weights = tl.trans(weights.to(dout.dtype))
                ds = ds.to(q.dtype)
                dv = tl.dot(weights, dout, dv, input_precision=PRECISION)
                dk = tl.dot(tl.trans(ds), q, dk, input_precision=PRECISION)
                if VT:
                    dv_tail = tl.dot(weights, dout_tail, dv_tail, input_precision=PRECISION)
                if DT:
                    dk_tail = tl.dot(tl.trans(ds), q_tail, dk_tail, input_precision=PRECISION)
                if TOGETHER:
                    dq = tl.dot(ds, k, input_precision=PRECISION) * scale
                    p_qsum = p_sum + (i_b * HK * G + head) * T * D
                    p_dqh = p_dq + i_b * s_dqb + head * s_dqh
                    if first > 0:
                        dq += load_rows(p_qsum, wide_t * D, m_t, o_dh, D)
                    if first + BS < S:
                        store_rows(p_qsum, wide_t * D, m_t, o_dh, D, dq)
                    else:
                        store_rows(p_dqh, wide_t * s_dqt, m_t, o_dh, D, dq)
                    if DT:
                        dq = tl.dot(ds, k_tail, input_precision=PRECISION) * scale
                        if first > 0:
                            dq += load_rows(p_qsum, wide_t * D, m_t, o_dt, D)
                        if first + BS < S:
                            store_rows(p_qsum, wide_t * D, m_t, o_dt, D, dq)
                        else:
                            store_rows(p_dqh, wide_t * s_dqt, m_t, o_dt, D, dq)
        store_rows(p_dk, wide_s * s_dks, m_s, o_dh, D, dk * scale)
        store_rows(p_dv, wide_s * s_dvs, m_s, o_vh, DV, dv)
        if DT:
            store_rows(p_dk, wide_s * s_dks, m_s, o_dt, D, dk_tail * scale)
        if VT:
            store_rows(p_dv, wide_s * s_dvs, m_s, o_vt, DV, dv_tail)
        if TOGETHER:
            tl.debug_barrier()  # for the next columns, other threads read what these wrote to p_sum


@triton.jit
def attention_bwd_rows_kernel(
    p_q, p_k, p_v, p_mask, p_padding, p_seed, p_cu_q, p_cu_k, p_sequence, p_first, p_dout, p_lse, p_delta,
    p_dq,
    TILES, N, H, G, T, S, D, DV,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, s_gb, s_gh, s_gt, s_lb, s_lh,
    s_mb, s_mh, s_mt, s_ms, s_pb, s_dqb, s_dqh, s_dqt, scale, threshold, keep,
    MASK: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    VARLEN: tl.constexpr, BT: tl.constexpr, BS: tl.constexpr,
    DH: tl.constexpr, DT: tl.constexpr, VH: tl.constexpr, VT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq = scale ds k of a tile of rows."""
    i = tl.program_id(0)
    i_tile, i_bh = i % TILES, i // TILES
    i_b, i_h = (i_bh // H).to(tl.int64), i_bh % H
    first_row = i_tile * BT
    if VARLEN:
        first_row = tl.load(p_first + i_tile)
        i_b = tl.load(p_sequence + i_tile).to(tl.int64)
        if i_b >= N:
            return
        at_q, at_k = tl.load(p_cu_q + i_b), tl.load(p_cu_k + i_b)
        T = (tl.load(p_cu_q + i_b + 1) - at_q).to(tl.int32)
        S = (tl.load(p_cu_k + i_b + 1) - at_k).to(tl.int32)
        p_q += at_q * s_qt
        p_k += at_k * s_ks
        p_v += at_k * s_vs
        p_dout += at_q * s_gt
        p_lse += at_q
        p_delta += at_q
        p_dq += at_q * s_dqt
    heads = i_b.to(tl.int32) * H + i_h + tl.zeros((BT,), tl.int32)
    if VARLEN:
        i_b = i_b * 0
    surplus = 0
    if CAUSAL == 2:
        surplus = S - T
    head, key_head = i_h.to(tl.int64), (i_h // G).to(tl.int64)
    p_q += i_b * s_qb + head * s_qh
    p_k += i_b * s_kb + key_head * s_kh
    p_v += i_b * s_vb + key_head * s_vh
    p_dout += i_b * s_gb + head * s_gh
    p_dq += i_b * s_dqb + head * s_dqh
    p_lse += i_b * s_lb + head * s_lh
    p_delta += i_b * s_lb + head * s_lh
    p_mask += i_b * s_mb + head * s_mh
    p_padding += i_b * s_pb
    o_t = first_row + tl.arange(0, BT)
    m_t = o_t < T
    wide_t = o_t.to(tl.int64)
    o_dh, o_dt = tl.arange(0, DH), DH + tl.arange(0, DT if DT else 16)
    o_vh, o_vt = tl.arange(0, VH), VH + tl.arange(0, VT if VT else 16)
    q = load_rows(p_q, wide_t * s_qt, m_t, o_dh, D)
    dout = load_rows(p_dout, wide_t * s_gt, m_t, o_vh, DV)
    q_tail, dout_tail = q, dout
    if DT:
        q_tail = load_rows(p_q, wide_t * s_qt, m_t, o_dt, D)
    if VT:
        dout_tail = load_rows(p_dout, wide_t * s_gt, m_t, o_vt, DV)
    lse = tl.load(p_lse + o_t, m_t, other=0.0)
    delta = tl.load(p_delta + o_t, m_t, other=0.0)
    dq = tl.zeros((BT, DH), tl.float32)
    dq_tail = tl.zeros((BT, DT if DT else 16), tl.float32)
    end = S
    if CAUSAL:
        end = tl.minimum(S, tl.minimum(T, first_row + BT) + surplus)
    for first in range(0, end, BS):
        o_s = first + tl.arange(0, BS)
        m_s = o_s < S
        wide_s = o_s.to(tl.int64)
        k = load_rows(p_k, wide_s * s_ks, m_s, o_dh, D)
        v = load_rows(p_v, wide_s * s_vs, m_s, o_vh, DV)
        k_tail, v_tail = k, v
        if DT:
            k_tail = load_rows(p_k, wide_s * s_ks, m_s, o_dt, D)
        if VT:
            v_tail = load_rows(p_v, wide_s * s_vs, m_s, o_vt, DV)
        _, ds = _score_gradients(
            q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, lse, delta, heads, o_t, o_s, first,
            m_t, S, scale, surplus, threshold, keep, p_mask, wide_t * s_mt, s_ms, p_padding, p_seed,
            MASK, PADDING, CAUSAL, DROPOUT, BT, BS, DT, VT, PRECISION,
        )  # fmt: skip
        ds = ds.to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        if DT:
            dq_tail = tl.dot(ds, k_tail, dq_tail, input_precision=PRECISION)
    store_rows(p_dq, wide_t * s_dqt, m_t, o_dh, D, dq * scale)
    if DT:
        store_rows(p_dq, wide_t * s_dqt, m_t, o_dt, D, dq_tail * scale)


@triton.jit
def attention_bwd_mask_kernel(
    p_q, p_k, p_v, p_mask, p_padding, p_seed, p_dout, p_lse, p_delta, p_dmask,
    B, H, G, T, S, D, DV, HM, TILES_T, TILES_S,
    s_qb, s_qh, s_qt, s_kb, s_kh, s_ks, s_vb, s_vh, s_vs, s_gb, s_gh, s_gt, s_lb, s_lh,
    s_mb, s_mh, s_mt, s_ms, s_pb, scale, threshold, keep,
    ONE_B: tl.constexpr, ONE_H: tl.constexpr, ONE_T: tl.constexpr, ONE_S: tl.constexpr,
    MASK: tl.constexpr, PADDING: tl.constexpr, CAUSAL: tl.constexpr, DROPOUT: tl.constexpr,
    BT: tl.constexpr, BS: tl.constexpr,
    DH: tl.constexpr, DT: tl.constexpr, VH: tl.constexpr, VT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The sum of ds over the dimensions along which the mask is broadcast (ONE_*), dense like the mask."""
    i = tl.program_id(0)
    i_s, i_t = i % TILES_S, i // TILES_S % TILES_T
    i_h, i_b = i // TILES_S // TILES_T % HM, i // TILES_S // TILES_T // HM
    begin_b, end_b = i_b, i_b + 1
    begin_h, end_h = i_h, i_h + 1
    begin_t, end_t = i_t * BT, i_t * BT + BT
    begin_s, end_s = i_s * BS, i_s * BS + BS
    if ONE_B:
        end_b = B
    if ONE_H:
        end_h = H
    if ONE_T:
        end_t = T
    if ONE_S:
        end_s = S
    surplus = 0
    if CAUSAL == 2:
        surplus = S - T
    o_dh, o_dt = tl.arange(0, DH), DH + tl.arange(0, DT if DT else 16)
    o_vh, o_vt = tl.arange(0, VH), VH + tl.arange(0, VT if VT else 16)
    acc = tl.zeros((BT, BS), tl.float32)
    for bh in range((end_b - begin_b) * (end_h - begin_h)):
        head = begin_h + bh % (end_h - begin_h)
        b = (begin_b + bh // (end_h - begin_h)).to(tl.int64)
        heads = (b * H + head).to(tl.int32) + tl.zeros((BT,), tl.int32)
        key_head = (head // G).to(tl.int64)
        statistics = b * s_lb + head.to(tl.int64) * s_lh
        for first_t in range(begin_t, end_t, BT):
            o_t = first_t + tl.arange(0, BT)
            m_t = o_t < T
            wide_t = o_t.to(tl.int64)
            p_rows = p_q + b * s_qb + head.to(tl.int64) * s_qh
            q = load_rows(p_rows, wide_t * s_qt, m_t, o_dh, D)
            q_tail = q
            if DT:
                q_tail = load_rows(p_rows, wide_t * s_qt, m_t, o_dt, D)
            p_rows = p_dout + b * s_gb + head.to(tl.int64) * s_gh
            dout = load_rows(p_rows, wide_t * s_gt, m_t, o_vh, DV)
            dout_tail = dout
            if VT:
                dout_tail = load_rows(p_rows, wide_t * s_gt, m_t, o_vt, DV)
            lse = tl.load(p_lse + statistics + o_t, m_t, other=0.0)
            delta = tl.load(p_delta + statistics + o_t, m_t, other=0.0)
            for first in range(begin_s, end_s, BS):
                o_s = first + tl.arange(0, BS)
                m_s = o_s < S
                wide_s = o_s.to(tl.int64)
                p_columns = p_k + b * s_kb + key_head * s_kh
                k = load_rows(p_columns, wide_s * s_ks, m_s, o_dh, D)
                k_tail = k
                if DT:
                    k_tail = load_rows(p_columns, wide_s * s_ks, m_s, o_dt, D)
                p_columns = p_v + b * s_vb + key_head * s_vh
                v = load_rows(p_columns, wide_s * s_vs, m_s, o_vh, DV)
                v_tail = v
                if VT:
                    v_tail = load_rows(p_columns, wide_s * s_vs, m_s, o_vt, DV)
                _, ds = _score_gradients(
                    q, q_tail, k, k_tail, v, v_tail, dout, dout_tail, lse, delta, heads, o_t, o_s, first,
                    m_t, S, scale, surplus, threshold, keep,
                    p_mask + b * s_mb + head.to(tl.int64) * s_mh, wide_t * s_mt, s_ms, p_padding + b * s_pb,
                    p_seed, MASK, PADDING, CAUSAL, DROPOUT, BT, BS, DT, VT, PRECISION,
                )  # fmt: skip
                acc += ds
    TM, SM = T, S
    if ONE_T:
        TM = 1
    if ONE_S:
        SM = 1
    p_tile = p_dmask + (i_b.to(tl.int64) * HM + i_h) * TM * SM
    o_t, o_s = begin_t + tl.arange(0, BT), begin_s + tl.arange(0, BS)
    if ONE_T and ONE_S:
        tl.store(p_tile, tl.sum(acc).to(p_dmask.dtype.element_ty))
    elif ONE_T:
        tl.store(p_tile + o_s, tl.sum(acc, 0).to(p_dmask.dtype.element_ty), o_s < S)
    elif ONE_S:
        tl.store(p_tile + o_t, tl.sum(acc, 1).to(p_dmask.dtype.element_ty), o_t < T)
    else:
        p_tile += o_t[:, None].to(tl.int64) * S + o_s[None, :]
        tl.store(p_tile, acc.to(p_dmask.dtype.element_ty), (o_t < T)[:, None] & (o_s < S)[None, :])
