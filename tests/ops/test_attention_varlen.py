"""Attention over packed sequences: what its record's samples do not cover."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pymm import ops
from pymm.ops import attention, attention_varlen
from pymm.ops._tolerance import error
from tests.ops.test_attention import gradients

LENGTHS_Q, LENGTHS_K = (5, 0, 130, 1, 64), (300, 3, 0, 1, 64)


def starts(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def packed(h: int = 4, hkv: int = 4, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (sum(LENGTHS_Q), h, 24), (sum(LENGTHS_K), hkv, 24), (sum(LENGTHS_K), hkv, 10)
    q, k, v = (torch.randn(n, dtype=torch.float64).to(dtype).requires_grad_() for n in shapes)
    return q, k, v


@pytest.mark.parametrize("causal", [None, "upper_left", "lower_right"])
@pytest.mark.parametrize("hkv", [4, 2])
def test_equals_attention_per_sequence(causal: str | None, hkv: int) -> None:
    q, k, v = packed(hkv=hkv)
    cu_q, cu_k = starts(LENGTHS_Q), starts(LENGTHS_K)
    kwargs = {"is_causal": causal is not None, "causal_alignment": causal or "upper_left", "enable_gqa": True}
    got, lse = attention_varlen(q, k, v, cu_q, cu_k, **kwargs, return_lse=True)
    outs, lses = [], []
    for n in range(len(LENGTHS_Q)):
        rows, columns = slice(cu_q[n], cu_q[n + 1]), slice(cu_k[n], cu_k[n + 1])
        one = [x.transpose(0, 1)[None] for x in (q[rows], k[columns], v[columns])]
        out, one_lse = attention(*one, **kwargs, return_lse=True)
        outs.append(out[0].transpose(0, 1))
        lses.append(one_lse[0])
    expected = torch.cat(outs)
    assert torch.equal(got, expected)
    assert torch.equal(lse, torch.cat(lses, 1))
    for a, b in zip(gradients(got, q, k, v), gradients(expected, q, k, v), strict=True):
        assert error(a, b) <= 1e-6


def test_dropout_is_that_of_the_batch() -> None:
    """Sequence n draws the mask of batch element n."""
    q, k, v = torch.randn(3, 2, 40, 8), torch.randn(3, 2, 70, 8), torch.randn(3, 2, 70, 8)
    torch.manual_seed(4)
    expected = attention(q, k, v, dropout_p=0.5)
    flat = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]
    torch.manual_seed(4)
    got = attention_varlen(*flat, starts((40,) * 3), starts((70,) * 3), dropout_p=0.5)
    torch.testing.assert_close(got.unflatten(0, (3, 40)).transpose(1, 2), expected)


def test_gradients_by_finite_differences() -> None:
    q, k, v = (torch.randn(n, 2, 3, dtype=torch.float64, requires_grad=True) for n in (5, 6, 6))
    cu_q, cu_k = starts((2, 3)), starts((4, 2))

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(2)
        return attention_varlen(*args, cu_q, cu_k, dropout_p=0.2, return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v))
    assert torch.autograd.gradgradcheck(function, (q, k, v))


def test_offsets_inside_a_compiled_graph_are_checked_by_the_kernel() -> None:
    q, k, v = packed()
    compiled = torch.compile(attention_varlen, fullgraph=True, backend="aot_eager")
    wrong = torch.tensor([0, 9, 3, 131, 136, 200])
    message = r"cu_seqlens_q must be 0 first, 200 last and never falling"
    with pytest.raises(RuntimeError, match=message):
        compiled(q, k, v, wrong, starts(LENGTHS_K))


def test_explain() -> None:
    assert ops.explain(attention_varlen, *packed(), starts(LENGTHS_Q), starts(LENGTHS_K)).backend == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(6, 8)}, "attention_varlen: q must be (total_q, H, D), got (6, 8)"),
        ({"k": torch.zeros(9, 2, 7)}, "attention_varlen: k must be (total_k, Hkv, 8), got (9, 2, 7)"),
        ({"v": torch.zeros(8, 2, 8)}, "attention_varlen: v must be (9, 2, Dv), got (8, 2, 8)"),
        ({"cu_seqlens_q": torch.tensor([0.0, 6.0])},
         "attention_varlen: cu_seqlens_q must be an int32 or int64 tensor, got torch.float32"),
        ({"cu_seqlens_q": torch.tensor([[0, 6]])},
         "attention_varlen: cu_seqlens_q must be (N + 1,), got (1, 2)"),
        ({"cu_seqlens_k": torch.tensor([0, 4, 9])}, "attention_varlen: cu_seqlens_k must be (2,), got (3,)"),
        ({"cu_seqlens_q": torch.tensor([0, 5])},
         "attention_varlen: cu_seqlens_q must be 0 first, total_q = 6 last and never falling, got [0, 5]"),
        ({"cu_seqlens_k": torch.tensor([0, 9, 8, 9]), "cu_seqlens_q": torch.tensor([0, 1, 2, 6])},
         "attention_varlen: cu_seqlens_k must be 0 first, total_k = 9 last and never falling, "
         "got [0, 9, 8, 9]"),
        ({"max_seqlen_k": 8}, "attention_varlen: max_seqlen_k must be at least the longest length 9, got 8"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_errors(change: dict, message: str) -> None:
    arguments = {
        "q": torch.zeros(6, 2, 8),
        "k": torch.zeros(9, 2, 8),
        "v": torch.zeros(9, 2, 8),
        "cu_seqlens_q": torch.tensor([0, 6]),
        "cu_seqlens_k": torch.tensor([0, 9]),
    }
    with pytest.raises(ValueError) as raised:
        attention_varlen(**{**arguments, **change})
    assert str(raised.value) == message
