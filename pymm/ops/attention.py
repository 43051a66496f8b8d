"""Scaled dot-product attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.ops._attention_checks import (
    causal_mode,
    check_heads,
    check_key_padding,
    check_mask,
    default_scale,
    dropout_seed,
)
from pymm.ops._attention_reference import CAUSAL, NOT_CAUSAL, attend, attend_backward, dropout_factor
from pymm.ops._checks import autocast, check_same, check_shape, fail, shape
from pymm.ops._dispatch import call
from pymm.ops._record import Kernel, Op, Sample, Workload, register

NAME = "attention"


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
) -> Any:
    r"""Softmax attention; the positional arguments are `F.scaled_dot_product_attention`'s.

    .. math:: \mathrm{out}_t = \sum_s \mathrm{softmax}_s(\mathrm{scale} \cdot q_t \cdot k_s
              + \mathrm{mask}_{ts})\, v_s

    (Vaswani et al. 2017, arXiv:1706.03762, eq. 1), computed by tiles with a running maximum as in
    FlashAttention (Dao et al. 2022, arXiv:2205.14135, alg. 1 and 4): on a CPU nothing of size T·S is written.

    Args:
        q: `(B, H, T, D)`, or `(H, T, D)`. Any strides do; where the last dimension is dense nothing is
            copied, so views of a fused projection are welcome.
        k: `(B, H, S, D)`, or `(B, Hkv, S, D)` with `enable_gqa`.
        v: `(B, H, S, Dv)`, heads as k's.
        attn_mask: broadcastable to `(B, H, T, S)`. Bool: True where a row attends. Float: added to the
            scores, of any floating type; its gradient is reduced over the dimensions along which it is
            broadcast.
        dropout_p: probability in [0, 1] of dropping each weight; applied whenever it is positive.
        is_causal: row t attends to columns up to t (`causal_alignment` says how when T != S), as well as the
            masks.
        scale: multiplies q·k; 1/sqrt(D) when None.
        enable_gqa: H may be a multiple of Hkv, query head h using key head h // (H / Hkv) (Ainslie et al.
            2023, arXiv:2305.13245).
        key_padding_mask: `(B, S)` bool, True where a key is valid.
        causal_alignment: `"upper_left"`, SDPA's, or `"lower_right"`, where the last row sees every column, as
            a key-value cache needs.
        return_lse: also return the log-sum-exp of each row's scores.

    Returns:
        `(B, H, T, Dv)` in q's type, stored so that `.transpose(1, 2)` is contiguous; with `return_lse` also
        `(B, H, T)` in float32 (float64 for float64), differentiable, -inf where a row attends nowhere.

    Raises:
        ValueError: when shapes, types, devices or values do not fit.

    Numerics:
        Scores, softmax and sums are in float32 at least. A row that may attend nowhere gives zeros and zero
        gradients. The dropout mask is a function of one seed drawn from torch's generator, the head, the row
        and the column only, so backward sees the same mask and every backend draws it alike. On a GPU
        Triton makes each float32 product of three TF32 products, or of one where torch allows TF32; float32
        heads of dimension above 64 go to the CUDA kernels, which multiply in float32, or
        to the reference where those are not built.

    Kept for backward: the arguments, the output and the log-sum-exp.
    """
    q, k, v = autocast(q, k, v)
    check_same(NAME, "q", q, k=k, v=v)
    unbatched = q.ndim == 3
    if unbatched:
        if k.ndim != 3 or v.ndim != 3:
            fail(NAME, "k and v", "(H, S, D) as q is", f"{shape(k)} and {shape(v)}")
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if q.ndim != 4:
        fail(NAME, "q", "(B, H, T, D) or (H, T, D)", shape(q))
    batch, heads, rows, width = q.shape
    check_shape(NAME, "k", k, (batch, "Hkv", "S", width))
    groups, columns = k.shape[1], k.shape[2]
    check_shape(NAME, "v", v, (batch, groups, columns, "Dv"))
    check_heads(NAME, heads, groups, enable_gqa)
    if attn_mask is not None:
        attn_mask = check_mask(NAME, q, attn_mask, (batch, heads, rows, columns))
    if key_padding_mask is not None:
        check_key_padding(NAME, q, key_padding_mask, batch, columns)
    causal = causal_mode(NAME, is_causal, causal_alignment)
    seed = dropout_seed(NAME, q, dropout_p)
    scale = default_scale(scale, width)
    out, lse = call(NAME, q, k, v, attn_mask, key_padding_mask, seed, float(dropout_p), scale, causal)
    if unbatched:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out


def _rows_first(x: Tensor) -> Tensor:
    """`(B, H, T, D)` stored as `(B, T, H, D)`, so that joining the heads again copies nothing."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_rows_first(like: Tensor, width: int) -> Tensor:
    """Uninitialized, of like's shape but for the last dimension."""
    batch, heads, rows = like.shape[:3]
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)


def _terms(
    q: Tensor,
    k: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    causal: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The bias, where a row may attend, and dropout's factor."""
    batch, heads, rows = q.shape[:3]
    bias, allowed = (
        (None, attn_mask) if attn_mask is None or attn_mask.dtype == torch.bool else (attn_mask, None)
    )
    t = torch.arange(rows, device=q.device)[:, None]
    s = torch.arange(k.shape[2], device=q.device)
    if key_padding_mask is not None:
        valid = key_padding_mask[:, None, None]
        allowed = valid if allowed is None else allowed & valid
    if causal != NOT_CAUSAL:
        seen = s <= t + (k.shape[2] - rows if causal == CAUSAL["lower_right"] else 0)
        allowed = seen if allowed is None else allowed & seen
    head = torch.arange(batch * heads, device=q.device).view(batch, heads, 1, 1)
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return bias, allowed, dropout_factor(seed, dropout_p, head, t, s, accumulator)


def _reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    scale: float,
    causal: int,
) -> tuple[Tensor, Tensor]:
    out, lse = attend(q, k, v, *_terms(q, k, attn_mask, key_padding_mask, seed, dropout_p, causal), scale)
    return _rows_first(out), lse


def _fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    accumulator = torch.promote_types(q.dtype, torch.float32)
    return _empty_rows_first(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulator)


def _backward_reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    terms = _terms(q, k, attn_mask, key_padding_mask, seed, dropout_p, causal)
    dq, dk, dv, ds = attend_backward(dout, dlse, q, k, v, out, lse, *terms, scale)
    dmask = q.new_empty(0)
    if mask_gradient:
        assert attn_mask is not None
        dmask = ds.sum_to_size(attn_mask.shape).to(attn_mask.dtype).contiguous()
    return _rows_first(dq), _rows_first(dk), _rows_first(dv), dmask


def _backward_fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmask = q.new_empty(0)
    if mask_gradient:
        assert attn_mask is not None
        dmask = attn_mask.new_empty(attn_mask.shape)
    dq, dk, dv = (_empty_rows_first(x, x.shape[3]) for x in (q, k, v))
    return dq, dk, dv, dmask


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout_p, ctx.scale, ctx.causal = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward_call(ctx: Any, backward_op: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    if dout is None and dlse is None:
        return (None,) * 9
    q, k, v, attn_mask, key_padding_mask, seed, out, lse = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(out)
    mask_gradient = ctx.needs_input_grad[3]
    mask_arguments = attn_mask, key_padding_mask, seed, ctx.dropout_p, ctx.scale, ctx.causal, mask_gradient
    dq, dk, dv, dmask = backward_op(dout, dlse, q, k, v, out, lse, *mask_arguments)
    return dq, dk, dv, dmask if mask_gradient else None, None, None, None, None, None


def _samples(dtype: torch.dtype) -> Iterator[Sample]:
    def rand(*size: int) -> Tensor:
        return torch.randn(size, dtype=torch.float64).to(dtype)

    def qkv(
        b: int, h: int, t: int, s: int, d: int, hkv: int = 0, dv: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        return rand(b, h, t, d), rand(b, hkv or h, s, d), rand(b, hkv or h, s, dv or d)

    # Alone, a softmax of one column is constant: the log-sum-exp has the gradient.
    yield Sample("one row", qkv(1, 1, 1, 1, 8), {"return_lse": True})
    yield Sample("no rows", qkv(2, 3, 0, 5, 8))
    yield Sample("no columns", qkv(2, 3, 5, 0, 8), {"return_lse": True})
    yield Sample("no batch", qkv(0, 3, 5, 7, 8))
    yield Sample("ragged", qkv(2, 3, 37, 53, 20, dv=11), {"return_lse": True})
    yield Sample("without a batch dimension", (rand(3, 18, 16), rand(3, 18, 16), rand(3, 18, 16)))
    fused = rand(2, 29, 3, 4, 16)  # the layout of a fused projection: (B, T, 3, H, D)
    yield Sample("views of a fused projection", tuple(fused[:, :, i].transpose(1, 2) for i in range(3)))
    yield Sample("last dimension not dense", tuple(x.mT for x in qkv(2, 2, 24, 24, 33)))
    yield Sample("causal", qkv(2, 2, 45, 45, 16), {"is_causal": True})
    kwargs: dict[str, Any] = {"is_causal": True, "causal_alignment": "lower_right", "return_lse": True}
    yield Sample("causal, more rows than columns", qkv(1, 2, 61, 23, 16), kwargs)
    yield Sample("causal, fewer rows than columns", qkv(1, 2, 19, 70, 16), kwargs)
    yield Sample("grouped queries", qkv(2, 6, 17, 29, 16, hkv=2), {"enable_gqa": True, "is_causal": True})
    yield Sample("decoding", qkv(2, 8, 1, 300, 32, hkv=2), {"enable_gqa": True, "scale": 0.3})
    some = torch.rand(2, 1, 30, 41) < 0.6
    some[0, 0, 7] = False
    yield Sample(
        "bool mask with a row that attends nowhere", (*qkv(2, 3, 30, 41, 16), some), {"return_lse": True}
    )
    padding = torch.arange(50) < torch.tensor([50, 13, 0])[:, None]
    yield Sample("key padding", qkv(3, 2, 26, 50, 16), {"key_padding_mask": padding})
    yield Sample("bias over the batch", (*qkv(3, 4, 39, 39, 16), rand(1, 4, 39, 39)))
    yield Sample("bias over heads and rows", (*qkv(2, 3, 21, 35, 16), rand(2, 1, 1, 35)), {"is_causal": True})
    # Softmax does not see what a whole row is shifted by; the log-sum-exp does.
    yield Sample("bias over columns", (*qkv(2, 3, 21, 35, 16), rand(3, 21, 1)), {"return_lse": True})
    hidden = rand(40, 40).masked_fill(torch.rand(40, 40) < 0.3, -torch.inf)
    hidden[5] = -torch.inf
    yield Sample("bias with -inf", (*qkv(2, 2, 40, 40, 16), hidden[None, None]))
    q, k, v = qkv(1, 2, 33, 47, 64)
    yield Sample("large logits", (1.5 * q, 1.5 * k, v), {"scale": 1.0})
    yield Sample("dropout", qkv(2, 2, 33, 90, 16), {"dropout_p": 0.3})
    yield Sample("several tiles", qkv(1, 2, 300, 1100, 64), {"return_lse": True})
    yield Sample(
        "several tiles, causal, wide", (*qkv(1, 4, 260, 700, 136, hkv=2), None, 0.0, True, None, True)
    )


def _eager(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    key_padding_mask: Tensor | None = None,
    causal_alignment: str = "upper_left",
    return_lse: bool = False,
) -> Tensor:
    """SDPA, its masks put together by hand where it has no argument for one."""
    if return_lse or dropout_p:
        raise NotImplementedError("SDPA returns no log-sum-exp, and its dropout mask is another one")
    if is_causal and (
        attn_mask is not None or key_padding_mask is not None or causal_alignment != "upper_left"
    ):
        rows, columns = q.shape[-2], k.shape[-2]
        diagonal = columns - rows if causal_alignment == "lower_right" else 0
        attn_mask = _joined(
            attn_mask, torch.ones(rows, columns, dtype=torch.bool, device=q.device).tril(diagonal)
        )
        is_causal = False
    if key_padding_mask is not None:
        attn_mask = _joined(attn_mask, key_padding_mask[:, None, None])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _joined(attn_mask: Tensor | None, allowed: Tensor) -> Tensor:
    if attn_mask is None:
        return allowed
    if attn_mask.dtype == torch.bool:
        return attn_mask & allowed
    return attn_mask.masked_fill(~allowed, -torch.inf)


def _workloads() -> Sequence[Workload]:
    def make(b: int, h: int, t: int, s: int, d: int, hkv: int, **kwargs: Any) -> Any:
        def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            q, k, v = (torch.randn(b, n, rows, d).to(dtype) for n, rows in ((h, t), (hkv, s), (hkv, s)))
            return (q, k, v), kwargs

        return inputs

    def with_bias(b: int, h: int, t: int, d: int) -> Any:
        def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            q, k, v = (torch.randn(b, h, t, d).to(dtype) for _ in range(3))
            return (q, k, v, torch.randn(1, h, t, t).to(dtype).requires_grad_()), {}

        return inputs

    def of_projection(b: int, h: int, t: int, d: int) -> Any:
        def inputs(dtype: torch.dtype) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return torch.randn(b, t, 3, h, d).to(dtype).permute(2, 0, 3, 1, 4).unbind(0), {}

        return inputs

    captions = torch.arange(77) < torch.linspace(8, 77, 16).long()[:, None]
    rows: list[tuple[str, Any, tuple[int, int, int], dict[str, Any]]] = [
        ("B16 H8 T77 D64 causal", make(16, 8, 77, 77, 64, 8, is_causal=True), (16 * 8 * 77, 77, 64), {}),
        (
            "B16 H8 T77 D64 causal, key padding",
            make(16, 8, 77, 77, 64, 8, is_causal=True, key_padding_mask=captions),
            (16 * 8 * 77, 77, 64),
            {},
        ),
        ("B8 H12 T197 D64 fused projection", of_projection(8, 12, 197, 64), (8 * 12 * 197, 197, 64), {}),
        ("B8 H12 T197 D64 bias", with_bias(8, 12, 197, 64), (8 * 12 * 197, 197, 64), {}),
        (
            "B1 H32/8 T1 S4096 D128",
            make(1, 32, 1, 4096, 128, 8, enable_gqa=True),
            (32, 4096, 128),
            {"backward": False},
        ),
    ]
    for t in (50, 100, 197, 257, 577, 1024):
        curve = {"family": "B8 H12 D64", "size": t, "sweep": t not in (197, 577)}
        rows.append((f"B8 H12 T{t} D64", make(8, 12, t, t, 64, 12), (8 * 12 * t, t, 64), curve))
    return [
        Workload(label, dtype, inputs, gemm=gemm, gemms=2, gemms_backward=5, **more)
        for label, inputs, gemm, more in rows
        for dtype in (torch.bfloat16, torch.float32)
    ]


OP = register(
    Op(
        name=NAME,
        function=attention,
        forward=Kernel(
            "(Tensor q, Tensor k, Tensor v, Tensor? attn_mask, Tensor? key_padding_mask, Tensor? seed, "
            "float dropout_p, float scale, int causal) -> (Tensor, Tensor)",
            _reference,
            _fake,
        ),
        backward=Kernel(
            "(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
            "Tensor? attn_mask, Tensor? key_padding_mask, Tensor? seed, float dropout_p, float scale, "
            "int causal, bool mask_gradient) -> (Tensor, Tensor, Tensor, Tensor)",
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
