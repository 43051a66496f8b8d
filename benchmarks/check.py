"""Is a result right? Against the reference in float64, by the rule of the op's tests."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymm import ops
from pymm.benchmarks.cases import Case
from pymm.benchmarks.peers import Function
from pymm.ops._tolerance import allowed, error

Kwargs = dict[str, Any]
# A peer whose result is further from float64 than this, and than four times what pymm's may be, computes
# something else.
ANOTHER_RESULT = 0.05


@dataclass(frozen=True)
class Check:
    """What the comparison gave, `forward` being the reference's result; or why there was none."""

    correct: bool | None = None
    error: float | None = None
    allowed: float | None = None
    unchecked: str | None = None
    forward: tuple[Tensor, ...] | None = None

    def another(self, off: float | None) -> bool:
        """Whether a peer that is so far off computes something else."""
        return off is not None and off > max(ANOTHER_RESULT, 4 * (self.allowed or 0.0))


def leaves_of(
    case: Case, args: tuple[Any, ...], kwargs: Kwargs, dtype: torch.dtype | None = None
) -> tuple[tuple[Any, ...], Kwargs, list[Tensor]]:
    """The arguments, their floating tensors as leaves; and those of them that need a gradient."""
    found: list[Tensor] = []

    def leaf(place: int | str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        value = value.detach().to(dtype or value.dtype)
        if case.backward and place not in case.fixed:
            found.append(value.requires_grad_())
        return value

    return tuple(leaf(i, a) for i, a in enumerate(args)), {k: leaf(k, v) for k, v in kwargs.items()}, found


def outputs_of(result: Any) -> tuple[Tensor, ...]:
    """The floating tensors of a result; the first is the one that is differentiated."""
    parts = result if isinstance(result, (tuple, list)) else (result,)
    return tuple(part for part in parts if isinstance(part, Tensor) and part.is_floating_point())


def cotangent_of(out: Tensor) -> Tensor:
    """The same numbers in every type, so that float64 answers the same question."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(out.shape, generator=generator).to(torch.bfloat16).to(out)


def check(case: Case, args: tuple[Any, ...], kwargs: Kwargs) -> Check:
    """Compare pymm's result and gradients; the pair of error and bound that is worst."""
    if case.alone:
        return Check(unchecked="the float64 reference would not fit")
    with ops.backend("reference"):
        forward, gradients = _results(case, case.function, args, kwargs, torch.float64)
        truth = [*forward, *gradients]
        plain: list[Tensor | None] = [None] * len(truth)
        if case.dtype not in case.tolerance:
            seen, found = _results(case, case.eager or case.function, args, kwargs, None)
            plain = [*seen, *found]
    seen, found = _results(case, case.function, args, kwargs, None)
    pairs = [(0.0, allowed(case.tolerance, case.dtype, None, None))]
    for got, expected, other in zip([*seen, *found], truth, plain, strict=True):
        if got is not None and expected is not None:
            pairs.append((_finite(got, expected), allowed(case.tolerance, case.dtype, other, expected)))
        elif got is not expected:
            pairs.append((sys.float_info.max, 1.0))
    worst, bound = max(pairs, key=lambda pair: pair[0] / pair[1])
    return Check(worst <= bound, worst, bound, None, forward)


def error_of(
    case: Case, function: Function, args: tuple[Any, ...], kwargs: Kwargs, truth: tuple[Tensor, ...]
) -> float:
    """The error of a contestant's forward result."""
    with torch.no_grad():
        seen = _observed(case, args, kwargs, function(*args, **kwargs))
    if len(seen) != len(truth):
        return sys.float_info.max
    return max((_finite(a, b) for a, b in zip(seen, truth, strict=True)), default=0.0)


def _finite(got: Tensor, truth: Tensor) -> float:
    """The error as a number that JSON can hold."""
    return min(error(got, truth), sys.float_info.max)


def _observed(case: Case, args: tuple[Any, ...], kwargs: Kwargs, result: Any) -> tuple[Tensor, ...]:
    seen = outputs_of(result) if case.observed is None else case.observed(args, kwargs, result)
    return tuple(part.detach() for part in seen)


def _results(
    case: Case, function: Function, args: tuple[Any, ...], kwargs: Kwargs, dtype: torch.dtype | None
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """What is compared of the result, and the gradients of its first output."""
    torch.manual_seed(1)
    leaf_args, leaf_kwargs, leaves = leaves_of(case, args, kwargs, dtype)
    result = function(*leaf_args, **leaf_kwargs)
    seen = _observed(case, leaf_args, leaf_kwargs, result)
    out = outputs_of(result)[0]
    if not leaves or not out.requires_grad:
        return seen, []
    return seen, list(torch.autograd.grad(out, leaves, cotangent_of(out), allow_unused=True))
