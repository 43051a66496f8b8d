"""Attention's kernels for tensor cores at the widths and lengths that the record's samples do not reach."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pymm.ops import _dispatch, _gpu
from pymm.ops._record import REGISTRY, Sample
from tests.ops.harness import run
from tests.ops.test_records import check

# (heads, key heads, T, S, D, Dv) and what goes with it.
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "whole rows of 197": ((1, 1, 65, 197, 64, 64), {"return_lse": True}),
    "whole rows of 272, causal": ((1, 1, 50, 272, 48, 64), {"is_causal": True}),
    "width 72": ((2, 2, 50, 50, 72, 72), {"return_lse": True}),
    "width 88 and 80, key padding": ((1, 1, 33, 130, 88, 80), {"padding": 101}),
    "width 96, dropout and bias": ((1, 1, 40, 70, 96, 96), {"dropout_p": 0.4, "bias": (1, 1, 40, 70)}),
    "width 128, causal, grouped": (
        (4, 2, 70, 130, 128, 128),
        {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True},
    ),
    "width 112, bias of all rows": ((2, 2, 70, 67, 112, 112), {"bias": (1, 1, 1, 67)}),
    "rows that begin anywhere": ((1, 1, 20, 30, 31, 33), {"offset": 1}),
}


def _sample(name: str, dtype: torch.dtype) -> Sample:
    (heads, groups, rows, columns, width, value_width), more = CASES[name]
    more = dict(more)
    offset, bias, padding = more.pop("offset", 0), more.pop("bias", None), more.pop("padding", None)
    torch.manual_seed(0)

    def rand(*size: int) -> Tensor:
        return torch.randn(*size[:-1], size[-1] + offset, dtype=torch.float64).to(dtype)[..., offset:]

    args = [
        rand(2, heads, rows, width),
        rand(2, groups, columns, width),
        rand(2, groups, columns, value_width),
    ]
    if bias is not None:
        args.append(torch.randn(bias, dtype=torch.float64).to(dtype))
    if padding is not None:
        more["key_padding_mask"] = torch.arange(columns) < torch.tensor([[padding], [columns]])
    return Sample(name, tuple(args), more)


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tensor_cores(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    op, sample = REGISTRY["attention"], _sample(name, dtype)
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    monkeypatch.setattr(_dispatch, "_allowed", lambda kind: ("cuda",))
    monkeypatch.setattr(_gpu, "problem_of", lambda candidate, op: None)
    check(op, sample, dtype, truth, run(op, sample, backend="cuda"))
