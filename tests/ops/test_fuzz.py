"""Random calls of every op against the reference in float64.

`PYMM_FUZZ=5000 pytest tests/ops/test_fuzz.py` draws five thousand calls of each op instead of the few of the
ordinary run, and `PYMM_FUZZ_SEED` begins elsewhere; a failure names the seed that repeats it.
"""

from __future__ import annotations

import os
import random

import pytest
import torch
from torch import Tensor

from pymm.ops._extension import EXTENSION
from pymm.ops._record import REGISTRY
from pymm.ops._tolerance import allowed, error
from tests.ops.fuzz import FUZZED, Draw
from tests.ops.harness import instruction_set, run

CALLS = int(os.environ.get("PYMM_FUZZ", "40"))
FIRST = int(os.environ.get("PYMM_FUZZ_SEED", "0"))
CANCELLED, NOTHING = 0.2, 1e-9
ISAS = EXTENSION.available_isas() if EXTENSION is not None else []


def test_every_op_is_drawn() -> None:
    assert FUZZED.keys() == REGISTRY.keys()


def largest(t: Tensor | None) -> float:
    finite = t[t.isfinite()] if t is not None and t.is_floating_point() else None
    return finite.abs().max().item() if finite is not None and finite.numel() else 0.0


def check(name: str, seed: int, threads) -> None:
    op, (draw, dtypes) = REGISTRY[name], FUZZED[name]
    chosen = random.Random(seed)
    dtype, isa, count = chosen.choice(dtypes), chosen.choice(ISAS), chosen.choice((1, 2, 3))
    sample = draw(Draw(seed, dtype))
    truth = run(op, sample, dtype=torch.float64, backend="reference").named()
    plain = {} if dtype in op.tolerance else run(op, sample, backend="reference").named()
    threads(count)
    with instruction_set(isa):
        got = run(op, sample).named()
    for part, expected in truth.items():
        where = f"{name} seed {seed}, {dtype}, {isa}, {count} threads: {part}"
        found = got[part]
        assert (found is None) == (expected is None), where
        if expected is None or found is None:
            continue
        bound = allowed(op.tolerance, dtype, plain.get(part), expected)
        if dtype not in op.tolerance:  # among thousands of small results, plain torch is lucky in some
            bound = max(bound, 4 * torch.finfo(dtype).eps)
        off = error(found, expected)
        # What cancels keeps the rounding of its terms, which are as large as the other parts, or one.
        terms = max(1.0, *(largest(other) for other in truth.values()))
        if largest(expected) < NOTHING:
            off = largest(found) / terms
        elif dtype in op.tolerance and largest(expected) < CANCELLED * terms:
            off = largest(found.double() - expected) / (CANCELLED * terms)
        assert off <= bound, f"{where}: error {off:.2e}, allowed {bound:.2e}"


@pytest.mark.parametrize("name", FUZZED)
def test_random_calls(name: str, poisoned, threads) -> None:
    for seed in range(FIRST, FIRST + CALLS):
        check(name, seed, threads)
