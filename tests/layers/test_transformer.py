"""Attention, MLP and the transformer block."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pymm.layers import MLP, Attention, Block, Linear, transformer_blocks


def close(got: torch.Tensor, truth: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(got, truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("is_causal", [True, False])
def test_attention_is_multihead_attention(is_causal: bool) -> None:
    ours, theirs = Attention(24, 3), nn.MultiheadAttention(24, 3, batch_first=True)
    with torch.no_grad():
        for p in theirs.parameters():
            p.normal_(std=0.3)
    state = {"qkv.weight": theirs.in_proj_weight, "qkv.bias": theirs.in_proj_bias}
    ours.load_state_dict({**state, "proj.weight": theirs.out_proj.weight, "proj.bias": theirs.out_proj.bias})
    x = torch.randn(2, 7, 24, requires_grad=True)
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, 5:] = False
    causal = torch.ones(7, 7, dtype=torch.bool).triu(1) if is_causal else None
    truth, _ = theirs(x, x, x, key_padding_mask=~valid, attn_mask=causal, need_weights=False)
    got = ours(x, key_padding_mask=valid, is_causal=is_causal)
    close(got, truth)
    g = torch.randn_like(truth)
    close(torch.autograd.grad(got, x, g)[0], torch.autograd.grad(truth, x, g)[0])


def test_attention_mask_and_residual() -> None:
    layer = Attention(16, 2)
    x, mask = torch.randn(2, 5, 16), torch.randn(1, 2, 5, 5)
    q, k, v = layer.qkv(x).view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    y = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(2, 5, 16)
    close(layer(x, x, attn_mask=mask), x + F.linear(y, layer.proj.weight, layer.proj.bias))


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="Attention: heads must be a divisor of the width 20, got 3"):
        Attention(20, 3)


def test_mlp() -> None:
    layer, x = MLP(8, 20, "quick_gelu"), torch.randn(3, 4, 8)
    z = F.linear(x, layer.fc1.weight, layer.fc1.bias)
    truth = x + F.linear(z * torch.sigmoid(1.702 * z), layer.fc2.weight, layer.fc2.bias)
    close(layer(x, x), truth)


def test_linear_starts_as_torchs() -> None:
    weight = Linear(400, 300).weight
    assert weight.abs().max() <= 400**-0.5
    assert abs(weight.std().item() - 400**-0.5 / 3**0.5) < 1e-3


def block(**options: float) -> Block:
    return Block(Attention(16, 2), MLP(16, 32), nn.LayerNorm(16), nn.LayerNorm(16), **options)


def test_block_is_two_residual_branches() -> None:
    layer, x = block(), torch.randn(2, 5, 16)
    h = x + layer.attn(layer.norm1(x))
    close(layer(x), h + layer.mlp(layer.norm2(h)))


def test_layer_scale() -> None:
    layer, x = block(layer_scale=0.1), torch.randn(2, 5, 16)
    assert layer.scale1 is not None
    assert layer.scale2 is not None
    with torch.no_grad():
        layer.scale1.normal_()
        layer.scale2.normal_()
    h = x + layer.scale1 * layer.attn(layer.norm1(x))
    close(layer(x), h + layer.scale2 * layer.mlp(layer.norm2(h)))
    layer(x).sum().backward()
    assert layer.scale1.grad is not None
    assert layer.scale1.grad.abs().sum() > 0


def test_drop_path_drops_whole_branches() -> None:
    layer, x = block(drop_path=0.5), torch.randn(4000, 3, 16)
    kept = layer(x)
    layer.eval()
    close(layer(x), block_without_drop(layer, x))
    same = (kept == x).all(-1).all(-1)  # both branches dropped
    assert abs(same.float().mean().item() - 0.25) < 0.03
    mean = (kept - x).mean((0, 1))
    h = layer.attn(layer.norm1(x)).mean((0, 1))  # a kept branch is doubled, so its mean stays
    first_only = mean - (layer.mlp(layer.norm2(x + layer.attn(layer.norm1(x))))).mean((0, 1))
    assert (first_only - h).abs().max() < 0.1


def block_without_drop(layer: Block, x: torch.Tensor) -> torch.Tensor:
    h = x + layer.attn(layer.norm1(x))
    return h + layer.mlp(layer.norm2(h))


@pytest.mark.parametrize("rate", [-0.1, 1.0])
def test_drop_path_range(rate: float) -> None:
    with pytest.raises(ValueError, match=r"Block: drop_path must be in \[0, 1\)"):
        block(drop_path=rate)


def test_drop_path_rises_with_depth() -> None:
    assert [b.drop_path for b in transformer_blocks(3, 8, 1, 8, drop_path=0.4)] == [0.0, 0.2, 0.4]


def test_blocks_checkpointing_and_intermediates() -> None:
    blocks, x = transformer_blocks(3, 16, 2, 32, layer_scale=0.5, drop_path=0.3), torch.randn(6, 5, 16)

    def run() -> tuple[torch.Tensor, list[torch.Tensor], dict[str, torch.Tensor]]:
        torch.manual_seed(3)  # the same paths are dropped
        named: dict[str, torch.Tensor] = {}
        out = blocks(x, is_causal=True, intermediates=named)
        return out, list(torch.autograd.grad(out.square().sum(), list(blocks.parameters()))), named

    plain, gradients, named = run()
    assert list(named) == ["blocks.0", "blocks.1", "blocks.2"]
    assert named["blocks.2"] is plain
    blocks.grad_checkpointing = True
    again, others, _ = run()
    assert torch.equal(plain, again)
    for a, b in zip(gradients, others, strict=True):
        assert torch.equal(a, b)


def test_checkpointing_keeps_less() -> None:
    """Between forward and backward, a checkpointed block keeps its input only."""
    blocks, x = transformer_blocks(4, 16, 2, 64), torch.randn(2, 50, 16, requires_grad=True)

    def kept() -> int:
        total = 0

        def pack(t: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            blocks(x)
        return total

    plain = kept()
    blocks.grad_checkpointing = True
    assert kept() < plain / 3
