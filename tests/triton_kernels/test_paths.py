"""Paths of the Triton kernels that the samples of the records are too small for, in the interpreter."""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
import torch

from pymm import ops
from pymm.ops._record import REGISTRY, Sample
from tests.ops.harness import run
from tests.ops.test_records import check

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("run by test_interpreter.py", allow_module_level=True)

F16, F32 = torch.float16, torch.float32


def module(name: str) -> Any:
    return importlib.import_module(f"pymm.triton_kernels.{name}")


def agree(name: str, *args: Any, **kwargs: Any) -> None:
    """The Triton kernel's results and gradients are those of the reference in float64."""
    op, sample = REGISTRY[name], Sample("", args, kwargs)
    dtype = next(a.dtype for a in args if a.is_floating_point())
    truth = run(op, sample, dtype=torch.float64, backend="reference")
    with ops.backend("triton"):
        assert ops.explain(name, *args, **kwargs).backend == "triton"
    check(op, sample, dtype, truth, run(op, sample, backend="triton"))


def qkv(b: int, h: int, t: int, s: int, d: int, dtype: torch.dtype, hkv: int = 0, dv: int = 0) -> Any:
    shapes = (b, h, t, d), (b, hkv or h, s, d), (b, hkv or h, s, dv or d)
    return tuple(torch.randn(shape).to(dtype) for shape in shapes)


@pytest.mark.parametrize(("t", "s", "d"), [(20, 50, 64), (70, 197, 64), (17, 257, 32), (17, 75, 88)])
def test_attention_of_whole_rows(t: int, s: int, d: int) -> None:
    assert module("_attention_tiles").forward_tile(F16, d, d, s)["WHOLE"]
    agree("attention", *qkv(1, 2, t, s, d, F16), key_padding_mask=torch.arange(s)[None] < s - 3)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
@pytest.mark.parametrize("kwargs", [{}, {"is_causal": True, "causal_alignment": "lower_right"}])
def test_attention_makes_all_gradients_together(
    kwargs: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module("attention"), "ENOUGH", 1)
    agree("attention", *qkv(1, 4, 75, 140, 20, dtype, hkv=2, dv=24), enable_gqa=True, **kwargs)


@pytest.mark.parametrize("dtype", [F16, F32], ids=str)
def test_attention_decodes_in_parts(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("attention"), "CHUNK", 64)
    hidden = torch.rand(2, 1, 3, 300) < 0.5
    hidden[0, :, 1] = False
    kwargs = {"enable_gqa": True, "is_causal": True, "causal_alignment": "lower_right", "return_lse": True}
    agree("attention", *qkv(2, 4, 3, 300, 40, dtype, hkv=2), hidden, **kwargs)
    agree("attention", *qkv(1, 2, 2, 150, 16, dtype), torch.randn(2, 2, 150).to(dtype), 0.3)


@pytest.mark.parametrize(("d", "dtype"), [(40, F32), (72, F16), (144, F16)])
def test_attention_drops_alike_in_every_tile(d: int, dtype: torch.dtype) -> None:
    agree("attention", *qkv(1, 1, 40, 150, d, dtype), None, 0.4)


@pytest.mark.parametrize(
    "shape", [(2, 4, 1, 1), (1, 1, 70, 90), (2, 1, 1, 90), (1, 4, 70, 1), (2, 4, 70, 90)]
)
def test_attention_reduces_the_gradient_of_a_bias(shape: tuple[int, ...]) -> None:
    agree(
        "attention", *qkv(2, 4, 70, 90, 16, F32, hkv=2), torch.randn(shape), enable_gqa=True, return_lse=True
    )


def test_attention_varlen_with_gaps_and_groups() -> None:
    starts_q, starts_k = torch.tensor([0, 70, 70, 71, 140]), torch.tensor([0, 5, 80, 80, 210])
    q, k, v = (
        torch.randn(140, 4, 24).to(F16),
        torch.randn(210, 2, 24).to(F16),
        torch.randn(210, 2, 24).to(F16),
    )
    kwargs = {"enable_gqa": True, "is_causal": True, "causal_alignment": "lower_right", "dropout_p": 0.2}
    agree("attention_varlen", q, k, v, starts_q, starts_k, **kwargs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_info_nce_in_blocks(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("info_nce"), "BUFFER_ROWS", 70)
    monkeypatch.setattr(module("info_nce"), "BUFFER_BYTES", 70 * 4 * 90)
    x, y, queue = torch.randn(3, 200, 24)
    kwargs = {"ids": torch.arange(200) // 2, "negatives_y": queue, "symmetric": symmetric}
    agree("info_nce", x, y, torch.tensor(9.0), **kwargs)


def test_sigmoid_contrastive_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("sigmoid_contrastive"), "BUFFER_ROWS", 70)
    monkeypatch.setattr(module("sigmoid_contrastive"), "BUFFER_BYTES", 70 * 4 * 90)
    agree("sigmoid_contrastive", *torch.randn(2, 200, 24), torch.tensor(9.0), torch.tensor(-8.0))


@pytest.mark.parametrize("mining", ["semi-hard", "all"])
def test_mining_in_panels(mining: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module("mined_triplet_loss"), "PANEL_BYTES", 4 * 90 * 20)
    x, y = torch.randn(2, 90, 24)
    agree("mined_triplet_loss", x, torch.arange(90) % 30, y, mining=mining)


def test_topk_of_a_bank_of_a_narrower_type() -> None:
    x, y = torch.randn(40, 24), torch.randn(300, 24).to(F16)
    y[100] = torch.nan
    with ops.backend("reference"):
        values, indices = ops.cosine_topk(x, y, 20)
    with ops.backend("triton"):
        found, at = ops.cosine_topk(x, y, 20)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert torch.equal(at, indices)


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("attention", qkv(1, 1, 2, 2, 8, torch.float64), "float32, bfloat16 and float16"),
        ("attention", qkv(1, 1, 2, 2, 264, F16), "heads of dimension 1 to 256"),
        ("attention", qkv(1, 1, 2, 2, 72, F32), "heads of dimension 1 to 64"),
        ("cosine_topk", (torch.randn(2, 8), torch.randn(200, 8), 129), "at most 128 neighbours"),
        ("linear", tuple(torch.randn(2, 3, 3).double()), "float32, bfloat16 and float16"),
    ],
)
def test_what_the_kernels_do_not_take_is_said(name: str, args: Any, reason: str) -> None:
    with ops.backend("triton"), pytest.raises(ValueError, match=reason):
        ops.explain(name, *args)
