"""Residual blocks of convolutional networks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut (He et al. 2016, arXiv:1512.03385, fig. 5 left).

    Args:
        conv1, bn1, conv2, bn2: the branch, with ReLU between and after the sum.
        downsample: the shortcut, `nn.Identity()` where the shape stays.
    """

    def __init__(
        self, conv1: nn.Module, bn1: nn.Module, conv2: nn.Module, bn2: nn.Module, downsample: nn.Module
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv1, bn1, conv2, bn2
        self.downsample = downsample

    @property
    def last_norm(self) -> nn.Module:
        """The last of the branch, whose scale is zero at first where a block is to begin as the identity."""
        return self.bn2

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, Cin, h, w)` -> `(B, Cout, h', w')`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x), inplace=True)


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolution and a shortcut (He et al. 2016, arXiv:1512.03385, fig. 5 right).

    Args:
        conv1, bn1, conv2, bn2, conv3, bn3: the branch, with ReLU between and after the sum.
        pool: between the second ReLU and `conv3`; CLIP's average pooling, or `nn.Identity()`.
        downsample: the shortcut, `nn.Identity()` where the shape stays.
    """

    def __init__(
        self,
        conv1: nn.Module,
        bn1: nn.Module,
        conv2: nn.Module,
        bn2: nn.Module,
        pool: nn.Module,
        conv3: nn.Module,
        bn3: nn.Module,
        downsample: nn.Module,
    ) -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.bn2 = conv1, bn1, conv2, bn2
        self.pool, self.conv3, self.bn3, self.downsample = pool, conv3, bn3, downsample

    @property
    def last_norm(self) -> nn.Module:
        """The last of the branch, whose scale is zero at first where a block is to begin as the identity."""
        return self.bn3

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, Cin, h, w)` -> `(B, Cout, h', w')`."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(self.pool(y)))
        return F.relu(y + self.downsample(x), inplace=True)


def _conv(cin: int, cout: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(cin, cout, kernel, stride, padding=kernel // 2, bias=False)


def _shortcut(cin: int, cout: int, stride: int, pool: nn.Module, conv_stride: int) -> nn.Module:
    if stride == 1 and cin == cout:
        return nn.Identity()
    parts: dict[str, nn.Module] = {"conv": _conv(cin, cout, 1, conv_stride), "bn": nn.BatchNorm2d(cout)}
    if not isinstance(pool, nn.Identity):
        parts = {"pool": pool, **parts}
    return nn.Sequential(OrderedDict(parts))


def basic_block(cin: int, width: int, stride: int) -> BasicBlock:
    """The block of ResNet-18 and 34; Cout = width."""
    return BasicBlock(
        _conv(cin, width, 3, stride),
        nn.BatchNorm2d(width),
        _conv(width, width, 3),
        nn.BatchNorm2d(width),
        _shortcut(cin, width, stride, nn.Identity(), stride),
    )


def bottleneck(cin: int, width: int, stride: int) -> Bottleneck:
    """The block of ResNet-50 and deeper, with the stride in the 3×3 convolution; Cout = 4·width."""
    return Bottleneck(
        _conv(cin, width, 1),
        nn.BatchNorm2d(width),
        _conv(width, width, 3, stride),
        nn.BatchNorm2d(width),
        nn.Identity(),
        _conv(width, 4 * width, 1),
        nn.BatchNorm2d(4 * width),
        _shortcut(cin, 4 * width, stride, nn.Identity(), stride),
    )


def antialiased_bottleneck(cin: int, width: int, stride: int) -> Bottleneck:
    """CLIP's block: every convolution has stride 1 and an average pooling does the striding; Cout = 4·width.

    Radford et al. 2021, arXiv:2103.00020, sec. 2.4, after Zhang 2019, arXiv:1904.11486.
    """

    def pool() -> nn.Module:
        return nn.AvgPool2d(stride) if stride > 1 else nn.Identity()

    return Bottleneck(
        _conv(cin, width, 1),
        nn.BatchNorm2d(width),
        _conv(width, width, 3),
        nn.BatchNorm2d(width),
        pool(),
        _conv(width, 4 * width, 1),
        nn.BatchNorm2d(4 * width),
        _shortcut(cin, 4 * width, stride, pool(), 1),
    )


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Inside, batch norms of `block` leave their running statistics alone."""
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d) and m.training]
    before = [(norm.momentum, deepcopy(norm.num_batches_tracked)) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum = momentum
            if count is not None and norm.num_batches_tracked is not None:
                norm.num_batches_tracked.copy_(count)


def checkpointed(block: nn.Module, x: Tensor) -> Tensor:
    """`block(x)`, whose activations are computed again in the backward pass instead of kept.

    The second computation does not touch the running statistics of batch norms, so that training is the same
    with and without. Under `torch.compile`, whose partitioner does its own recomputation, it is `block(x)`.
    """
    if torch.compiler.is_compiling():
        return block(x)

    def contexts() -> tuple[Any, Any]:
        return nullcontext(), _statistics_kept(block)

    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)
