"""One case, measured: checked against float64, timed among its peers and limits, its memory taken."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymm import ops
from pymm.benchmarks.cases import Case
from pymm.benchmarks.check import Check, Kwargs, check, cotangent_of, error_of, leaves_of, outputs_of
from pymm.benchmarks.limits import limits, operations
from pymm.benchmarks.load import Load
from pymm.benchmarks.memory import peak_bytes
from pymm.benchmarks.peers import Function, peers, reason_of
from pymm.benchmarks.schema import PASSES, Contestant, Pass, Row
from pymm.benchmarks.timing import Call, interleaved, timed, times

CPU = torch.device("cpu")
OURS = ("pymm", "eager", "compiled")  # they define the result; any other contestant is checked against it


@dataclass(frozen=True)
class Options:
    """How to measure.

    Args:
        seconds: for the rounds of one case; compiling and the check come on top.
        compiled: measure torch.compile of eager and of some peers.
        memory: measure peaks of memory.
        device: where.
    """

    seconds: float = 10.0
    compiled: bool = True
    memory: bool = True
    device: torch.device = CPU


@dataclass(frozen=True)
class Entrant:
    """A contestant before its race: its function, whether it has gradients, its forward error."""

    function: Function
    differentiable: bool
    error: float | None
    same: bool


@dataclass(frozen=True)
class First:
    """What a first call shows; all that is known of one that outlasts its budget."""

    seconds: float
    peak_bytes: int | None
    result_bytes: int


def measure(case: Case, options: Options) -> Row:
    """The row of a case. Whatever stops it is the row's `failure`; only an interruption is raised."""
    row: dict[str, Any] = {
        "op": case.op,
        "label": case.label,
        "dtype": case.type,
        "kind": case.kind,
        "family": case.family,
        "size": case.size,
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    before = Load.now()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            row |= _measured(case, options)
    except Exception as stopped:
        row["failure"] = reason_of(stopped)
    after = Load.now()
    if before is not None and after is not None:
        row["others"] = round(after.others_since(before), 3)
    return Row(**row)


def _measured(case: Case, options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    args, kwargs = _to(case.make(case.dtype), options.device)
    checked = check(case, args, kwargs)
    torch._dynamo.reset()  # each case is compiled for its own shapes
    others, absent = peers(case, args, kwargs, options.compiled)
    entrants: dict[str, Entrant] = {}
    for name, (function, differentiable) in {"pymm": (case.function, True), **others}.items():
        try:
            entrants[name] = _entrant(case, name, function, differentiable, args, kwargs, checked)
        except Exception as failed:
            if name == "pymm":
                raise
            absent[name] = reason_of(failed)
    return {
        "backend": _backend(case, args, kwargs),
        "correct": checked.correct,
        "error": checked.error,
        "allowed": checked.allowed,
        "unchecked": checked.unchecked,
        "passes": {
            name: _pass(case, name == "forward_backward", entrants, dict(absent), args, kwargs, options)
            for name in PASSES[: 2 if case.backward else 1]
        },
    }


def _entrant(
    case: Case,
    name: str,
    function: Function,
    differentiable: bool,
    args: tuple[Any, ...],
    kwargs: Kwargs,
    checked: Check,
) -> Entrant:
    if checked.forward is None:
        return Entrant(function, differentiable, None, True)
    off = error_of(case, function, args, kwargs, checked.forward)
    return Entrant(function, differentiable, off, name in OURS or not checked.another(off))


def _pass(
    case: Case,
    backward: bool,
    entrants: dict[str, Entrant],
    absent: dict[str, str],
    args: tuple[Any, ...],
    kwargs: Kwargs,
    options: Options,
) -> Pass:
    device = options.device
    budget = options.seconds / (2 if case.backward else 1)
    calls: dict[str, Call] = {}
    first: dict[str, First] = {}
    for name, entrant in entrants.items():
        if backward and not entrant.differentiable:
            absent[name] = "has no gradient"
            continue
        f = entrant.function
        call = _both(case, f, args, kwargs) if backward else _forward(f, args, kwargs)
        try:
            if name.endswith("compiled"):
                call()  # compiles
            first[name] = _first(call, device)
        except Exception as failed:
            if name == "pymm":
                raise
            absent[name] = reason_of(failed)
        else:
            calls[name] = call
    result_bytes = first["pymm"].result_bytes
    moved_bytes = _size((*args, *kwargs.values())) + result_bytes
    products = [*case.products, *(case.products_backward if backward else ())]
    bounds = limits(products, moved_bytes, case.dtype, device) if case.kind != "call" else {}
    quick = {name: call for name, call in calls.items() if first[name].seconds <= budget}
    bare = {f"limit {name}": limit.call for name, limit in bounds.items()}
    for call in bare.values():
        call()
    taken = interleaved({**quick, **bare}, budget, device)
    with_memory = options.memory and case.kind != "call"
    contestants = {}
    for name, call in calls.items():
        peak = None
        if with_memory:
            peak = peak_bytes(call, device) if name in quick else first[name].peak_bytes
        contestants[name] = Contestant(
            times(taken.get(name, [first[name].seconds])), peak, entrants[name].error, entrants[name].same
        )
    return Pass(
        operations=operations(products),
        moved_bytes=moved_bytes,
        result_bytes=result_bytes,
        contestants=contestants,
        limits={name: times(taken[f"limit {name}"], bound.factor) for name, bound in bounds.items()},
        absent=absent,
    )


def _first(call: Call, device: torch.device) -> First:
    seconds, size = 0.0, 0

    def sized() -> None:
        nonlocal size
        size = _size(call())

    def once() -> None:
        nonlocal seconds
        seconds = timed(sized, device)

    peak = peak_bytes(once, device)
    return First(seconds, peak, size)


def _forward(function: Function, args: tuple[Any, ...], kwargs: Kwargs) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return call


def _both(case: Case, function: Function, args: tuple[Any, ...], kwargs: Kwargs) -> Callable[[], Any]:
    leaf_args, leaf_kwargs, leaves = leaves_of(case, args, kwargs)
    cotangent: Tensor | None = None

    def call() -> Any:
        nonlocal cotangent
        out = outputs_of(function(*leaf_args, **leaf_kwargs))[0]
        if cotangent is None:
            cotangent = cotangent_of(out)
        return out, torch.autograd.grad(out, leaves, cotangent, allow_unused=True)

    return call


def _size(value: Any) -> int:
    """Bytes of the tensors in it."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    return sum(map(_size, value)) if isinstance(value, (tuple, list)) else 0


def _to(arguments: tuple[tuple[Any, ...], Kwargs], device: torch.device) -> tuple[tuple[Any, ...], Kwargs]:
    args, kwargs = arguments

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    return tuple(moved(a) for a in args), {k: moved(v) for k, v in kwargs.items()}


def _backend(case: Case, args: tuple[Any, ...], kwargs: Kwargs) -> str:
    if case.op == case.served:
        return ops.explain(case.served, *args, **kwargs).backend
    x = next(a for a in args if isinstance(a, Tensor))
    return ops.explain(case.served, x, x.new_zeros(1, x.shape[-1])).backend
