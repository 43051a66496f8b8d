"""What is measured: the workloads of the ops' records, one tiny call per op, and compositions of ops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pymm import ops
from pymm.benchmarks.limits import Product
from pymm.ops._record import Op, Sample, Workload

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
TINY = "one tiny call"


@dataclass(frozen=True)
class Case:
    """One measured call, whatever it is made of; the fields that a workload has too are the workload's.

    Args:
        op: by which `pymm bench NAME` selects it.
        function, eager: of pymm, and what a user would write without it.
        served: the op whose backend the row names.
        tolerance: as in an op's record.
        products, products_backward: the matrix products `(M, N, K)` of the two passes.
        kind: `workload`, `sweep` or `call`.
    """

    op: str
    label: str
    dtype: torch.dtype
    make: Callable[[torch.dtype], Arguments]
    function: Callable[..., Any]
    eager: Callable[..., Any] | None
    served: str
    tolerance: dict[torch.dtype, float]
    products: Sequence[Product] = ()
    products_backward: Sequence[Product] = ()
    backward: bool = True
    fixed: tuple[int | str, ...] = ()
    observed: Callable[[tuple[Any, ...], dict[str, Any], Any], tuple[Tensor, ...]] | None = None
    alone: bool = False
    family: str | None = None
    size: int | None = None
    kind: str = "workload"

    @property
    def type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def key(self) -> str:
        return f"{self.op}/{self.label}/{self.type}"


@dataclass(frozen=True)
class Selection:
    """Which cases: of these ops (all by default), whose key holds every one of these words."""

    ops: tuple[str, ...] = ()
    words: tuple[str, ...] = ()
    sweep: bool = False


def names() -> list[str]:
    """Every name that selects cases, ops first."""
    from pymm.benchmarks import composed

    return [*sorted(ops.REGISTRY), *composed.CASES]


def cases(selection: Selection) -> list[Case]:
    """The selected cases, in the order of `names()`.

    Raises:
        ValueError: for an unknown name, or when nothing is selected.
    """
    from pymm.benchmarks import composed

    known = names()
    unknown = [name for name in selection.ops if name not in known]
    if unknown:
        raise ValueError(f"bench: expected names of {', '.join(known)}, got {', '.join(unknown)}")
    found: list[Case] = []
    for name in known:
        if not selection.ops or name in selection.ops:
            found += of_op(ops.REGISTRY[name]) if name in ops.REGISTRY else composed.CASES[name]()
    words = [word.lower() for word in selection.words]
    found = [
        case
        for case in found
        if (selection.sweep or case.kind != "sweep") and all(word in case.key.lower() for word in words)
    ]
    if not found:
        text = " ".join(selection.words)
        raise ValueError(
            f"bench: the workloads of {', '.join(selection.ops) or 'all ops'} do not hold {text!r}; "
            "--list shows them"
        )
    return found


def of_op(op: Op) -> list[Case]:
    """The cases of one record: its workloads, and its first sample that is a call of any size."""
    found = [_of_workload(op, workload) for workload in op.workloads()]
    tiny = _tiny(op)
    return [*found, tiny] if tiny is not None else found


def _of_workload(op: Op, w: Workload) -> Case:
    product = [w.gemm] if w.gemm is not None else []
    return Case(
        op=op.name,
        label=w.label,
        dtype=w.dtype,
        make=w.make,
        function=op.function,
        eager=op.eager,
        served=op.name,
        tolerance=op.tolerance,
        products=product * w.gemms,
        products_backward=product * w.gemms_backward,
        backward=w.backward and op.backward is not None,
        fixed=w.fixed,
        observed=w.observed,
        alone=w.alone,
        family=w.family,
        size=w.size,
        kind="sweep" if w.sweep else "workload",
    )


def _tiny(op: Op) -> Case | None:
    """What a call costs: the first sample that is not empty and that eager can do too."""
    if op.eager is None:
        return None
    for index, sample in enumerate(op.samples(torch.float32)):
        if not all(t.numel() for t in (*sample.args, *sample.kwargs.values()) if isinstance(t, Tensor)):
            continue
        try:
            op.eager(*sample.args, **sample.kwargs)
        except NotImplementedError:
            continue
        return Case(
            op=op.name,
            label=TINY,
            dtype=torch.float32,
            make=_sample_maker(op, index),
            function=op.function,
            eager=op.eager,
            served=op.name,
            tolerance=op.tolerance,
            backward=op.backward is not None,
            kind="call",
        )
    return None


def _sample_maker(op: Op, index: int) -> Callable[[torch.dtype], Arguments]:
    def make(dtype: torch.dtype) -> Arguments:
        sample: Sample = list(op.samples(dtype))[index]
        return sample.args, sample.kwargs

    return make
