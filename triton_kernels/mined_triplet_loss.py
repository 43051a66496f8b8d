"""Triplet mining in Triton.

"hard" is one streaming pass. Parallel: a grid of tiles of anchors x groups of tiles of candidates. On chip: a
tile of cosines and, per anchor, the farthest positive and the nearest negative so far with their indices;
groups are combined in their order. Bytes: the features once per tile; 4 numbers per anchor and group.
"semi-hard" and "all" need the cosines of an anchor sorted: they are made in panels of some anchors x all
candidates, of bounded size, which torch sorts; backward makes the panels again. Ragged edges: columns beyond
the end are neither positives nor negatives.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pymm.triton_kernels._common import (
    EVERY_REGISTER,
    POINTERS,
    Compilation,
    cdiv,
    dot_precision,
    float_only,
    precisions,
    signature_of,
    through_norms,
)
from pymm.triton_kernels._tiles import scores

EPS = 1e-12
PROGRAMS = 264  # two for each multiprocessor of a large GPU
PANEL_BYTES = 64 << 20


@triton.jit
def hardest_kernel(
    p_x, p_y, p_inv_x, p_inv_y, p_labels, p_positive, p_negative, p_at_positive, p_at_negative, N, D,
    CROSSED: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of each group of candidates `(groups, N)`: the least cosine of a positive, the largest of a negative,
    and the first index of each, N where there is none."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    i_g, groups = tl.program_id(1), tl.num_programs(1)
    m_n = o_n < N
    inv_x = tl.load(p_inv_x + o_n, m_n, other=0.0)
    own = tl.load(p_labels + o_n, m_n, other=0)
    positive = tl.full((BN,), float("inf"), tl.float32)
    negative = tl.full((BN,), float("-inf"), tl.float32)
    at_positive = tl.zeros((BN,), tl.int32) + N
    at_negative = tl.zeros((BN,), tl.int32) + N
    tiles = tl.cdiv(N, BM)
    for tile in range(tiles * i_g // groups, tiles * (i_g + 1) // groups):
        o_m = tile * BM + tl.arange(0, BM)
        m_m = o_m < N
        inv_y = tl.load(p_inv_y + o_m, m_m, other=0.0)
        s = scores(p_x, p_y, o_n, o_m, m_n, m_m, D, BN, BM, BD, PRECISION) * inv_x[:, None] * inv_y[None, :]
        same = own[:, None] == tl.load(p_labels + o_m, m_m, other=0)[None, :]
        other = m_m[None, :] & (same == 0)
        same = m_m[None, :] & same
        if not CROSSED:
            same = same & (o_n[:, None] != o_m[None, :])
        best, at = tl.min(tl.where(same, s, float("inf")), 1, return_indices=True)
        better = best < positive
        positive = tl.where(better, best, positive)
        at_positive = tl.where(better, tile * BM + at, at_positive)
        best, at = tl.max(tl.where(other, s, float("-inf")), 1, return_indices=True)
        better = best > negative
        negative = tl.where(better, best, negative)
        at_negative = tl.where(better, tile * BM + at, at_negative)
    slot = i_g.to(tl.int64) * N + o_n
    tl.store(p_positive + slot, positive, m_n)
    tl.store(p_negative + slot, negative, m_n)
    tl.store(p_at_positive + slot, at_positive, m_n)
    tl.store(p_at_negative + slot, at_negative, m_n)


@triton.jit
def cosine_panel_kernel(
    p_x, p_y, p_inv_x, p_inv_y, p_out, FIRST, END, M, D,
    BN: tl.constexpr, BM: tl.constexpr, BD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Cosines of the rows from FIRST to END of x with all rows of y, in float32."""
    o_n = FIRST + tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    m_n, m_m = o_n < END, o_m < M
    inv_x = tl.load(p_inv_x + o_n, m_n, other=0.0)
    inv_y = tl.load(p_inv_y + o_m, m_m, other=0.0)
    s = scores(p_x, p_y, o_n, o_m, m_n, m_m, D, BN, BM, BD, PRECISION) * inv_x[:, None] * inv_y[None, :]
    p_tile = p_out + (o_n - FIRST)[:, None].to(tl.int64) * M + o_m[None, :]
    tl.store(p_tile, s, m_n[:, None] & m_m[None, :])


def _tile(dtype: torch.dtype) -> dict[str, Any]:
    return {"BN": 64, "BM": 64, "BD": 16 if dtype == torch.float32 else 32}


def _options(dtype: torch.dtype) -> dict[str, int]:
    """Of the search for the hardest."""
    return {"num_warps": 8, "num_stages": 1 if dtype == torch.float32 else 2, **EVERY_REGISTER}


PANEL_OPTIONS = {"num_warps": 8, "num_stages": 2, **EVERY_REGISTER}


def _inverse_norms(t: Tensor) -> Tensor:
    return torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32).clamp_min(EPS).reciprocal()


class _Way:
    """Anchors x against candidates y, which are other rows when `crossed`."""

    def __init__(
        self, x: Tensor, y: Tensor, inv_x: Tensor, inv_y: Tensor, labels: Tensor, crossed: bool
    ) -> None:
        self.x, self.y, self.inv_x, self.inv_y = x, y, inv_x, inv_y
        self.labels, self.crossed = labels, crossed

    def hardest(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Per anchor the cosines of farthest positive and nearest negative; their indices, N for none."""
        n, d = self.x.shape
        tile = _tile(self.x.dtype)
        tiles = cdiv(n, tile["BN"])
        groups = max(1, min(cdiv(n, tile["BM"]), PROGRAMS // max(tiles, 1)))
        values = self.inv_x.new_empty((2, groups, n))
        at = self.labels.new_empty((2, groups, n), dtype=torch.int32)
        if n:
            hardest_kernel[(tiles, groups)](
                self.x, self.y, self.inv_x, self.inv_y, self.labels, *values, *at, n, d, self.crossed,
                **tile, PRECISION=dot_precision(self.x), **_options(self.x.dtype),
            )  # fmt: skip
        positive, negative = values[0].amin(0), values[1].amax(0)
        at_positive = torch.where(values[0] == positive, at[0], n).amin(0)  # equal ones: the lowest index
        at_negative = torch.where(values[1] == negative, at[1], n).amin(0)
        return positive, negative, at_positive.long(), at_negative.long()

    def panels(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """Some anchors at a time: which, their cosines, and where positives and negatives are."""
        n, d = self.x.shape
        tile = _tile(self.x.dtype)
        step = max(1, PANEL_BYTES // (4 * max(n, 1)))
        for first in range(0, n, step):
            rows = slice(first, min(n, first + step))
            s = self.inv_x.new_empty((rows.stop - first, n))
            cosine_panel_kernel[(cdiv(s.shape[0], tile["BN"]), cdiv(n, tile["BM"]))](
                self.x, self.y, self.inv_x, self.inv_y, s, first, rows.stop, n, d,
                **tile, PRECISION=dot_precision(self.x), **PANEL_OPTIONS,
            )  # fmt: skip
            same = self.labels[rows, None] == self.labels
            negative = ~same
            if not self.crossed:
                at = torch.arange(rows.stop - first, device=s.device)
                same[at, at + first] = False
            yield rows, s, same, negative


def _semi_hard(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """How often each cosine enters the sum, with sign, and the number of triplets; one row per anchor."""
    far, order = torch.where(negative, -s, torch.inf).sort(dim=1, stable=True)  # nearest first
    at = torch.searchsorted(far, -s, right=True).clamp_max(s.shape[1] - 1)  # the first beyond each positive
    nearest = -far.gather(1, at)
    chosen = (positive & (nearest < s) & (nearest + margin > s)).to(s.dtype)
    w = torch.zeros_like(s)
    w.scatter_add_(1, order.gather(1, at), chosen)  # sums of ones are exact in any order
    return w - chosen, chosen.sum(dtype=torch.float64).long()


def _all(s: Tensor, positive: Tensor, negative: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """As `_semi_hard`: a triplet counts where the negative's cosine + margin is above the positive's."""
    near = s + margin
    positives = torch.where(positive, s, torch.inf).sort(dim=1).values
    negatives = torch.where(negative, near, -torch.inf).sort(dim=1).values
    of_negative = torch.searchsorted(positives, near) * negative
    of_positive = (s.shape[1] - torch.searchsorted(negatives, s, right=True)) * positive
    return (of_negative - of_positive).to(s.dtype), of_negative.sum()


_PANEL_MINERS = {"semi-hard": _semi_hard, "all": _all}


def _ways(x: Tensor, y: Tensor | None, labels: Tensor, inv_x: Tensor, inv_y: Tensor) -> list[_Way]:
    if y is None:
        return [_Way(x, x, inv_x, inv_x, labels, False)]
    return [_Way(x, y, inv_x, inv_y, labels, True), _Way(y, x, inv_y, inv_x, labels, True)]


def _forward(
    x: Tensor, y: Tensor | None, labels: Tensor, margin: float, mining: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x, labels = x.contiguous(), labels.contiguous()
    y = None if y is None else y.contiguous()
    inv_x = _inverse_norms(x)
    inv_y = inv_x.new_empty(0) if y is None else _inverse_norms(y)
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    count = torch.zeros((), dtype=torch.int64, device=x.device)
    triplets = [labels.new_empty((0, 2))]
    for way in _ways(x, y, labels, inv_x, inv_y):
        if mining == "hard":
            s_p, s_n, at_p, at_n = way.hardest()
            valid = (at_p < len(labels)) & (at_n < len(labels))
            active = valid & (margin + s_n > s_p)
            total += torch.where(active, margin + s_n - s_p, 0.0).sum(dtype=torch.float64)
            count += valid.sum()
            triplets.append(torch.where(active[:, None], torch.stack([at_p, at_n], 1), -1))
        else:
            for _, s, positive, negative in way.panels():
                w, chosen = _PANEL_MINERS[mining](s, positive, negative, margin)
                total += (w * s).sum(dtype=torch.float64) + margin * chosen
                count += chosen
    # A row with a NaN or an infinity has no cosine, and no loss hides it.
    wrong = torch.cat([inv_x, inv_y])
    total = torch.where((wrong.isnan() | (wrong == 0)).any(), torch.nan, total)
    return (total / count.clamp_min(1)).float(), count, torch.cat(triplets), inv_x, inv_y


def _backward(
    dloss: Tensor, x: Tensor, y: Tensor | None, labels: Tensor, count: Tensor, triplets: Tensor,
    inv_x: Tensor, inv_y: Tensor, margin: float, mining: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    x, labels = x.contiguous(), labels.contiguous()
    y = None if y is None else y.contiguous()
    sums = [torch.zeros_like(x, dtype=torch.float32)]
    units = [x.float() * inv_x[:, None]]
    if y is not None:
        sums.append(torch.zeros_like(sums[0]))
        units.append(y.float() * inv_y[:, None])
    n = len(labels)
    for i, way in enumerate(_ways(x, y, labels, inv_x, inv_y)):
        of_anchors, of_others = sums[i], sums[(i + 1) % len(sums)]
        anchors, others = units[i], units[(i + 1) % len(units)]
        if mining == "hard":
            at_p, at_n = triplets[i * n : (i + 1) * n].clamp_min(0).unbind(1)
            active = (triplets[i * n : (i + 1) * n, 1:] >= 0).float()
            of_anchors += (others[at_n] - others[at_p]) * active
            of_others.index_put_((at_n,), anchors * active, accumulate=True)
            of_others.index_put_((at_p,), -anchors * active, accumulate=True)
        else:
            for rows, s, positive, negative in way.panels():
                w, _ = _PANEL_MINERS[mining](s, positive, negative, margin)
                of_anchors[rows] += w @ others
                of_others += w.mT @ anchors[rows]
    g = dloss / count.clamp_min(1)
    dx = through_norms(sums[0].mul_(g * inv_x[:, None]), x, inv_x, EPS)
    if y is None:
        return dx, x.new_empty(0)
    return dx, through_norms(sums[1].mul_(g * inv_y[:, None]), y, inv_y, EPS)


IMPLEMENTATIONS = {"mined_triplet_loss": _forward, "mined_triplet_loss_backward": _backward}


def limits(x: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(x)


def compilations() -> Iterator[Compilation]:
    """Every configuration that the host functions launch."""
    for dtype, pointer in POINTERS.items():
        types = {"p_x": pointer, "p_y": pointer, "p_labels": "*i64"}
        types |= dict.fromkeys(("p_inv_x", "p_inv_y", "p_positive", "p_negative", "p_out"), "*fp32")
        types |= dict.fromkeys(("p_at_positive", "p_at_negative"), "*i32")
        for precision in precisions(dtype):
            constants = {**_tile(dtype), "PRECISION": precision}
            for crossed in (False, True):
                yield Compilation(
                    f"hard {dtype} {precision} {'crossed' if crossed else 'one set'}",
                    hardest_kernel,
                    signature_of(hardest_kernel, types, {**constants, "CROSSED": crossed}),
                    {**constants, "CROSSED": crossed},
                    _options(dtype),
                )
            yield Compilation(
                f"panel {dtype} {precision}",
                cosine_panel_kernel,
                signature_of(cosine_panel_kernel, types, constants),
                constants,
                PANEL_OPTIONS,
            )
