"""Which backend runs an op, chosen in one place.

`auto` takes the best kernel of the tensors' device and falls back to the plain-torch reference where there is
none; an explicit choice (`PYMM_BACKEND`, or the context manager `backend`) that cannot be honoured raises.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from pymm.ops import _gpu
from pymm.ops._extension import EXTENSION, PROBLEM
from pymm.ops._record import REGISTRY, entry

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")


@dataclass(frozen=True)
class Explanation:
    """What `explain` answers: the op, the backend that would run it, and why."""

    op: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend} ({self.reason})"


def _parse(text: str) -> dict[str, str]:
    """`"reference"`, or `"attention=reference,info_nce=cpu"`, as a choice per op name with "*" for all."""
    choices: dict[str, str] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        op, _, name = part.rpartition("=")
        if name not in BACKENDS:
            raise ValueError(f"PYMM_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
        choices[op or "*"] = name
    return choices


_choices: dict[str, str] = _parse(os.environ.get("PYMM_BACKEND", ""))


@contextmanager
def backend(name: str, *ops: str) -> Iterator[None]:
    """Choose a backend for all ops, or for the named ones, inside a `with` block.

    Args:
        name: `"auto"`, `"reference"`, `"cpu"`, `"triton"` or `"cuda"`.
        ops: names of ops; none means all.

    Raises:
        ValueError: when the backend or an op is unknown.
    """
    global _choices
    if name not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {name!r}")
    for op in ops:
        if op not in REGISTRY:
            raise ValueError(f"backend: expected an op of {', '.join(sorted(REGISTRY))}, got {op!r}")
    before = _choices
    _choices = {**before, **dict.fromkeys(ops, name)} if ops else {"*": name}
    try:
        yield
    finally:
        _choices = before


def _choice(op: str) -> str:
    if not _choices:
        return "auto"
    return _choices.get(op, _choices.get("*", "auto"))


@torch.compiler.assume_constant_result
def _has_cpu_kernel(op: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"pymm::{op}", "CPU")


@torch.compiler.assume_constant_result
def _isa() -> str:
    assert EXTENSION is not None
    return EXTENSION.isa()


def _device_of(tensors: tuple[Any, ...]) -> torch.device | None:
    for t in tensors:
        if isinstance(t, torch.Tensor):
            return t.device
    return None


def _missing(op: str, candidate: str, arguments: tuple[Any, ...]) -> str | None:
    """Why a backend would not run these arguments, or None when it would."""
    if candidate != "cpu":
        return _gpu.missing(candidate, op, arguments)
    if EXTENSION is None:
        return PROBLEM
    if not _has_cpu_kernel(op):
        return "this op has no CPU kernel"
    limits = REGISTRY[op].limits
    return limits(*arguments) if limits is not None else None


def _select(op: str, arguments: tuple[Any, ...]) -> Explanation:
    choice = _choice(op)
    if choice == "reference":
        return Explanation(op, "reference", "chosen explicitly")
    device = _device_of(arguments)
    kind = device.type if device is not None else "no device"
    if choice != "auto":
        if choice not in _allowed(kind):
            raise ValueError(f"{op}: backend {choice!r} was chosen explicitly, but the tensors are on {kind}")
        missing = _missing(op, choice, arguments)
        if missing is not None:
            raise ValueError(f"{op}: backend {choice!r} was chosen explicitly, but {missing}")
        return Explanation(op, choice, "chosen explicitly" + _detail(choice))
    reasons = []
    for candidate in _candidates(op, kind):
        missing = _missing(op, candidate, arguments)
        if missing is None:
            return Explanation(op, candidate, f"the kernel for {kind}" + _detail(candidate))
        reasons.append(f"{candidate}: {missing}")
    return Explanation(op, "reference", "; ".join(reasons) or _no_candidate(kind))


def _no_candidate(kind: str) -> str:
    if kind == "cuda":
        return "torch's own product, until a GPU has measured ours; choose triton explicitly"
    return f"no kernel exists for {kind}"


def _candidates(op: str, kind: str) -> tuple[str, ...]:
    """The backends that `auto` tries on a kind of device, best first."""
    if kind == "cpu":
        return ("cpu",)
    return _gpu.preference(op) if kind == "cuda" else ()


def _allowed(kind: str) -> tuple[str, ...]:
    """The backends that may be chosen explicitly on a kind of device."""
    if kind == "cpu":
        return ("cpu", "triton") if _gpu.interpreting() else ("cpu",)
    return ("triton", "cuda") if kind == "cuda" else ()


def _detail(backend_name: str) -> str:
    return f", instruction set {_isa()}" if backend_name == "cpu" else ""


class _Found(Exception):
    """Carries an explanation out of a public function before its kernel runs."""

    def __init__(self, explanation: Explanation) -> None:
        super().__init__(str(explanation))
        self.explanation = explanation


# The thread that is inside explain(); other threads go on computing.
_explaining: int | None = None


def call(op: str, *arguments: Any) -> Any:
    """Run the torch op `op` on `arguments` with the backend in force."""
    if _explaining is not None and _explaining == threading.get_ident():
        raise _Found(_select(op, arguments))
    if not _choices and arguments[0].is_cpu and REGISTRY[op].limits is None:
        return entry("cpu", op)(*arguments)
    return entry(_select(op, arguments).backend, op)(*arguments)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend would run a public op on these arguments, and why, without running it.

    Args:
        op: the op's name, or the public function itself.
        args, kwargs: as for the public function.

    Raises:
        ValueError: when the op is unknown, or the arguments are invalid for it.
    """
    global _explaining
    name = op if isinstance(op, str) else op.__name__
    if name not in REGISTRY:
        raise ValueError(f"explain: expected an op of {', '.join(sorted(REGISTRY))}, got {name!r}")
    _explaining = threading.get_ident()
    try:
        REGISTRY[name].function(*args, **kwargs)
    except _Found as found:
        return found.explanation
    finally:
        _explaining = None
    return Explanation(name, "none", "the result needs no kernel")
