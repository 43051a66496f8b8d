"""From tokens or a feature map to one vector per sample."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pymm.layers.linear import Linear
from pymm.layers.mlp import MLP
from pymm.layers.position import resample_position
from pymm.ops import attention, linear
from pymm.ops._checks import fail
from pymm.ops.linear import Activation


class ClassToken(nn.Module):
    """The first token: `(B, T, C)` -> `(B, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]


class MeanToken(nn.Module):
    """The mean of the tokens behind the first `prefix`: `(B, P + N, C)` -> `(B, C)`.

    Args:
        prefix: P, class and register tokens that are left out.
        norm: of the mean; nothing when None.
    """

    def __init__(self, prefix: int = 0, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.prefix = prefix
        self.norm = nn.Identity() if norm is None else norm

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[:, self.prefix :].mean(1))


class MeanMap(nn.Module):
    """The mean over a feature map: `(B, C, h, w)` -> `(B, C)`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


class AttentionPool2d(nn.Module):
    r"""Attention with the mean of a feature map as query (Radford et al. 2021, arXiv:2103.00020, sec. 2.4).

    With the map's n = h·w vectors and their mean in front, and the positions added to all of them,
    `z = [mean; x_1 ... x_n] + position`, the result is `attention(z_0 W_q, z W_k, z W_v)`; the output
    projection is the model's head. A map of another size than `grid` has its positions interpolated.

    Args:
        grid: side of the square maps that `position` is made for.
        width: C.
        heads: H, a divisor of `width`.

    Raises:
        ValueError: when `heads` does not divide `width`.
    """

    def __init__(self, grid: int, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            fail("AttentionPool2d", "heads", f"a divisor of the width {width}", heads)
        self.heads = heads
        self.position = nn.Parameter(torch.empty(grid * grid + 1, width))
        self.q = Linear(width, width)
        self.kv = Linear(width, 2 * width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Positions and weights normal with 1/√width, biases as `Linear` has them: CLIP's own."""
        std = self.position.shape[1] ** -0.5
        for parameter in (self.position, self.q.weight, self.kv.weight):
            nn.init.normal_(parameter, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, C, h, w)` -> `(B, C)`."""
        b, c, h, w = x.shape
        x = x.flatten(2).mT  # (B, N, C)
        x = torch.cat([x.mean(1, keepdim=True), x], 1)
        x = x + resample_position(self.position, (h, w), prefix=1)
        d = c // self.heads
        q = self.q(x[:, :1]).view(b, 1, self.heads, d).transpose(1, 2)
        k, v = (part.transpose(1, 2) for part in self.kv(x).view(b, h * w + 1, 2, self.heads, d).unbind(2))
        y = attention(q, k, v)
        assert isinstance(y, Tensor)
        return y.reshape(b, c)


class AttentionPool(nn.Module):
    r"""Attention with a learned query over the tokens (Lee et al. 2019, arXiv:1810.00825, eq. 11).

    As vision transformers use it (Zhai et al. 2022, arXiv:2106.04560, sec. 3.2): with the query, the probe p,
    `y = proj(attention(p W_q, x W_k, x W_v))`, and the result is `y + mlp(norm(y))`.

    Args:
        width: C.
        heads: H, a divisor of `width`.
        mlp_width: between the two layers of the MLP.
        activation: as `pymm.layers.Linear` takes it.
        eps: of the norm.

    Raises:
        ValueError: when `heads` does not divide `width`.
    """

    def __init__(
        self, width: int, heads: int, mlp_width: int, *, activation: Activation = "gelu", eps: float = 1e-6
    ) -> None:
        super().__init__()
        if width % heads:
            fail("AttentionPool", "heads", f"a divisor of the width {width}", heads)
        self.heads = heads
        self.probe = nn.Parameter(torch.empty(1, width))
        self.qkv = Linear(width, 3 * width)
        self.proj = Linear(width, width)
        self.norm = nn.LayerNorm(width, eps)
        self.mlp = MLP(width, mlp_width, activation)
        nn.init.trunc_normal_(self.probe, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, N, C)` -> `(B, C)`."""
        b, n, c = x.shape
        d = c // self.heads
        weight, bias = self.qkv.weight, self.qkv.bias
        assert bias is not None
        q = linear(self.probe, weight[:c], bias[:c]).view(1, self.heads, 1, d).expand(b, -1, -1, -1)
        kv = linear(x, weight[c:], bias[c:]).view(b, n, 2, self.heads, d)
        k, v = (part.transpose(1, 2) for part in kv.unbind(2))
        y = attention(q, k, v)
        assert isinstance(y, Tensor)
        y = self.proj(y.reshape(b, c))
        pooled: Tensor = self.mlp(self.norm(y), y)
        return pooled
