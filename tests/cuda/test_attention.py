"""Attention's kernels for tensor cores at the widths and lengths that the records' samples do not reach."""

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


# The lengths of q's sequences and of k's, then (heads, key heads, D, Dv) and what goes with it.
PACKED: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "whole tiles among empty ones": ((64, 0, 128), (64, 0, 128), (1, 1, 64, 64), {"is_causal": True}),
    "tiles that end in each sequence": (
        (1,) * 9 + (70,),
        (3, 0, 65) + (2,) * 6 + (90,),
        (2, 1, 96, 80),
        {"enable_gqa": True, "return_lse": True},
    ),
    "width 128, causal, grouped, dropout": (
        (33, 65, 0, 7),
        (100, 20, 5, 64),
        (4, 2, 128, 128),
        {"is_causal": True, "causal_alignment": "lower_right", "enable_gqa": True, "dropout_p": 0.4},
    ),
    "width 144": ((5, 70), (66, 9), (1, 1, 144, 130), {"return_lse": True}),
}


def _packed(name: str, dtype: torch.dtype) -> Sample:
    lengths_q, lengths_k, (heads, groups, width, value_width), more = PACKED[name]
    torch.manual_seed(0)
    shapes = (
        (sum(lengths_q), heads, width),
        (sum(lengths_k), groups, width),
        (sum(lengths_k), groups, value_width),
    )
    tensors = (torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes)
    starts = (torch.tensor([0, *lengths]).cumsum(0) for lengths in (lengths_q, lengths_k))
    return Sample(name, (*tensors, *starts), more)


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


def _agrees(op: str, sample: Sample, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = run(REGISTRY[op], sample, dtype=torch.float64, backend="reference")
    monkeypatch.setattr(_dispatch, "_allowed", lambda kind: ("cuda",))
    monkeypatch.setattr(_gpu, "problem_of", lambda candidate, op: None)
    check(REGISTRY[op], sample, dtype, truth, run(REGISTRY[op], sample, backend="cuda"))


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_tensor_cores(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _agrees("attention", _sample(name, dtype), dtype, monkeypatch)


@pytest.mark.usefixtures("emulated", "poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PACKED)
def test_packed_sequences(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    _agrees("attention_varlen", _packed(name, dtype), dtype, monkeypatch)


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("offsets", [[1, 4, 6], [0, 7, 6], [0, 4, 5], [0, 4, 7]])
def test_offsets_that_are_none_end_the_launch(offsets: list[int]) -> None:
    x, good, bad = torch.zeros(6, 1, 8), torch.tensor([0, 2, 6]), torch.tensor(offsets)
    run_forward = torch.ops.pymm_cuda.attention_varlen
    for starts in ((good, bad), (bad, good)):
        with pytest.raises(RuntimeError, match="trapped"):
            run_forward(x, x, x, *starts, None, 0.0, 1.0, 0)
    run_forward(x, x, x, good, good, None, 0.0, 1.0, 0)
