"""The loss of given triplets in Triton.

Parallel: one program per few triplets. On chip: their sums; each row is read once forward, twice backward.
Bytes: the three inputs, and backward the three gradients. Ragged edges: masked loads give zeros, which change
no sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymm.triton_kernels._common import POINTERS, Compilation, cdiv, float_only, signature_of

EPS = 1e-12
BR, WIDEST = 8, 128  # triplets of a program, and the most of their width that it holds at once


@triton.jit
def _triplets(p_a, p_p, p_n, offset, m_r, o_d, D):
    mask = m_r[:, None] & (o_d < D)[None, :]
    a = tl.load(p_a + offset[:, None] + o_d[None, :], mask, other=0.0).to(tl.float32)
    p = tl.load(p_p + offset[:, None] + o_d[None, :], mask, other=0.0).to(tl.float32)
    n = tl.load(p_n + offset[:, None] + o_d[None, :], mask, other=0.0).to(tl.float32)
    return a, p, n


@triton.jit
def _sums(p_a, p_p, p_n, offset, m_r, D, COSINE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr):
    """Cosine: a.p, a.n and the squared norms of a, p and n; else the squared norms of a - p and a - n."""
    ap = tl.zeros((BR,), tl.float32)
    an = tl.zeros((BR,), tl.float32)
    aa = tl.zeros((BR,), tl.float32)
    pp = tl.zeros((BR,), tl.float32)
    nn = tl.zeros((BR,), tl.float32)
    for first in range(0, D, BD):
        a, p, n = _triplets(p_a, p_p, p_n, offset, m_r, first + tl.arange(0, BD), D)
        if COSINE:
            ap += tl.sum(a * p, 1)
            an += tl.sum(a * n, 1)
            aa += tl.sum(a * a, 1)
            pp += tl.sum(p * p, 1)
            nn += tl.sum(n * n, 1)
        else:
            ap += tl.sum((a - p) * (a - p), 1)
            an += tl.sum((a - n) * (a - n), 1)
    return ap, an, aa, pp, nn


@triton.jit
def _hinge(ap, an, aa, pp, nn, margin, eps, COSINE: tl.constexpr):
    """The hinge's argument, and the inverse norms."""
    inv_a = 1.0 / tl.maximum(tl.sqrt(aa), eps)
    inv_p = 1.0 / tl.maximum(tl.sqrt(pp), eps)
    inv_n = 1.0 / tl.maximum(tl.sqrt(nn), eps)
    if COSINE:
        z = margin + an * inv_a * inv_n - ap * inv_a * inv_p
    else:
        z = margin + tl.sqrt(ap) - tl.sqrt(an)
    return z, inv_a, inv_p, inv_n


@triton.jit
def triplet_fwd_kernel(
    p_a, p_p, p_n, p_hinges, ROWS, D, margin, eps,
    COSINE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < ROWS
    ap, an, aa, pp, nn = _sums(p_a, p_p, p_n, o_r * D, m_r, D, COSINE, BR, BD)
    z, _, _, _ = _hinge(ap, an, aa, pp, nn, margin, eps, COSINE)
    tl.store(p_hinges + o_r, tl.where(z <= 0, 0.0, z), m_r)  # NaN stays


@triton.jit
def triplet_bwd_kernel(
    p_a, p_p, p_n, p_g, p_da, p_dp, p_dn, ROWS, D, margin, eps, limit,
    COSINE: tl.constexpr, BR: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """limit: an inverse norm below it is that of a norm, and not of eps, and takes part in the gradient."""
    o_r = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    m_r = o_r < ROWS
    offset = o_r * D
    ap, an, aa, pp, nn = _sums(p_a, p_p, p_n, offset, m_r, D, COSINE, BR, BD)
    z, inv_a, inv_p, inv_n = _hinge(ap, an, aa, pp, nn, margin, eps, COSINE)
    g = tl.where(z <= 0, 0.0, tl.load(p_g).to(tl.float32))[:, None]
    cos_p, cos_n = (ap * inv_a * inv_p)[:, None], (an * inv_a * inv_n)[:, None]
    free_a = tl.where(inv_a < limit, 1.0, 0.0)[:, None]
    free_p = tl.where(inv_p < limit, 1.0, 0.0)[:, None]
    free_n = tl.where(inv_n < limit, 1.0, 0.0)[:, None]
    to_p = tl.where(ap > 0, 1.0 / tl.sqrt(tl.where(ap > 0, ap, 1.0)), 0.0)[:, None]
    to_n = tl.where(an > 0, 1.0 / tl.sqrt(tl.where(an > 0, an, 1.0)), 0.0)[:, None]
    for first in range(0, D, BD):
        o_d = first + tl.arange(0, BD)
        a, p, n = _triplets(p_a, p_p, p_n, offset, m_r, o_d, D)
        if COSINE:
            a *= inv_a[:, None]
            p *= inv_p[:, None]
            n *= inv_n[:, None]
            da = g * inv_a[:, None] * ((n - free_a * cos_n * a) - (p - free_a * cos_p * a))
            dp = -g * inv_p[:, None] * (a - free_p * cos_p * p)
            dn = g * inv_n[:, None] * (a - free_n * cos_n * n)
        else:
            dp = -g * (a - p) * to_p
            dn = g * (a - n) * to_n
            da = -dp - dn
        mask = m_r[:, None] & (o_d < D)[None, :]
        tl.store(p_da + offset[:, None] + o_d[None, :], da.to(p_da.dtype.element_ty), mask)
        tl.store(p_dp + offset[:, None] + o_d[None, :], dp.to(p_dp.dtype.element_ty), mask)
        tl.store(p_dn + offset[:, None] + o_d[None, :], dn.to(p_dn.dtype.element_ty), mask)


def _constants(d: int, cosine: bool) -> dict[str, Any]:
    return {"COSINE": cosine, "BR": BR, "BD": min(WIDEST, triton.next_power_of_2(max(d, 1)))}


def _forward(anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, cosine: bool) -> Tensor:
    a, p, n = anchor.contiguous(), positive.contiguous(), negative.contiguous()
    d = a.shape[-1]
    hinges = a.new_empty(a.shape[:-1], dtype=torch.float32)
    if hinges.numel():
        triplet_fwd_kernel[(cdiv(hinges.numel(), BR),)](
            a, p, n, hinges, hinges.numel(), d, margin, EPS, **_constants(d, cosine)
        )
    return (hinges.sum(dtype=torch.float64) / max(1, hinges.numel())).float()


def _backward(
    dloss: Tensor, anchor: Tensor, positive: Tensor, negative: Tensor, margin: float, cosine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    a, p, n = anchor.contiguous(), positive.contiguous(), negative.contiguous()
    da, dp, dn = (torch.empty_like(t) for t in (a, p, n))
    rows = a.shape[:-1].numel()
    if a.numel():
        triplet_bwd_kernel[(cdiv(rows, BR),)](
            a, p, n, dloss / rows, da, dp, dn, rows, a.shape[-1], margin, EPS, (1 - 1e-6) / EPS,
            **_constants(a.shape[-1], cosine),
        )  # fmt: skip
    return da, dp, dn


IMPLEMENTATIONS = {"triplet_loss": _forward, "triplet_loss_backward": _backward}


def limits(anchor: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(anchor)


def compilations() -> Iterator[Compilation]:
    """Every configuration that the host functions launch, at the smallest and the largest width."""
    for dtype, pointer in POINTERS.items():
        types = dict.fromkeys(("p_a", "p_p", "p_n", "p_da", "p_dp", "p_dn"), pointer)
        types |= dict.fromkeys(("p_hinges", "p_g"), "*fp32")
        types |= dict.fromkeys(("margin", "eps", "limit"), "fp32")
        for cosine in (True, False):
            for d in (1, WIDEST):
                constants = _constants(d, cosine)
                for what, kernel in (("forward", triplet_fwd_kernel), ("backward", triplet_bwd_kernel)):
                    yield Compilation(
                        f"{what} {dtype} {'cosine' if cosine else 'euclidean'} D={d}",
                        kernel,
                        signature_of(kernel, types, constants),
                        constants,
                    )
