"""Runs a record's samples with any backend, type and instruction set, and says how wrong a result is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pymm import ops
from pymm.ops._extension import require_extension
from pymm.ops._record import REGISTRY, Op, Sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def samples(op: Op, dtype: torch.dtype) -> list[Sample]:
    torch.manual_seed(0)
    return list(op.samples(dtype))


def cases() -> list[tuple[str, int, str]]:
    """`(op, index of the sample, label)` of every sample of every record."""
    return [
        (op.name, i, sample.label)
        for op in REGISTRY.values()
        for i, sample in enumerate(samples(op, torch.float32))
    ]


def sample_of(name: str, index: int, dtype: torch.dtype) -> tuple[Op, Sample]:
    op = REGISTRY[name]
    return op, samples(op, dtype)[index]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    extension = require_extension()
    before = extension.isa()
    extension.set_isa(name)
    try:
        yield
    finally:
        extension.set_isa(before)


@dataclass(frozen=True)
class Result:
    """Outputs, and the gradient of each floating argument (None where the op has none)."""

    outputs: tuple[Tensor, ...]
    gradients: dict[str, Tensor | None]

    def named(self) -> dict[str, Tensor | None]:
        return {**{f"output {i}": o for i, o in enumerate(self.outputs)}, **self.gradients}


def _prepare(
    sample: Sample, dtype: torch.dtype | None, leaves: dict[str, Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    def leaf(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        if not value.is_floating_point():
            return value
        if dtype is not None:
            value = value.to(dtype)
        leaves[name] = value.requires_grad_()
        return value

    args = [leaf(f"argument {i}", a) for i, a in enumerate(sample.args)]
    return args, {k: leaf(k, v) for k, v in sample.kwargs.items()}


def _cotangent(output: Tensor, index: int, like: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(index)
    value = torch.randn(output.shape, generator=generator, dtype=torch.float64)
    return value.to(like).to(output.dtype)


def run(
    op: Op,
    sample: Sample,
    *,
    function: Any = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Result:
    """Call an op on a sample, in `dtype` if given, and differentiate it.

    The cotangents are those of the sample's own type, so that a run in float64 answers the same question.
    """
    leaves: dict[str, Tensor] = {}
    args, kwargs = _prepare(sample, dtype, leaves)
    own = next(
        a.dtype
        for a in (*sample.args, *sample.kwargs.values())
        if isinstance(a, Tensor) and a.is_floating_point()
    )
    torch.manual_seed(1)
    with ops.backend(backend) if backend else nullcontext():
        got = (function or op.function)(*args, **kwargs)
        outputs = tuple(got) if isinstance(got, (tuple, list)) else (got,)
        roots = [(o, _cotangent(o, i, own)) for i, o in enumerate(outputs) if o.requires_grad]
        gradients: dict[str, Tensor | None] = dict.fromkeys(leaves)
        if roots and leaves:
            found = torch.autograd.grad(
                [o for o, _ in roots], list(leaves.values()), [c for _, c in roots], allow_unused=True
            )
            gradients = dict(zip(leaves, found, strict=True))
    return Result(tuple(o.detach() for o in outputs), {f"gradient of {k}": g for k, g in gradients.items()})


class Recorder(TorchDispatchMode):
    """Collects the torch ops of one record that run inside it, with their arguments."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.names = {f"pymm::{op.name}", f"pymm::{op.name}_backward"}
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().split(".")[0] in self.names:
            # A saved output carries the graph of this run, which is gone when the call is made again.
            leaves = (
                a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args
            )
            self.calls.append((func, tuple(leaves)))
        return func(*args, **(kwargs or {}))
