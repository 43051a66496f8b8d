"""Workloads that are made of several ops."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.benchmarks.cases import Arguments, Case

WIDTH, HEADS, HIDDEN = 768, 12, 3072  # ViT-B (Dosovitskiy et al. 2021, arXiv:2010.11929, table 1)
EPS = 1e-6

# The parameters of `pymm.layers.Block` in the order in which `vit_block` takes them.
PARAMETERS: dict[str, tuple[int, ...]] = {
    "norm1.weight": (WIDTH,),
    "norm1.bias": (WIDTH,),
    "attn.qkv.weight": (3 * WIDTH, WIDTH),
    "attn.qkv.bias": (3 * WIDTH,),
    "attn.proj.weight": (WIDTH, WIDTH),
    "attn.proj.bias": (WIDTH,),
    "norm2.weight": (WIDTH,),
    "norm2.bias": (WIDTH,),
    "mlp.fc1.weight": (HIDDEN, WIDTH),
    "mlp.fc1.bias": (HIDDEN,),
    "mlp.fc2.weight": (WIDTH, HIDDEN),
    "mlp.fc2.bias": (WIDTH,),
}


def vit_block(
    x: Tensor, *parameters: Tensor, linear: Callable[..., Any], attention: Callable[..., Any]
) -> Tensor:
    """A pre-norm transformer block of ViT-B, `x (B, T, C)`, from the two ops that are given."""
    scale1, shift1, wqkv, bqkv, wproj, bproj, scale2, shift2, w1, b1, w2, b2 = parameters
    b, t, c = x.shape
    qkv = linear(F.layer_norm(x, (c,), scale1, shift1, EPS), wqkv, bqkv)
    q, k, v = (part.transpose(1, 2) for part in qkv.view(b, t, 3, HEADS, c // HEADS).unbind(2))
    x = linear(attention(q, k, v).transpose(1, 2).reshape(b, t, c), wproj, bproj, None, x)
    hidden = linear(F.layer_norm(x, (c,), scale2, shift2, EPS), w1, b1, "gelu")
    return linear(hidden, w2, b2, None, x)


def _eager(name: str) -> Callable[..., Any]:
    found = ops.REGISTRY[name].eager
    assert found is not None
    return found


def _block_cases() -> list[Case]:
    def make(b: int, t: int) -> Callable[[torch.dtype], Arguments]:
        def inputs(dtype: torch.dtype) -> Arguments:
            parameters = []
            for name, shape in PARAMETERS.items():
                value = torch.randn(shape) * (shape[-1] ** -0.5 if len(shape) == 2 else 0.1)
                parameters.append((value + 1 if "norm" in name and "weight" in name else value).to(dtype))
            return (torch.randn(b, t, WIDTH).to(dtype), *parameters), {}

        return inputs

    b, t = 8, 197
    rows, heads = b * t, b * HEADS * t
    linear = [(rows, 3 * WIDTH, WIDTH), (rows, WIDTH, WIDTH), (rows, HIDDEN, WIDTH), (rows, WIDTH, HIDDEN)]
    attention = (heads, t, WIDTH // HEADS)
    return [
        Case(
            op="vit_block",
            label=f"ViT-B/16 B={b} T={t}",
            dtype=dtype,
            make=make(b, t),
            function=partial(vit_block, linear=ops.linear, attention=ops.attention),
            eager=partial(vit_block, linear=_eager("linear"), attention=_eager("attention")),
            served="linear",
            tolerance=ops.REGISTRY["linear"].tolerance,
            products=[*linear, *[attention] * 2],
            products_backward=[*linear * 2, *[attention] * 5],
        )
        for dtype in (torch.bfloat16, torch.float32)
    ]


CASES: dict[str, Callable[[], list[Case]]] = {"vit_block": _block_cases}
