"""One workload, measured: pymm, eager, compiled, the bare GEMM and a copy, interleaved in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymm import ops
from pymm.ops._record import Op, Workload
from pymm.ops._tolerance import allowed, error

Call = Callable[[], Any]
# Above this many elements of the product, the float64 reference would not fit a small machine.
CHECKED_ELEMENTS = 1 << 27


@dataclass(frozen=True)
class Times:
    """Milliseconds: the median and the 20th and 80th percentile."""

    p20_ms: float
    p50_ms: float
    p80_ms: float


def interleaved(calls: dict[str, Call], seconds: float, least: int = 5) -> dict[str, Times]:
    """Time calls alternately, so that a drift of the machine meets all of them alike."""
    for call in calls.values():
        call()
    taken: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds * len(calls)
    while time.perf_counter() < end or len(next(iter(taken.values()))) < least:
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: _times(values) for name, values in taken.items()}


def _times(values: list[float]) -> Times:
    if len(values) == 1:
        return Times(values[0], values[0], values[0])
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return Times(cuts[0], statistics.median(values), cuts[3])


def measure(op: Op, workload: Workload, seconds: float, compiled: bool) -> dict[str, Any]:
    """A row of the result: shapes, error and its bound, times, and the times of the limits.

    `correct` is False when the result or a gradient is further from the float64 reference than the op's
    tests allow, and None when the workload is too large to check; then no ratio is to be drawn from it.
    """
    torch.manual_seed(0)
    args, kwargs = workload.make(workload.dtype)
    row: dict[str, Any] = {
        "op": op.name,
        "workload": workload.label,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "backend": ops.explain(op.function, *args, **kwargs).backend,
    }
    row |= _check(op, workload, args, kwargs)
    functions: dict[str, Callable[..., Any]] = {"pymm": op.function}
    if op.eager is not None:
        functions["eager"] = op.eager
        if compiled:
            torch._dynamo.reset()
            functions["compiled"] = torch.compile(op.eager)
    limits = _limits(workload, args, kwargs)
    forward = {name: _forward(f, args, kwargs) for name, f in functions.items()}
    row["forward"] = _plain(interleaved({**forward, **limits(workload.gemms)}, seconds))
    if op.backward is not None:
        both = {name: _both(f, args, kwargs) for name, f in functions.items()}
        count = workload.gemms + workload.gemms_backward
        row["forward_backward"] = _plain(interleaved({**both, **limits(count)}, seconds))
    return row


def _plain(times: dict[str, Times]) -> dict[str, dict[str, float]]:
    return {name: dict(vars(t)) for name, t in times.items()}


def _forward(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    def call() -> None:
        with torch.no_grad():
            function(*args, **kwargs)

    return call


def _leaves(args: tuple[Any, ...], kwargs: dict[str, Any], dtype: torch.dtype | None = None) -> Any:
    """The arguments, their floating tensors as leaves that require a gradient."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return value.detach().to(dtype or value.dtype).requires_grad_()

    args, kwargs = tuple(leaf(a) for a in args), {k: leaf(v) for k, v in kwargs.items()}
    found = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.requires_grad]
    return args, kwargs, found


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, (tuple, list)) else result


def _both(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    args, kwargs, leaves = _leaves(args, kwargs)
    with torch.no_grad():
        like = _first(function(*args, **kwargs))
    cotangent = torch.randn_like(like, dtype=torch.float32).to(like.dtype)

    def call() -> None:
        out = _first(function(*args, **kwargs))
        torch.autograd.grad(out, leaves, cotangent, allow_unused=True)

    return call


def _check(op: Op, workload: Workload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    m, n, _ = workload.gemm or (0, 0, 0)
    if m * n > CHECKED_ELEMENTS:
        return {"error": None, "allowed": None, "correct": None}
    with ops.backend("reference"):
        truth = _results(op, op.function, *_leaves(args, kwargs, torch.float64))
        plain = _results(op, op.eager or op.function, *_leaves(args, kwargs))
    got = _results(op, op.function, *_leaves(args, kwargs))
    worst, bound = max(
        (
            (error(g, t), allowed(op.tolerance, workload.dtype, p, t))
            for g, p, t in zip(got, plain, truth, strict=True)
        ),
        key=lambda pair: pair[0] / pair[1],
    )
    return {"error": worst, "allowed": bound, "correct": worst <= bound}


def _results(
    op: Op, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[Tensor]
) -> list[Tensor]:
    torch.manual_seed(1)
    out = _first(function(*args, **kwargs))
    if op.backward is None or not out.requires_grad:
        return [out.detach()]
    generator = torch.Generator().manual_seed(0)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    gradients = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    return [out.detach(), *(g for g in gradients if g is not None)]


def _limits(
    workload: Workload, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[int], dict[str, Call]]:
    """The bare GEMM of one product, `count` times, and a copy of the bytes of the arguments."""
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
    source = torch.empty(sum(t.numel() * t.element_size() for t in tensors), dtype=torch.uint8)
    target = torch.empty_like(source)
    operands: tuple[Tensor, Tensor] | None = None
    if workload.gemm is not None:
        m, n, k = workload.gemm
        operands = torch.randn(m, k).to(workload.dtype), torch.randn(n, k).to(workload.dtype)

    def limits(count: int) -> dict[str, Call]:
        calls: dict[str, Call] = {"copy": lambda: target.copy_(source)}
        if operands is not None:
            a, b = operands[0], operands[1].T

            def gemm() -> None:
                for _ in range(count):
                    a @ b

            calls["gemm"] = gemm
        return calls

    return limits


def overhead(op: Op) -> dict[str, float]:
    """Microseconds of one forward call on the op's first sample, a tiny one, and of eager on it."""
    torch.manual_seed(0)
    sample = next(iter(op.samples(torch.float32)))
    functions = {"pymm_us": op.function} | ({"eager_us": op.eager} if op.eager is not None else {})
    calls = {name: _forward(f, sample.args, sample.kwargs) for name, f in functions.items()}
    return {name: t.p50_ms * 1e3 for name, t in interleaved(calls, 0.2, least=50).items()}
