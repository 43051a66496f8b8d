"""A second derivative is right, or it is refused in words; it is never silently wrong."""

from __future__ import annotations

import contextlib

import pytest
import torch
from torch import Tensor

from pymm.ops import REGISTRY
from pymm.ops._record import Sample
from tests.ops.harness import run, samples

LARGEST = 400  # numbers in a sample


def _small(name: str) -> list[Sample]:
    def sizes(sample: Sample) -> list[int]:
        return [v.numel() for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, Tensor)]

    every = samples(REGISTRY[name], torch.float64)
    return [s for s in every if s.smooth and sum(sizes(s)) > 0 and max(sizes(s)) <= LARGEST]


@pytest.mark.parametrize("name", sorted(n for n, op in REGISTRY.items() if op.backward is not None))
def test_double_backward(name: str) -> None:
    op, checked = REGISTRY[name], 0
    for sample in _small(name)[:4]:
        keys = [*range(len(sample.args)), *sample.kwargs]
        values = dict(zip(keys, (*sample.args, *sample.kwargs.values()), strict=True))
        gradients = run(op, sample).gradients  # a box has none, and the second derivative none through it
        names = {k: f"gradient of argument {k}" if isinstance(k, int) else f"gradient of {k}" for k in keys}
        wanted = [k for k in keys if gradients.get(names[k]) is not None]

        def function(*leaves: Tensor, sample=sample, values=values, wanted=wanted):
            at = {**values, **dict(zip(wanted, leaves, strict=True))}
            args = [at[i] for i in range(len(sample.args))]
            torch.manual_seed(1)
            out = op.function(*args, **{k: at[k] for k in sample.kwargs})
            return out[0] if isinstance(out, tuple) else out

        leaves = [values[k].detach().clone().requires_grad_() for k in wanted]
        with contextlib.suppress(NotImplementedError):  # says that there is no second derivative
            assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True, atol=1e-5, rtol=1e-3)
        checked += 1
    assert checked, "no sample is small enough"
