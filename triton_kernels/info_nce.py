"""InfoNCE in Triton: row and column statistics from one pass over tiles of logits, gradients from another.

Forward, parallel: a grid of groups of row tiles x groups of column tiles. On chip: a tile of logits (two with
a teacher) and the running statistics of its rows; those of its columns wait in a slot that only this program
writes. Slots are combined in a fixed order, so nothing is added atomically. Bytes: the features once per
tile, which L2 serves; 5 (groups) N statistics. Backward: tiles of the logits' gradient go to a buffer that is
one block of the matrix, of bounded size, which feeds the product for the rows and the one for the columns; so
memory is O(N) and the logits are made once. Ragged edges: columns beyond the end count as -inf, rows beyond
it are not written.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymm.triton_kernels._common import (
    EVERY_REGISTER,
    POINTERS,
    Compilation,
    capability,
    cdiv,
    dot_precision,
    float_only,
    precisions,
    product,
    through_norms,
)
from pymm.triton_kernels._info_nce import STATISTICS, info_nce_bwd_kernel, info_nce_fwd_kernel

GROUPS = 16  # at most, of tiles in each direction: 256 programs occupy the largest GPUs of today
EPS = 1e-12
BUFFER_ROWS, BUFFER_BYTES = 8192, 128 << 20  # of the block of the logits' gradient
TOP, TOTAL, HARD, SOFT, ALL = range(5)  # the statistics of a row, see `_info_nce.py`


def _tile(dtype: torch.dtype, teacher: bool, backward: bool, capability: int) -> dict[str, int]:
    """Rows, columns and depth of a tile: the largest that spills no register on a GPU of this capability."""
    if dtype == torch.float32:
        return {"BA": 64, "BC": 32 if teacher else 64, "BE": 16}
    if capability >= 100 and not backward:
        return {"BA": 64, "BC": 32 if teacher else 64, "BE": 32}
    return {"BA": 64, "BC": 64 if teacher else 128, "BE": 32}


def _options(dtype: torch.dtype, teacher: bool, backward: bool) -> dict[str, int]:
    stages = 3
    if dtype == torch.float32:
        stages = 2 if backward and not teacher else 1
    return {"num_warps": 8, "num_stages": stages, **EVERY_REGISTER}


@dataclass(frozen=True)
class _Block:
    """A block of the logits: whose rows meet whose, if pairs are in it, if its columns have a loss too."""

    rows: str
    columns: str
    pairs: bool
    both: bool


class _Call:
    """The features of one call by name (x, y, and the negatives nx, ny), their factors, and the switches."""

    def __init__(
        self, x: Tensor, y: Tensor, scale: Tensor, negatives_x: Tensor | None, negatives_y: Tensor | None,
        ids: Tensor | None, teacher_x: Tensor | None, teacher_y: Tensor | None, normalize: bool,
        symmetric: bool,
    ) -> None:  # fmt: skip
        named = {"x": x, "y": y, "nx": negatives_x, "ny": negatives_y}
        self.features = {k: t.contiguous() for k, t in named.items() if t is not None}
        self.teacher: dict[str, Tensor] = {}
        if teacher_x is not None and teacher_y is not None:
            self.teacher = {**self.features, "x": teacher_x.contiguous(), "y": teacher_y.contiguous()}
        self.inverse = {k: _inverse_norms(t, normalize) for k, t in self.features.items()}
        self.teacher_inverse = {k: _inverse_norms(t, normalize) for k, t in self.teacher.items()}
        self.scale, self.symmetric = scale, symmetric
        self.sides = ("x", "y") if symmetric else ("x",)
        n = x.shape[0]
        self.ids = torch.arange(n, device=x.device) if ids is None else ids.contiguous()
        self.share = torch.ones(n, device=x.device)
        if ids is not None:
            ordered = self.ids.sort().values  # unlike torch.unique it makes no device wait
            first, last = (torch.searchsorted(ordered, self.ids, right=right) for right in (False, True))
            self.share = (last - first).float().reciprocal()
        self.precision = dot_precision(x)
        self.capability = capability(x)

    def tile(self, backward: bool) -> dict[str, int]:
        return _tile(self.features["x"].dtype, bool(self.teacher), backward, self.capability)

    def launch(self, backward: bool) -> dict[str, Any]:
        options = _options(self.features["x"].dtype, bool(self.teacher), backward)
        return {**self.tile(backward), "PRECISION": self.precision, **options}

    def blocks(self) -> Iterator[_Block]:
        yield _Block("x", "y", True, self.symmetric)
        if "ny" in self.features:
            yield _Block("x", "ny", False, False)
        if "nx" in self.features:
            yield _Block("y", "nx", False, False)

    def candidates(self, side: str) -> int:
        """How many candidates a row of x or y has."""
        pair, queue = ("y", "ny") if side == "x" else ("x", "nx")
        return sum(self.features[k].shape[0] for k in (pair, queue) if k in self.features)

    def pointers(self, block: _Block, soft: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """The kernels' first arguments; without a teacher, the last of them are read by nobody."""
        a, b = block.rows, block.columns
        student = (self.features[a], self.features[b], self.inverse[a], self.inverse[b])
        teacher = (*student, self.scale, self.scale)
        if soft:
            teacher = (self.teacher[a], self.teacher[b], self.teacher_inverse[a], self.teacher_inverse[b],
                       soft[a], soft.get(b, soft[a]))  # fmt: skip
        return (*student, self.scale, self.ids, self.ids, *teacher)


def _inverse_norms(t: Tensor, normalize: bool) -> Tensor:
    if not normalize:
        return torch.ones(t.shape[0], device=t.device)
    return torch.linalg.vector_norm(t, dim=-1, dtype=torch.float32).clamp_min(EPS).reciprocal()


def _statistics(c: _Call, teacher: bool, soft: dict[str, Tensor]) -> dict[str, Tensor]:
    """`(5, N)` in float64 for each side, of the teacher's logits or, given its log-sum-exp, of ours."""
    slots: dict[str, list[Tensor]] = {"x": [], "y": []}
    for block in c.blocks():
        rows, columns = c.features[block.rows].shape[0], c.features[block.columns].shape[0]
        tile = c.tile(False)
        groups = min(GROUPS, cdiv(rows, tile["BA"])), min(GROUPS, cdiv(columns, tile["BC"]))
        of_rows = c.share.new_zeros((groups[1], STATISTICS.value, rows))
        of_columns = c.share.new_zeros((groups[0], STATISTICS.value, columns if block.both else 0))
        of_rows[:, TOP] = of_columns[:, TOP] = float("-inf")
        slots[block.rows].append(of_rows)
        if block.both:
            slots[block.columns].append(of_columns)
        if rows == 0 or columns == 0:
            continue
        pointers = list(c.pointers(block, soft))
        if teacher:
            pointers[:2] = c.teacher[block.rows], c.teacher[block.columns]
            pointers[2:4] = c.teacher_inverse[block.rows], c.teacher_inverse[block.columns]
        info_nce_fwd_kernel[groups](
            *pointers, of_rows, of_columns, rows, columns, c.features["x"].shape[1],
            block.both, block.pairs and not teacher, bool(soft), **c.launch(False),
        )  # fmt: skip
    found = {}
    for side in c.sides:
        parts = torch.cat(slots[side]).double()
        sums = parts.sum(0)
        top = parts[:, TOP].amax(0) if parts.shape[0] else sums[TOP]
        sums[TOTAL] = (parts[:, TOTAL] * (parts[:, TOP] - top).exp()).sum(0)
        sums[TOP] = top
        found[side] = sums
    return found


def _lse(statistics: Tensor) -> Tensor:
    return statistics[TOP] + statistics[TOTAL].log()


def _forward(x: Tensor, y: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    label_smoothing, alpha = rest[7:]
    c = _Call(x, y, scale, *rest[:7])
    soft = {k: _lse(s) for k, s in _statistics(c, True, {}).items()} if c.teacher else {}
    losses, lse = [], []
    for side, s in _statistics(c, False, {k: v.float() for k, v in soft.items()}).items():
        target = (1 - alpha) * s[HARD] * c.share + alpha * s[SOFT]
        even = label_smoothing / max(c.candidates(side), 1)
        lse.append(_lse(s))
        losses.append(lse[-1] - (1 - label_smoothing) * target - even * s[ALL])
    return torch.stack(losses).mean(0).float(), torch.stack([*lse, *soft.values()])


@dataclass(frozen=True)
class _Targets:
    """What the gradient of the logits needs beside them, by side where it differs."""

    weight: Tensor
    lse: dict[str, Tensor]
    soft: dict[str, Tensor]
    even: dict[str, float]
    hard_part: float
    soft_part: float
    center: Tensor


def _block_gradients(c: _Call, block: _Block, t: _Targets, sums: dict[str, Tensor]) -> Tensor:
    """Add a block of the logits to the gradients of the unit rows in `sums`; its part of the scale's."""
    features, others = c.features[block.rows], c.features[block.columns]
    rows, columns = features.shape[0], others.shape[0]
    other = block.columns if block.both else block.rows
    # The buffer is of the features' type; float16 would lose small numbers, so it goes through float32.
    factor = torch.float32 if features.dtype == torch.float16 else features.dtype
    step_a = max(1, min(rows, BUFFER_ROWS))
    step_c = max(1, min(columns, BUFFER_BYTES // (step_a * factor.itemsize)))
    buffer = features.new_empty((step_a, step_c), dtype=factor)
    pointers, tile = c.pointers(block, t.soft), c.tile(True)
    dscale = torch.zeros((), dtype=torch.float64, device=features.device)
    for first_a in range(0, rows if columns else 0, step_a):
        a = features[first_a : first_a + step_a].to(factor)
        for first_c in range(0, columns, step_c):
            b = others[first_c : first_c + step_c].to(factor)
            part = buffer[: a.shape[0], : b.shape[0]]
            grid = cdiv(a.shape[0], tile["BA"]), cdiv(b.shape[0], tile["BC"])
            of_scale = t.center.new_empty(grid)
            info_nce_bwd_kernel[grid](
                *pointers, t.lse[block.rows], t.lse[other], t.weight, t.weight, c.share, c.share,
                t.center, part, of_scale, first_a + a.shape[0], first_c + b.shape[0], features.shape[1],
                first_a, first_c, t.hard_part, t.soft_part, t.even[block.rows], t.even[other],
                step_c, block.both, block.pairs, bool(t.soft), **c.launch(True),
            )  # fmt: skip
            dscale += of_scale.sum(dtype=torch.float64)
            if block.rows in sums:
                sums[block.rows][first_a : first_a + step_a] += product(part, b)
            if block.columns in sums:
                sums[block.columns][first_c : first_c + step_c] += product(part.mT, a)
    return dscale


def _backward(
    dlosses: Tensor, lse: Tensor, x: Tensor, y: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    normalize, _, label_smoothing, alpha, needs = rest[5:]
    c = _Call(x, y, scale, *rest[:7])
    sides = len(c.sides)
    pairs = torch.bmm(c.features["x"][:, None], c.features["y"][..., None]).flatten().float()
    kept = 1 - label_smoothing
    targets = _Targets(
        weight=(dlosses / sides).float().contiguous(),
        lse=dict(zip(c.sides, lse, strict=False)),
        soft=dict(zip(c.sides, lse[sides:].float(), strict=False)) if c.teacher else {},
        even={side: label_smoothing / max(c.candidates(side), 1) for side in c.sides},
        hard_part=kept * (1 - alpha),
        soft_part=kept * alpha,
        center=(pairs * c.inverse["x"] * c.inverse["y"]).mean(),
    )
    places = {"x": 0, "y": 1, "nx": 3, "ny": 4}
    sums = {k: torch.zeros_like(t, dtype=torch.float32) for k, t in c.features.items() if needs[places[k]]}
    dscale = torch.zeros((), dtype=torch.float64, device=x.device)
    for block in c.blocks():
        dscale += _block_gradients(c, block, targets, sums)

    def gradient(name: str) -> Tensor:
        if name not in sums:
            return x.new_empty((0, x.shape[1]))
        inverse = c.inverse[name] if normalize else None
        return through_norms(sums.pop(name).mul_(scale), c.features[name], inverse, EPS)

    dx, dy, dnx, dny = (gradient(name) for name in places)
    return dx, dy, dscale.to(scale.dtype), dnx, dny


IMPLEMENTATIONS = {"info_nce": _forward, "info_nce_backward": _backward}


def limits(x: Tensor, *_: Any) -> str | None:
    """Why these arguments are left to the reference, or None."""
    return float_only(x)


# (columns, pairs, teacher): CLIP's loss, one way of it, a queue, distillation, its queue. The teacher's own
# pass and the other ways are these with less.
_SWITCHES = {
    "pairs": (True, True, False),
    "queue": (False, False, False),
    "distillation": (True, True, True),
    "queue of distillation": (False, False, True),
}


def compilations() -> Iterator[Compilation]:
    """Every configuration that the host functions launch."""
    floats = ("p_inv_a", "p_inv_c", "p_scale", "p_inv_ta", "p_inv_tc", "p_tlse_a", "p_tlse_c")
    weights = dict.fromkeys(("p_weight_a", "p_weight_c", "p_share_a", "p_share_c"), "*fp32")
    sizes = dict.fromkeys(("A", "C", "E"), "i32")
    numbers = dict.fromkeys(("hard_part", "soft_part", "even_a", "even_c"), "fp32")
    firsts = dict.fromkeys(("FIRST_A", "FIRST_C", "s_out"), "i32")
    for dtype, pointer in POINTERS.items():
        shared = dict.fromkeys(("p_a", "p_c", "p_ta", "p_tc"), pointer) | dict.fromkeys(floats, "*fp32")
        shared |= {"p_id_a": "*i64", "p_id_c": "*i64", **sizes}
        out = {"p_out": "*fp32" if dtype == torch.float16 else pointer}
        out |= {"p_center": "*fp32", "p_dscale": "*fp32"}
        lse = {"p_lse_a": "*fp64", "p_lse_c": "*fp64"}
        for precision in precisions(dtype):
            for label, (both, pairs, teacher) in _SWITCHES.items():
                switches = {"COLUMNS": both, "HARD": pairs, "TEACHER": teacher, "PRECISION": precision}
                for capabilities in ((80, 90), (100,)):
                    yield Compilation(
                        f"forward {dtype} {precision} {label}",
                        info_nce_fwd_kernel,
                        {**shared, "p_rows": "*fp32", "p_columns": "*fp32"},
                        {**switches, **_tile(dtype, teacher, False, capabilities[0])},
                        _options(dtype, teacher, False),
                        capabilities,
                    )
                yield Compilation(
                    f"backward {dtype} {precision} {label}",
                    info_nce_bwd_kernel,
                    {**shared, **lse, **weights, **out, **firsts, **numbers},
                    {**switches, **_tile(dtype, teacher, True, 90)},
                    _options(dtype, teacher, True),
                )
