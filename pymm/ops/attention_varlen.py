"""Scaled dot-product attention over sequences of different lengths, packed without padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._attention_checks import causal_mode, check_heads, default_scale, dropout_seed
from pymm.ops._attention_reference import CAUSAL, NOT_CAUSAL, attend, attend_backward, dropout_factor
from pymm.ops._checks import autocast, check_device, check_same, check_shape, fail, shape
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "attention_varlen"


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
) -> Any:
    r"""Softmax attention within each of N sequences that are stored one after the other.

    .. math:: \mathrm{out}_t = \sum_{s \in \mathrm{seq}(t)}
              \mathrm{softmax}_s(\mathrm{scale} \cdot q_t \cdot k_s)\, v_s

    (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), computed as `pymm.ops.attention` computes it, for images
    of different sizes or texts of different lengths in one batch (Dehghani et al. 2023, arXiv:2307.06304).

    Args:
        q: `(total_q, H, D)`; a last dimension that is dense is read in place.
        k: `(total_k, H, D)`, or `(total_k, Hkv, D)` with `enable_gqa`.
        v: `(total_k, H, Dv)`, heads as k's.
        cu_seqlens_q: `(N + 1,)` int32 or int64, where each sequence of q begins, and the end: 0 first,
            total_q last, never falling.
        cu_seqlens_k: the same for k and v.
        max_seqlen_q, max_seqlen_k: at least the longest lengths, as callers of flash-attn pass them; only
            checked.
        dropout_p: probability in [0, 1] of dropping each weight.
        is_causal: row t of a sequence attends to its columns up to t.
        scale: multiplies q·k; 1/sqrt(D) when None.
        enable_gqa: H may be a multiple of Hkv.
        causal_alignment: `"upper_left"` or `"lower_right"`, per sequence.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        `(total_q, H, Dv)` in q's type; with `return_lse` also `(H, total_q)` in float32 (float64 for
        float64), differentiable, -inf where a sequence has rows and no columns.

    Raises:
        ValueError: when shapes, types, devices or values do not fit (RuntimeError inside a compiled graph,
            where only the kernel sees the offsets).

    Numerics:
        As `pymm.ops.attention`, sequence by sequence; dropout's mask is that of sequence n as batch element
        n.

    Kept for backward: the arguments, the output and the log-sum-exp.
    """
    q, k, v = autocast(q, k, v)
    check_same(NAME, "q", q, k=k, v=v)
    check_shape(NAME, "q", q, ("total_q", "H", "D"))
    heads, width = q.shape[1:]
    check_shape(NAME, "k", k, ("total_k", "Hkv", width))
    check_shape(NAME, "v", v, (k.shape[0], k.shape[1], "Dv"))
    check_heads(NAME, heads, k.shape[1], enable_gqa)
    cu_seqlens_q = _offsets("cu_seqlens_q", cu_seqlens_q, q, "total_q", max_seqlen_q)
    cu_seqlens_k = _offsets("cu_seqlens_k", cu_seqlens_k, k, "total_k", max_seqlen_k)
    check_shape(NAME, "cu_seqlens_k", cu_seqlens_k, (cu_seqlens_q.shape[0],))
    causal = causal_mode(NAME, is_causal, causal_alignment)
    seed = dropout_seed(NAME, q, dropout_p)
    scale = default_scale(scale, width)
    out, lse = call(NAME, q, k, v, cu_seqlens_q, cu_seqlens_k, seed, float(dropout_p), scale, causal)
    return (out, lse) if return_lse else out


def _offsets(argument: str, offsets: Tensor, rows: Tensor, total: str, longest: int | None) -> Tensor:
    """The offsets as int64; their values are checked where looking at them costs no wait for a device."""
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = getattr(offsets, "dtype", type(offsets).__name__)
        fail(NAME, argument, "an int32 or int64 tensor", got)
    if offsets.ndim != 1 or offsets.shape[0] < 1:
        fail(NAME, argument, "(N + 1,)", shape(offsets))
    check_device(NAME, "q", rows, argument, offsets)
    if not torch.compiler.is_compiling() and offsets.device.type == "cpu" and type(offsets) is Tensor:
        values = offsets.tolist()
        if values[0] != 0 or values[-1] != rows.shape[0] or any(b < a for a, b in pairwise(values)):
            fail(NAME, argument, f"0 first, {total} = {rows.shape[0]} last and never falling", values)
        most = max((b - a for a, b in pairwise(values)), default=0)
        if longest is not None and longest < most:
            fail(
                NAME,
                argument.replace("cu_seqlens", "max_seqlen"),
                f"at least the longest length {most}",
                longest,
            )
    return offsets.to(torch.int64)


def _heads_first(x: Tensor) -> Tensor:
    """`(rows, H, D)` -> `(1, H, rows, D)`."""
    return x.transpose(0, 1).unsqueeze(0)


def _rows_first(x: Tensor) -> Tensor:
    return x.squeeze(0).transpose(0, 1).contiguous()


def _terms(
    q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, seed: Tensor | None, dropout_p: float, causal: int
) -> tuple[None, Tensor, Tensor | None]:
    """No bias, where a row may attend, and dropout's factor, every row of q against every row of k."""
    total_q, heads = q.shape[:2]
    at_q, at_k = torch.arange(total_q, device=q.device), torch.arange(k.shape[0], device=q.device)
    # The sequence of each row, and the row's place in it.
    of_q, of_k = (
        torch.searchsorted(cu[1:].contiguous(), at, right=True) for cu, at in ((cu_q, at_q), (cu_k, at_k))
    )
    t, s = (at_q - cu_q[of_q])[:, None], at_k - cu_k[of_k]
    allowed = of_q[:, None] == of_k
    if causal != NOT_CAUSAL:
        surplus = (cu_k.diff() - cu_q.diff())[of_q][:, None] if causal == CAUSAL["lower_right"] else 0
        allowed = allowed & (s <= t + surplus)
    head = of_q[:, None] * heads + torch.arange(heads, device=q.device)[:, None, None]
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return None, allowed, dropout_factor(seed, dropout_p, head, t, s, accumulator)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    causal: int,
) -> tuple[Tensor, Tensor]:
    terms = _terms(q, k, cu_q, cu_k, seed, dropout_p, causal)
    out, lse = attend(_heads_first(q), _heads_first(k), _heads_first(v), *terms, scale)
    return _rows_first(out), lse.squeeze(0)


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    total, heads = q.shape[:2]
    return q.new_empty((total, heads, v.shape[2])), q.new_empty((heads, total), dtype=accumulator)


def _backward_reference(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    causal: int,
) -> tuple[Tensor, Tensor, Tensor]:
    gradients = attend_backward(
        _heads_first(dout),
        None if dlse is None else dlse.unsqueeze(0),
        _heads_first(q),
        _heads_first(k),
        _heads_first(v),
        _heads_first(out),
        lse.unsqueeze(0),
        *_terms(q, k, cu_q, cu_k, seed, dropout_p, causal),
        scale,
    )
    dq, dk, dv = (_rows_first(g) for g in gradients[:3])
    return dq, dk, dv


def _backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_call(
    ctx: Any, backward_op: Callable[..., Any], dout: Tensor | None, dlse: Tensor | None
) -> tuple[Any, ...]:
    if dout is None and dlse is None:
        return (None,) * 9
    q, k, v, cu_q, cu_k, seed, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    dq, dk, dv = backward_op(
        dout, dlse, q, k, v, out, lse, cu_q, cu_k, seed, ctx.dropout_p, ctx.scale, ctx.causal
    )
    return dq, dk, dv, None, None, None, None, None, None


def _starts(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def qkv(t: int, s: int, h: int, d: int, hkv: int = 0, dv: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        shapes = (t, h, d), (s, hkv or h, d), (s, hkv or h, dv or d)
        q, k, v = (torch.randn(n, dtype=torch.float64).to(dtype) for n in shapes)
        return q, k, v

    # Alone, a softmax of one column is constant: the log-sum-exp has the gradient.
    yield Sample("one row", (*qkv(1, 1, 1, 8), _starts(1), _starts(1)), {"return_lse": True})
    yield Sample("no sequence", (*qkv(0, 0, 2, 8), _starts(), _starts()))
    lengths = _starts(5, 0, 31, 1), _starts(7, 3, 0, 40)
    yield Sample("empty sequences", (*qkv(37, 50, 3, 16), *lengths), {"return_lse": True})
    same = _starts(19, 64, 7)
    yield Sample("causal", (*qkv(90, 90, 2, 20, dv=11), same.int(), same.int(), 64, 64), {"is_causal": True})
    kwargs: dict[str, Any] = {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True}
    yield Sample("cache", (*qkv(4, 160, 4, 16, hkv=2), _starts(1, 1, 2), _starts(60, 1, 99)), kwargs)
    yield Sample("dropout", (*qkv(90, 90, 2, 16), same, same), {"dropout_p": 0.4})
    fused = torch.randn(90, 3, 2, 32, dtype=torch.float64).to(dtype)
    yield Sample("views of a fused projection", (*fused.unbind(1), same, same))
    long = _starts(300, 700)
    yield Sample("several tiles", (*qkv(1000, 1000, 2, 64), long, long))


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
) -> Tensor:
    """SDPA, one sequence after the other."""
    if return_lse or dropout_p or causal_alignment != "upper_left" or cu_seqlens_q.shape[0] == 1:
        raise NotImplementedError("SDPA has no such argument")
    outs = [
        F.scaled_dot_product_attention(
            _heads_first(q[a:b]),
            _heads_first(k[c:d]),
            _heads_first(v[c:d]),
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        for (a, b), (c, d) in zip(
            pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True
        )
    ]
    return torch.cat([_rows_first(out) for out in outs])


def _workloads() -> Sequence[Workload]:
    lengths = (64, 197, 577, 256, 128, 400, 196, 50)
    total = sum(lengths)

    def make(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
        q, k, v = (torch.randn(total, 12, 64).to(dtype) for _ in range(3))
        return (q, k, v, _starts(*lengths), _starts(*lengths)), {}

    gemm = (12 * sum(n * n for n in lengths) // 64, 64, 64)  # as many multiplications
    return [
        Workload("8 sequences of 50 to 577, H12 D64", dtype, make, gemm=gemm, gemms=2, gemms_backward=5)
        for dtype in (torch.bfloat16, torch.float32)
    ]


OP = register(
    Op(
        name=NAME,
        function=attention_varlen,
        forward=Kernel(
            "(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, "
            "float dropout_p, float scale, int causal) -> (Tensor, Tensor)",
            _reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? seed, float dropout_p, float scale, "
            "int causal) -> (Tensor, Tensor, Tensor)",
            _backward_reference,
            _backward_fake,
        ),
        setup_context=_setup_context,
        backward_call=_backward_call,
        samples=_samples,
        workloads=_workloads,
        eager=_eager,
    )
)
