"""How wrong a result is, and how wrong it may be: one rule for tests and benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor

# An error is relative to the largest element of the truth, or to this where the truth is nearly zero.
FLOOR = 1e-3
# Plain torch that is further off than this has failed, and excuses nothing.
FAILED = 0.5


def error(got: Tensor, truth: Tensor) -> float:
    """Largest difference over the largest element; infinite when shapes or non-finite elements differ."""
    if got.shape != truth.shape:
        return float("inf")
    if got.numel() == 0:
        return 0.0
    if not got.is_floating_point():
        return 0.0 if torch.equal(got, truth.to(got.dtype)) else float("inf")
    a, b = got.double(), truth.double()
    in_range = truth.to(got.dtype).double()  # what the type cannot hold is an infinity there
    finite = in_range.isfinite()
    if not torch.equal(a[~finite], in_range[~finite]):
        return float("inf")
    a, b = a[finite], b[finite]
    if b.numel() == 0:
        return 0.0
    difference = (a - b).abs().max().item()
    return difference / max(b.abs().max().item(), FLOOR) if difference == difference else float("inf")


def allowed(
    tolerance: dict[torch.dtype, float], dtype: torch.dtype, plain: Tensor | None, truth: Tensor | None
) -> float:
    """The error allowed at a type: the record's tolerance, or twice that of plain torch at the type.

    Plain torch rounds its result once at least; where it is nearer to the truth than that, it is luck.

    Args:
        tolerance: that of an op's record.
        dtype: of the inputs.
        plain: what plain torch gives at that type, None where it gives nothing.
        truth: the reference in float64.
    """
    if dtype in tolerance:
        return tolerance[dtype]
    measured = error(plain, truth) if plain is not None and truth is not None else 0.0
    return 2 * max(measured if measured < FAILED else 0.0, torch.finfo(dtype).eps / 2)
