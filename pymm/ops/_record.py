"""One record per op: what registration, tests, benchmarks and `pymm doctor` all read.

An op has a forward kernel and, when it is differentiable, a backward kernel; both are torch ops. Each schema
is registered in one namespace per backend: `pymm`, where the C++ kernel takes over from the reference on a
CPU, `pymm_reference`, where nothing does, and `pymm_triton` and `pymm_cuda` on first use. So choosing a
backend is choosing a namespace, and autograd, fake tensors and `torch.compile` work alike in all.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pymm.ops._autograd import Entry, connect

NAMESPACES = {"cpu": "pymm", "reference": "pymm_reference", "triton": "pymm_triton", "cuda": "pymm_cuda"}


@dataclass(frozen=True)
class Kernel:
    """A torch op: its schema without the name, its plain-torch reference and its shape function."""

    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]


@dataclass(frozen=True)
class Sample:
    """One call of a public op: a label, positional and keyword arguments.

    `smooth` is False where a finite difference is no derivative: at a kink, or where a choice is made.
    """

    label: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    smooth: bool = True


@dataclass(frozen=True)
class Workload:
    """One measured call.

    Args:
        label: the row's name in the table; with the op's name and the type it selects and pairs rows.
        dtype: of the inputs that `make(dtype)` returns as `(args, kwargs)`.
        gemm: `(M, N, K)` of the op's matrix product, batch folded into M; the bare GEMM beside it is that.
        gemms, gemms_backward: how many such products the forward and the backward pass hold.
        backward: whether forward and backward together are measured too.
        fixed: positions or names of the floating arguments that need no gradient.
        observed: `(args, kwargs, result)` -> the tensors that are compared with the float64 reference's; by
            default the floating ones of the result.
        alone: only a kernel that streams fits a usual machine: no contestant and no reference is run.
        family, size: rows of one family and type are a curve over `size`.
        sweep: a further point of such a curve, measured only when curves are asked for.
    """

    label: str
    dtype: torch.dtype
    make: Callable[[torch.dtype], tuple[tuple[Any, ...], dict[str, Any]]]
    gemm: tuple[int, int, int] | None = None
    gemms: int = 1
    gemms_backward: int = 2
    backward: bool = True
    fixed: tuple[int | str, ...] = ()
    observed: Callable[[tuple[Any, ...], dict[str, Any], Any], tuple[torch.Tensor, ...]] | None = None
    alone: bool = False
    family: str | None = None
    size: int | None = None
    sweep: bool = False


@dataclass(frozen=True)
class Op:
    """The record of an op.

    Args:
        name: of the public function, the file and the torch op.
        function: the public function.
        forward: the forward kernel.
        backward: the backward kernel, or None where the op has no gradient.
        setup_context: `(ctx, inputs, output)`, saves what backward needs.
        backward_call: `(ctx, backward_op, *grads)`, calls `backward_op` and returns one gradient per input.
        samples: `(dtype)` -> the calls that every test of the op makes, edge cases first.
        workloads: what `pymm bench` measures.
        eager: what a user would write without pymm, for the benchmark: same arguments, same result.
        tolerance: relative error allowed per type against the reference in float64; a type that is not there
            may have twice the error that plain torch (`eager`, else the reference) has at that type.
        limits: `(*torch-op arguments)` -> None, or why the CPU kernel does not take them.
    """

    name: str
    function: Callable[..., Any]
    forward: Kernel
    samples: Callable[[torch.dtype], Iterator[Sample]]
    backward: Kernel | None = None
    setup_context: Callable[..., None] | None = None
    backward_call: Callable[..., Any] | None = None
    workloads: Callable[[], Sequence[Workload]] = tuple
    eager: Callable[..., Any] | None = None
    tolerance: dict[torch.dtype, float] = field(
        default_factory=lambda: {torch.float64: 1e-10, torch.float32: 1e-5}
    )
    limits: Callable[..., str | None] | None = None


REGISTRY: dict[str, Op] = {}
_libraries: dict[str, torch.library.Library] = {}
_entries: dict[tuple[str, str], Entry] = {}
_lock = threading.RLock()


def register(op: Op) -> Op:
    """Define the op's schemas for the CPU and the reference, with fake and autograd; keep the record."""
    if op.name in REGISTRY:
        raise ValueError(f"register: the op {op.name!r} is registered already")
    REGISTRY[op.name] = op
    for backend in ("cpu", "reference"):
        library_of(backend, op)
    return op


def library_of(backend: str, op: Op) -> torch.library.Library:
    """The torch library of a backend, with the op's schemas defined in it."""
    namespace = NAMESPACES[backend]
    with _lock:
        if namespace not in _libraries:
            _libraries[namespace] = torch.library.Library(namespace, "DEF")
        library = _libraries[namespace]
        if (backend, op.name) not in _entries:
            _define(library, namespace, op.name, op.forward)
            if op.backward is not None:
                _define(library, namespace, f"{op.name}_backward", op.backward)
            _entries[backend, op.name] = connect(library, namespace, op)
        return library


def entry(backend: str, name: str) -> Entry:
    """What runs an op with a backend whose library has been made."""
    return _entries[backend, name]


def _define(library: torch.library.Library, namespace: str, name: str, kernel: Kernel) -> None:
    library.define(f"{name}{kernel.schema}", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, kernel.reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{name}", kernel.fake, lib=library)
