"""A pre-norm transformer block, and a stack of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pymm.layers.attention import Attention
from pymm.layers.mlp import MLP
from pymm.ops._checks import fail
from pymm.ops.linear import Activation


class Block(nn.Module):
    r"""A pre-norm transformer block (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 2 and 3).

    .. math:: x' = x + \gamma_1 \, \mathrm{attn}(\mathrm{norm}_1(x)), \qquad
              y = x' + \gamma_2 \, \mathrm{mlp}(\mathrm{norm}_2(x'))

    Both sums happen in the epilogue of the branch's last product, except where LayerScale or drop path stand
    between the branch and the sum.

    Args:
        attn: called as `attn(h, residual, attn_mask=, key_padding_mask=, is_causal=)`.
        mlp: called as `mlp(h, residual)`.
        norm1, norm2: before the two branches.
        layer_scale: the initial value of γ (Touvron et al. 2021, arXiv:2103.17239, eq. 5), a vector of the
            block's width per branch; None means γ = 1 without parameters.
        drop_path: probability of dropping a branch per sample during training (Huang et al. 2016,
            arXiv:1603.09382), in [0, 1).

    Raises:
        ValueError: when `drop_path` lies outside [0, 1).
    """

    scale1: nn.Parameter | None
    scale2: nn.Parameter | None

    def __init__(
        self,
        attn: nn.Module,
        mlp: nn.Module,
        norm1: nn.LayerNorm,
        norm2: nn.LayerNorm,
        *,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        _check_rate("Block", drop_path)
        self.norm1, self.attn, self.norm2, self.mlp = norm1, attn, norm2, mlp
        self.drop_path = drop_path
        width = norm1.normalized_shape[0]
        self.scale1 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))
        self.scale2 = None if layer_scale is None else nn.Parameter(torch.full((width,), layer_scale))

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """`x (B, T, C)` -> `(B, T, C)`; the masks are those of `pymm.layers.Attention`."""
        fused = self.scale1 is None and not (self.training and self.drop_path)
        h = self.attn(
            self.norm1(x),
            x if fused else None,
            attn_mask=attn_mask,
            key_padding_mask=key_padding_mask,
            is_causal=is_causal,
        )
        x = h if fused else self._join(x, h, self.scale1)
        h = self.mlp(self.norm2(x), x if fused else None)
        return h if fused else self._join(x, h, self.scale2)

    def _join(self, x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            branch = branch * scale
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            kept = torch.empty((x.shape[0], 1, 1), dtype=branch.dtype, device=x.device).bernoulli_(keep)
            branch = branch * (kept / keep)
        return x + branch


def _check_rate(name: str, rate: float) -> None:
    if not 0 <= rate < 1:
        fail(name, "drop_path", "in [0, 1)", rate)


class Blocks(nn.ModuleList):
    """Transformer blocks in order, with a switch for gradient checkpointing.

    With `grad_checkpointing` set, a block's activations are computed again in the backward pass, not kept.
    """

    grad_checkpointing: bool = False

    def set_drop_path(self, rate: float) -> None:
        """Let the blocks' `drop_path` rise evenly from 0 in the first to `rate` in the last.

        Raises:
            ValueError: when `rate` lies outside [0, 1).
        """
        _check_rate("Blocks", rate)
        for i, block in enumerate(self):
            assert isinstance(block, Block)
            block.drop_path = rate * i / max(len(self) - 1, 1)

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | Sequence[Tensor] | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
        intermediates: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`x (B, T, C)` -> `(B, T, C)`.

        Args:
            x: `(B, T, C)`.
            attn_mask: of all blocks, or a sequence of one for each.
            key_padding_mask, is_causal: as `pymm.layers.Attention` takes them.
            intermediates: receives the result of block i as `"blocks.i"`.
        """
        for i, block in enumerate(self):
            mask = attn_mask if attn_mask is None or isinstance(attn_mask, Tensor) else attn_mask[i]
            if self.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(
                    block,
                    x,
                    use_reentrant=False,
                    attn_mask=mask,
                    key_padding_mask=key_padding_mask,
                    is_causal=is_causal,
                )
            else:
                x = block(x, attn_mask=mask, key_padding_mask=key_padding_mask, is_causal=is_causal)
            if intermediates is not None:
                intermediates[f"blocks.{i}"] = x
        return x


def transformer_blocks(
    depth: int,
    width: int,
    heads: int,
    mlp_width: int,
    *,
    activation: Activation = "gelu",
    eps: float = 1e-6,
    layer_scale: float | None = None,
    drop_path: float = 0.0,
    qkv: Callable[[int], nn.Module] | None = None,
) -> Blocks:
    """`depth` pre-norm blocks; `drop_path` rises evenly from 0 in the first to its value in the last.

    `qkv` makes attention's first projection from the width where it is not to be a linear layer.
    """
    blocks = Blocks(
        Block(
            Attention(width, heads, None if qkv is None else qkv(width)),
            MLP(width, mlp_width, activation),
            nn.LayerNorm(width, eps),
            nn.LayerNorm(width, eps),
            layer_scale=layer_scale,
        )
        for _ in range(depth)
    )
    blocks.set_drop_path(drop_path)
    return blocks
