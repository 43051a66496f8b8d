"""Residual blocks, and batch norms under checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from pymm.layers import antialiased_bottleneck, basic_block, bottleneck, checkpointed

FACTORIES = (basic_block, bottleneck, antialiased_bottleneck)


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize("stride", [1, 2])
def test_shapes(factory: Callable[[int, int, int], nn.Module], stride: int) -> None:
    cout = 8 if factory is basic_block else 32
    block = factory(12, 8, stride)
    assert block(torch.randn(2, 12, 8, 6)).shape == (2, cout, 8 // stride, 6 // stride)
    if stride == 1:
        assert isinstance(factory(cout, 8, 1).downsample, nn.Identity)


@pytest.mark.parametrize("factory", FACTORIES)
def test_checkpointing_changes_nothing(factory: Callable[[int, int, int], nn.Module]) -> None:
    """Outputs, gradients and running statistics, although the block runs twice."""
    plain, x = factory(12, 8, 2), torch.randn(4, 12, 8, 8)
    again = deepcopy(plain)
    y, z = plain(x), checkpointed(again, x)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    for (name, a), (_, b) in zip(plain.named_parameters(), again.named_parameters(), strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert torch.equal(a.grad, b.grad), name
    for (name, a), (_, b) in zip(plain.named_buffers(), again.named_buffers(), strict=True):
        assert torch.equal(a, b), name
    assert all(m.momentum == 0.1 for m in again.modules() if isinstance(m, nn.BatchNorm2d))
