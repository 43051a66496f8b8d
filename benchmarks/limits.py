"""What a workload is held against: the arithmetic peak, torch's bare GEMMs, and a copy of as many bytes.

All three are measured in the same rounds as the workload.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pymm.benchmarks.timing import Call
from pymm.ops._extension import EXTENSION

Product = tuple[int, int, int]
# A product with a larger result is measured on some of its rows, and its time multiplied.
LARGEST_RESULT = 1 << 28
PEAK_SECONDS = 8e-3


@dataclass(frozen=True)
class Limit:
    """A call, and the factor by which its time is that of the whole workload."""

    call: Call
    factor: float


def operations(products: Sequence[Product]) -> float:
    """Multiplications and additions of matrix products `(M, N, K)`."""
    return float(sum(2 * m * n * k for m, n, k in products))


def limits(
    products: Sequence[Product], moved_bytes: int, dtype: torch.dtype, device: torch.device
) -> dict[str, Limit]:
    """`peak`, `gemm` and `copy`, each where there is such a thing for the workload.

    Args:
        products: the workload's matrix products.
        moved_bytes: what it reads and writes at least; the copy reads half of that and writes half.
        dtype, device: of the operands.
    """
    found: dict[str, Limit] = {}
    if products:
        if device.type == "cpu" and EXTENSION is not None:
            found["peak"] = peak(operations(products), str(dtype).removeprefix("torch."))
        found["gemm"] = _gemm(products, dtype, device)
    if moved_bytes >= 2:
        source = torch.zeros(moved_bytes // 2, dtype=torch.uint8, device=device)
        target = torch.zeros_like(source)
        found["copy"] = Limit(lambda: target.copy_(source), 1.0)
    return found


def peak(wanted: float, dtype: str) -> Limit:
    """So many operations of a type as multiply-adds in registers, on all threads of the CPU."""
    assert EXTENSION is not None
    run = EXTENSION.peak_operations
    steps, before = 1000, math.inf
    # Until the start of the threads is little beside the loop: it is long, and was much shorter at half the
    # steps. Where another process has a core, a call that does nothing takes a slice of its time.
    while True:
        taken = []
        for _ in range(5):
            begin = time.perf_counter()
            done = run(dtype, steps)
            taken.append(time.perf_counter() - begin)
        if min(taken) >= max(PEAK_SECONDS, 1.5 * before):
            return Limit(partial(run, dtype, steps), wanted / done)
        steps, before = 2 * steps, min(taken)


def _gemm(products: Sequence[Product], dtype: torch.dtype, device: torch.device) -> Limit:
    whole = operations(products)
    cut = [(min(m, max(1, LARGEST_RESULT // n)), n, k) for m, n, k in products]
    operands: dict[Product, tuple[Tensor, Tensor]] = {}
    for product in cut:
        m, n, k = product
        if product not in operands:
            operands[product] = (
                torch.randn(m, k, device=device).to(dtype),
                torch.randn(n, k, device=device).to(dtype).T,
            )

    def gemm() -> None:
        for product in cut:
            a, b = operands[product]
            torch.mm(a, b)

    return Limit(gemm, whole / operations(cut))
