"""Pooling."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pymm.layers import AttentionPool2d, ClassToken, MeanMap, MeanToken


def test_means() -> None:
    x = torch.randn(2, 7, 4)
    assert torch.equal(ClassToken()(x), x[:, 0])
    torch.testing.assert_close(MeanToken(2)(x), x[:, 2:].sum(1) / 5)
    torch.testing.assert_close(MeanMap()(x.view(2, 7, 2, 2)), x.mean(-1))


def test_attention_pool_is_multihead_attention() -> None:
    layer = AttentionPool2d(3, 24, 2)
    theirs = nn.MultiheadAttention(24, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.kv.weight]))
        assert layer.q.bias is not None
        assert layer.kv.bias is not None
        theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.kv.bias]))
        theirs.out_proj.weight.copy_(torch.eye(24))
        theirs.out_proj.bias.zero_()
    x = torch.randn(2, 24, 3, 3)
    z = x.flatten(2).mT
    z = torch.cat([z.mean(1, keepdim=True), z], 1) + layer.position
    truth, _ = theirs(z[:, :1], z, z, need_weights=False)
    torch.testing.assert_close(layer(x), truth[:, 0], rtol=2e-5, atol=2e-5)


def test_attention_pool_at_another_size() -> None:
    layer = AttentionPool2d(3, 24, 2)
    assert layer(torch.randn(2, 24, 4, 5)).shape == (2, 24)


def test_heads_must_divide() -> None:
    with pytest.raises(ValueError, match="AttentionPool2d: heads must be a divisor of the width 24, got 5"):
        AttentionPool2d(3, 24, 5)
