"""Attention: what its record's samples do not cover."""

from __future__ import annotations

import itertools
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.ops import attention
from pymm.ops._attention_reference import philox
from pymm.ops._extension import EXTENSION
from pymm.ops._tolerance import error
from tests.ops.harness import instruction_set

ISAS = EXTENSION.available_isas() if EXTENSION is not None else []
every_isa = pytest.mark.parametrize("isa", ISAS)
WORD = 0xFFFFFFFF


def qkv(
    b: int, h: int, t: int, s: int, d: int, *, hkv: int = 0, dv: int = 0, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = (b, h, t, d), (b, hkv or h, s, d), (b, hkv or h, s, dv or d)
    q, k, v = (torch.randn(n, dtype=torch.float64).to(dtype).requires_grad_() for n in shapes)
    return q, k, v


def gradients(out: Tensor, *leaves: Tensor) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return list(torch.autograd.grad(out, leaves, cotangent))


def with_lse(*args: Tensor, **kwargs: Any) -> Tensor:
    """The output with the log-sum-exp as one more column, 0 where that is -inf."""
    out, lse = attention(*args, **kwargs, return_lse=True)
    return torch.cat([out, lse.masked_fill(lse == -torch.inf, 0)[..., None]], -1)


def in_float64(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double().requires_grad_() for t in tensors]


def assert_close(got: list[Tensor], expected: list[Tensor], bound: float) -> None:
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert error(a, b) <= bound, f"{i}: {error(a, b):.2e}"


# Equality with F.scaled_dot_product_attention


@pytest.mark.parametrize("mask", [None, "bool", "float"])
@pytest.mark.parametrize("scale", [None, 0.4, -0.7])
def test_equals_sdpa(mask: str | None, scale: float | None) -> None:
    q, k, v = qkv(2, 3, 41, 70, 24, dv=40)
    attn_mask = None
    if mask == "bool":
        attn_mask = torch.rand(41, 70) < 0.7
    elif mask == "float":
        attn_mask = torch.randn(2, 1, 41, 70)
    doubles = in_float64(q, k, v)
    theirs = attn_mask.double() if mask == "float" and attn_mask is not None else attn_mask
    expected = F.scaled_dot_product_attention(*doubles, theirs, 0.0, False, scale=scale)
    got = attention(q, k, v, attn_mask, 0.0, False, scale)
    assert_close([got, *gradients(got, q, k, v)], [expected, *gradients(expected, *doubles)], 1e-5)


@pytest.mark.parametrize(("t", "s"), [(50, 50), (30, 80), (80, 30)])
def test_causal_and_grouped_equal_sdpa(t: int, s: int) -> None:
    q, k, v = qkv(2, 6, t, s, 16, hkv=2)
    doubles = in_float64(q, k, v)
    expected = F.scaled_dot_product_attention(*doubles, None, 0.0, True, enable_gqa=True)
    got = attention(q, k, v, None, 0.0, True, None, True)
    assert_close([got, *gradients(got, q, k, v)], [expected, *gradients(expected, *doubles)], 1e-5)


# Causal masks


@every_isa
@pytest.mark.parametrize("alignment", ["upper_left", "lower_right"])
@pytest.mark.parametrize(("t", "s"), [(1, 300), (75, 75), (20, 133), (133, 20), (700, 650)])
def test_causal_alignment(alignment: str, t: int, s: int, isa: str) -> None:
    q, k, v = qkv(1, 2, t, s, 16)
    seen = torch.arange(s) <= torch.arange(t)[:, None] + (s - t if alignment == "lower_right" else 0)
    with instruction_set(isa):
        got = with_lse(q, k, v, is_causal=True, causal_alignment=alignment)
        found = gradients(got, q, k, v)
    with ops.backend("reference"):
        doubles = in_float64(q, k, v)
        expected = with_lse(*doubles, seen)
    assert_close([got, *found], [expected, *gradients(expected, *doubles)], 1e-5)


def test_decoding_with_a_cache_equals_the_whole() -> None:
    q, k, v = (x.detach() for x in qkv(2, 4, 20, 20, 16))
    whole = attention(q, k, v, is_causal=True)
    steps = [
        attention(
            q[:, :, t : t + 1],
            k[:, :, : t + 1],
            v[:, :, : t + 1],
            is_causal=True,
            causal_alignment="lower_right",
        )
        for t in range(20)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), whole)


# Grouped queries


@pytest.mark.parametrize("heads", [(6, 1), (6, 2), (6, 3)])
@pytest.mark.parametrize("t", [1, 3, 50])
def test_grouped_queries_equal_repeated_keys(heads: tuple[int, int], t: int) -> None:
    h, hkv = heads
    q, k, v = qkv(2, h, t, 67, 24, hkv=hkv, dtype=torch.float64)
    got = attention(q, k, v, enable_gqa=True)
    repeated = [x.repeat_interleave(h // hkv, dim=1) for x in (k, v)]
    expected = attention(q, *repeated)
    assert_close([got, *gradients(got, q, k, v)], [expected, *gradients(expected, q, k, v)], 1e-12)


# Masks


def hide_rows(kind: str) -> dict[str, Tensor]:
    """A mask that hides everything from row 3 of every head, or from all rows of batch element 1."""
    if kind == "padding":
        return {"key_padding_mask": torch.tensor([[True] * 30, [False] * 30])}
    if kind == "bool":
        mask = torch.rand(20, 30) < 0.8
        mask[3] = False
        return {"attn_mask": mask}
    mask = torch.randn(20, 30)
    mask[3] = -torch.inf
    return {"attn_mask": mask}


@every_isa
@pytest.mark.parametrize("kind", ["bool", "float", "padding"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_attend_nowhere(kind: str, dtype: torch.dtype, isa: str) -> None:
    q, k, v = qkv(2, 2, 20, 30, 16, dtype=dtype)
    mask = hide_rows(kind)
    with instruction_set(isa):
        out, lse = attention(q, k, v, return_lse=True, **mask)
        dq, dk, dv = gradients(out, q, k, v)
    nowhere = (slice(1, 2), slice(None)) if kind == "padding" else (slice(None), slice(None), slice(3, 4))
    assert torch.equal(out[nowhere], torch.zeros_like(out[nowhere]))
    assert torch.equal(dq[nowhere], torch.zeros_like(dq[nowhere]))
    assert bool((lse[nowhere] == -torch.inf).all())
    assert all(bool(x.isfinite().all()) for x in (out, dq, dk, dv))
    assert bool((lse > -torch.inf).any())


def test_mask_and_causal_and_padding_together() -> None:
    q, k, v = qkv(2, 3, 40, 60, 16)
    bias = torch.randn(3, 40, 60)
    valid = torch.rand(2, 60) < 0.7
    got = attention(
        q, k, v, bias, is_causal=True, causal_alignment="lower_right", key_padding_mask=valid, scale=0.3
    )
    seen = (torch.arange(60) <= torch.arange(40)[:, None] + 20) & valid[:, None, None]
    expected = attention(q, k, v, bias.masked_fill(~seen, -torch.inf), scale=0.3)
    assert_close([got, *gradients(got, q, k, v)], [expected, *gradients(expected, q, k, v)], 1e-5)


@pytest.mark.parametrize("shared", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mask_gradient_of_every_broadcast(
    shared: tuple[bool, ...], heads: tuple[int, int], dtype: torch.dtype
) -> None:
    h, hkv = heads
    q, k, v = qkv(3, h, 70, 150, 8, hkv=hkv, dtype=dtype)
    sizes = [1 if s else n for s, n in zip(shared, (3, h, 70, 150), strict=True)]
    bias = torch.randn(sizes, dtype=torch.float64).to(dtype).requires_grad_()
    doubles = in_float64(q, k, v, bias)

    def loss(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        out, lse = attention(q, k, v, bias, enable_gqa=True, return_lse=True)
        weights = torch.linspace(0, 1, lse.numel(), dtype=torch.float64).view(lse.shape)
        return out.double().pow(2).sum() + (lse.double() * weights).sum()

    (got,) = torch.autograd.grad(loss(q, k, v, bias), [bias])
    with ops.backend("reference"):
        (expected,) = torch.autograd.grad(loss(*doubles), [doubles[3]])
    assert got.shape == bias.shape
    assert got.dtype == bias.dtype
    assert error(got, expected) <= (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("batch", [1, 12])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float32_bias_keeps_its_type_beside_bfloat16(mask_dtype: torch.dtype, batch: int) -> None:
    q, k, v = qkv(batch, 2, 197, 197, 64, dtype=torch.bfloat16)
    bias = torch.randn(1, 2, 197, 197).to(mask_dtype).requires_grad_()
    got = attention(q, k, v, bias)
    found = gradients(got, q, k, v, bias)
    assert found[3].dtype == mask_dtype
    doubles = in_float64(q, k, v, bias)
    with ops.backend("reference"):
        expected = attention(*doubles)
        truth = gradients(expected, *doubles)
        plain = attention(q, k, v, bias)
        plain_error = [error(a, b) for a, b in zip(gradients(plain, q, k, v, bias), truth, strict=True)]
    for a, b, bound in zip(found, truth, plain_error, strict=True):
        assert error(a, b) <= 2 * max(bound, torch.finfo(torch.bfloat16).eps / 2)


@pytest.mark.parametrize("mask", ["transposed", "every second column", "expanded"])
def test_masks_of_any_strides(mask: str) -> None:
    q, k, v = qkv(2, 3, 33, 44, 16)
    if mask == "transposed":
        bias, allowed = torch.randn(44, 33).t(), (torch.rand(44, 33) < 0.7).t()
    elif mask == "every second column":
        bias, allowed = torch.randn(33, 88)[:, ::2], (torch.rand(33, 88) < 0.7)[:, ::2]
    else:
        bias, allowed = torch.randn(33, 1).expand(33, 44), (torch.rand(44) < 0.7).expand(2, 3, 33, 44)
    for m in (bias, allowed):
        assert torch.equal(attention(q, k, v, m), attention(q, k, v, m.contiguous()))


# Dropout


def test_philox_known_answers() -> None:
    """The vectors that Random123 publishes for philox4x32-10 (kat_vectors)."""
    cases = {
        (0, 0, 0, 0, 0): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        (WORD, WORD, WORD, WORD, -1): "408f276d 41c83b0e a20bc7c6 6d5451fd",
        (
            0x243F6A88,
            0x85A308D3,
            0x13198A2E,
            0x03707344,
            0x299F31D0A4093822,
        ): "d16cfe09 94fdcceb 5001e420 24126ea1",
    }
    for (*counter, seed), answer in cases.items():
        c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
        words = philox((c0, c1, c2, c3), torch.tensor([seed]))
        assert " ".join(f"{w.item():08x}" for w in words) == answer


def dropped_weights(q: Tensor, k: Tensor, p: float, seed: int) -> Tensor:
    """The weights after dropout, read off through v = the identity."""
    identity = torch.eye(k.shape[2], dtype=q.dtype).expand(*k.shape[:2], -1, -1).contiguous()
    torch.manual_seed(seed)
    return attention(q, k, identity, dropout_p=p)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [90, 700])
def test_dropout_mask_is_the_reference_s(dtype: torch.dtype, columns: int, isa: str) -> None:
    q, k, _ = (x.detach() for x in qkv(2, 3, 37, columns, 8, dtype=dtype))
    with instruction_set(isa):
        got = dropped_weights(q, k, 0.3, seed=7)
    with ops.backend("reference"):
        expected = dropped_weights(q, k, 0.3, seed=7)
    assert torch.equal(got == 0, expected == 0)
    assert 0.28 < (got == 0).double().mean().item() < 0.32


def test_dropout_is_governed_by_manual_seed() -> None:
    q, k, _ = (x.detach() for x in qkv(1, 2, 30, 40, 8))
    assert torch.equal(dropped_weights(q, k, 0.5, 1), dropped_weights(q, k, 0.5, 1))
    assert not torch.equal(dropped_weights(q, k, 0.5, 1), dropped_weights(q, k, 0.5, 2))
    masks = dropped_weights(q, k, 0.5, 1) == 0
    assert not torch.equal(masks[:, 0], masks[:, 1])  # heads
    assert not torch.equal(masks[:, :, 0], masks[:, :, 1])  # rows


def test_dropout_keeps_the_expectation() -> None:
    q, k, v = (x.detach().double() for x in qkv(1, 1, 4, 30, 8))
    mean = torch.stack([attention(q, k, v, dropout_p=0.4) for _ in range(4000)]).mean(0)
    expected = attention(q, k, v)
    # A weight of at most 1 has a standard deviation of at most sqrt(0.4 / 0.6).
    deviation = (0.4 / 0.6) ** 0.5 * v.abs().max() / 4000**0.5
    assert (mean - expected).abs().max() < 5 * deviation


@pytest.mark.parametrize("p", [0.25, 0.9])
def test_dropout_mask_of_backward_is_that_of_forward(p: float) -> None:
    q, k, v = qkv(2, 2, 40, 300, 300, dtype=torch.float64)
    weights = dropped_weights(q.detach(), k.detach(), p, seed=3)
    torch.manual_seed(3)
    out = attention(q, k, v, dropout_p=p)
    cotangent = torch.randn_like(out)
    (dv,) = torch.autograd.grad(out, [v], cotangent)
    torch.testing.assert_close(out, weights @ v)
    torch.testing.assert_close(dv, weights.mT @ cotangent)


def test_dropout_of_everything() -> None:
    q, k, v = qkv(1, 2, 5, 7, 8)
    out = attention(q, k, v, dropout_p=1.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in gradients(out, q, k, v))


# Derivatives


def test_gradients_by_finite_differences() -> None:
    q, k, v = qkv(1, 4, 5, 6, 3, hkv=2, dv=2, dtype=torch.float64)
    bias = torch.randn(1, 4, 1, 6, dtype=torch.float64, requires_grad=True)

    def function(*args: Tensor) -> tuple[Tensor, Tensor]:
        torch.manual_seed(11)
        return attention(*args, dropout_p=0.3, enable_gqa=True, return_lse=True)

    assert torch.autograd.gradcheck(function, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(function, (q, k, v, bias))


def test_gradient_of_lse_alone() -> None:
    q, k, v = qkv(2, 2, 9, 11, 8)
    _, lse = attention(q, k, v, return_lse=True)
    expected = torch.logsumexp(q @ k.mT * 8**-0.5, -1)
    weights = torch.randn_like(lse)
    got = torch.autograd.grad(lse, [q, k], weights)
    assert_close(list(got), list(torch.autograd.grad(expected, [q, k], weights)), 1e-5)


# Layout and numbers


def test_views_of_a_fused_projection_are_read_in_place() -> None:
    fused = torch.randn(2, 50, 3, 4, 16)
    views = fused.permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(*views)
    assert torch.equal(out, attention(*(x.contiguous() for x in views)))
    assert out.transpose(1, 2).is_contiguous()


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extreme_logits(dtype: torch.dtype, isa: str) -> None:
    """Scores of ±10⁴: each row picks one column, with neither overflow nor NaN."""
    t = 40
    q = 100 * torch.eye(t, 64)[None, None].to(dtype)
    k = torch.where(torch.eye(t, 64) > 0, 100.0, -100.0)[None, None].to(dtype)
    v = torch.randn(1, 1, t, 64).to(dtype)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with instruction_set(isa):
        out, lse = attention(*leaves, scale=1.0, return_lse=True)
        found = gradients(out, *leaves)
    assert error(out, v) <= 1e-6
    assert torch.equal(lse, torch.full_like(lse, 1e4))
    assert all(bool(x.isfinite().all()) for x in found)


@every_isa
def test_nan_is_not_hidden(isa: str) -> None:
    q, k, v = (x.detach() for x in qkv(1, 1, 20, 40, 16))
    q[0, 0, 3, 5] = torch.nan
    with instruction_set(isa):
        out = attention(q, k, v)
    assert bool(out[0, 0, 3].isnan().all())
    assert bool(out[0, 0, [0, 1, 2, 4, 19]].isfinite().all())


def test_autocast() -> None:
    q, k, v = qkv(1, 2, 20, 20, 16)
    bias = torch.randn(20, 20, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = attention(q, k, v, bias)
    assert out.dtype == torch.bfloat16
    found = gradients(out, q, k, v, bias)
    assert [x.dtype for x in found] == [torch.float32] * 4


@pytest.mark.parametrize("heads", [1, 24])
def test_same_bits_on_a_rerun_and_with_another_thread_count(heads: int, threads) -> None:
    q, k, v = qkv(1, heads, 150, 290, 32)
    bias = torch.randn(1, 1, 150, 290, requires_grad=True)

    def run() -> list[Tensor]:
        out, lse = attention(q, k, v, bias, is_causal=True, return_lse=True)
        return [out, lse, *gradients(out, q, k, v, bias)]

    first = run()
    for again in (run(), run()):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    threads(1)
    assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True))


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("h", "hkv", "t", "d", "dv"), [(8, 2, 1, 128, 128), (3, 3, 5, 45, 70), (7, 1, 2, 8, 33)]
)
def test_few_rows_over_parts_of_the_keys(
    h: int, hkv: int, t: int, d: int, dv: int, dtype: torch.dtype, isa: str, threads
) -> None:
    q, k, v = qkv(2, h, t, 1301, d, hkv=hkv, dv=dv, dtype=dtype)
    valid = torch.rand(2, 1301) < 0.9
    valid[1, 512:1024] = False
    kwargs = {
        "is_causal": True,
        "causal_alignment": "lower_right",
        "enable_gqa": True,
        "key_padding_mask": valid,
    }
    with instruction_set(isa):
        got = with_lse(q, k, v, **kwargs)
        expected = with_lse(*in_float64(q, k, v), **kwargs)
        assert_close([got], [expected], 2e-2 if dtype.itemsize == 2 else 1e-5)
        threads(1)
        assert torch.equal(got, with_lse(q, k, v, **kwargs))


def test_no_scores_in_memory() -> None:
    """8192 x 8192 scores would be 128 MB in bfloat16; forward and backward stay below 48 MB."""
    script = """
import resource, torch
from pymm.ops import attention
from pymm import ops
q, k, v = (torch.randn(1, 1, 8192, 16).bfloat16().requires_grad_() for _ in range(3))
small = attention(q[:, :, :64], k[:, :, :64], v[:, :, :64], is_causal=True)
small.sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
attention(q, k, v).sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 48


def test_explain() -> None:
    q, k, v = qkv(1, 1, 2, 2, 4)
    assert ops.explain(attention, q, k, v, dropout_p=0.5).backend == "cpu"


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 3)}, "attention: q must be (B, H, T, D) or (H, T, D), got (2, 3)"),
        ({"q": torch.zeros(2, 4, 5, 8, dtype=torch.int32)},
         "attention: q must be float32, bfloat16, float16 or float64, got torch.int32"),
        ({"k": torch.zeros(2, 4, 6, 9)}, "attention: k must be (2, Hkv, S, 8), got (2, 4, 6, 9)"),
        ({"k": torch.zeros(2, 4, 6, 8).double()},
         "attention: k must be of q's type torch.float32, got torch.float64"),
        ({"v": torch.zeros(2, 4, 7, 8)}, "attention: v must be (2, 4, 6, Dv), got (2, 4, 7, 8)"),
        ({"k": torch.zeros(2, 2, 6, 8), "v": torch.zeros(2, 2, 6, 8)},
         "attention: enable_gqa must be True when q and k have different numbers of heads, "
         "got False for 4 and 2"),
        ({"k": torch.zeros(2, 3, 6, 8), "v": torch.zeros(2, 3, 6, 8), "enable_gqa": True},
         "attention: q must be of a multiple of k's number of heads, got 4 for 3"),
        ({"q": torch.zeros(4, 5, 8)},
         "attention: k and v must be (H, S, D) as q is, got (2, 4, 6, 8) and (2, 4, 6, 8)"),
        ({"attn_mask": torch.zeros(5, 7)},
         "attention: attn_mask must be broadcastable to (2, 4, 5, 6), got (5, 7)"),
        ({"attn_mask": torch.zeros(5, 6).int()},
         "attention: attn_mask must be bool, float32, bfloat16, float16 or float64, got torch.int32"),
        ({"key_padding_mask": torch.zeros(2, 6)},
         "attention: key_padding_mask must be a bool tensor, True where a key is valid, got torch.float32"),
        ({"key_padding_mask": torch.ones(2, 5).bool()},
         "attention: key_padding_mask must be (2, 6), got (2, 5)"),
        ({"dropout_p": 1.5}, "attention: dropout_p must be in [0, 1], got 1.5"),
        ({"causal_alignment": "left"},
         "attention: causal_alignment must be 'upper_left' or 'lower_right', got 'left'"),
        ({"k": torch.zeros(2, 4, 6, 8, device="meta")}, "attention: k must be on q's device cpu, got meta"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)  # fmt: skip
def test_errors(change: dict, message: str) -> None:
    arguments = {"q": torch.zeros(2, 4, 5, 8), "k": torch.zeros(2, 4, 6, 8), "v": torch.zeros(2, 4, 6, 8)}
    with pytest.raises(ValueError) as raised:
        attention(**{**arguments, **change})
    assert str(raised.value) == message
