"""BEiT: a vision transformer whose patches know each other by relative position."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from pymm.layers import (
    MLP,
    QKV,
    Attention,
    Block,
    Blocks,
    ClassToken,
    Linear,
    MeanToken,
    PatchEmbed,
    RelativePositionBias,
    relative_position_index,
    transformer_blocks,
)
from pymm.models.tokened import TokenNetwork, new_head, truncated


class BEiT(TokenNetwork):
    """A vision transformer with relative position biases, with timm's interface.

    Bao et al. 2022, arXiv:2106.08254.

    Args:
        embed: pixels to `(B, 1 + N, C)`, without positions.
        biases: one for all blocks, as in pretraining, or one for each.
        blocks: the transformer.
        norm: after the blocks.
        pool: `(B, 1 + N, C)` -> `(B, C)`.
        head: the classifier, or `nn.Identity()`.
    """

    def __init__(
        self,
        embed: PatchEmbed,
        biases: nn.ModuleList,
        blocks: Blocks,
        norm: nn.Module,
        pool: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.embed, self.biases, self.blocks, self.norm = embed, biases, blocks, norm
        self.pool, self.head = pool, head

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"embed.prefix", *(f"biases.{i}.table" for i in range(len(self.biases)))}

    def stage_names(self) -> list[tuple[str, ...]]:
        """Modules and parameters by stage, from the pixels to the head; see `pymm.models.stages`."""
        shared = len(self.biases) == 1
        blocks = [(f"blocks.{i}", *(() if shared else (f"biases.{i}",))) for i in range(len(self.blocks))]
        return [("embed", "biases") if shared else ("embed",), *blocks, ("norm", "pool", "head")]

    def forward_features(
        self,
        pixels: Tensor,
        *,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        intermediates: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Pixels to normalized tokens.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`; H and W multiples of the
                patch size. At another size than `image_size` the biases are interpolated.
            mask: `(B, N)` bool, True = the patch is hidden behind `mask_token`.
            mask_token: `(C,)`, with `mask`.
            intermediates: receives `"embed"`, `"blocks.0"`, ..., `"norm"`.

        Returns:
            `(B, 1 + N, C)`.
        """
        x = self.embed(pixels, mask=mask, mask_token=mask_token)
        if intermediates is not None:
            intermediates["embed"] = x
        h, w = (size // self.embed.patch_size for size in pixels.shape[2:])
        index = relative_position_index((h, w)).to(x.device)
        biases = [bias((h, w), index) for bias in self.biases]
        masks = biases[0] if len(biases) == 1 else biases
        x = self.norm(self.blocks(x, attn_mask=masks, intermediates=intermediates))
        if intermediates is not None:
            intermediates["norm"] = x
        return x


@dataclass(frozen=True)
class BEiTSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands.

    A row for pretraining has one bias for all blocks and a final norm; a row for classification one bias for
    each block, and the normalized mean of the patches in front of its head.
    """

    name: str
    patch_size: int
    width: int
    depth: int
    heads: int
    layer_scale: float
    parameters: int
    source: str
    image_size: int = 224
    num_classes: int = 1000
    purpose: Literal["classification", "pretraining"] = "classification"
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


_BAO = "Bao et al. 2022, arXiv:2106.08254, sec. 2.5 and app. E"


def _pretraining(row: BEiTSpec, parameters: int) -> BEiTSpec:
    name = f"{row.name}_pretraining"
    return replace(row, name=name, num_classes=0, purpose="pretraining", parameters=parameters)


_BASE = BEiTSpec("beit_base_patch16_224", 16, 768, 12, 12, 0.1, 86_530_984, _BAO)
_LARGE = BEiTSpec("beit_large_patch16_224", 16, 1024, 24, 16, 1e-5, 304_430_568, _BAO)
# The sizes of vit_mini_patch8_64.
_MINI = BEiTSpec("beit_mini_patch8_64", 8, 192, 6, 3, 0.1, 2_714_002, "pymm", 64, num_classes=10)

ROWS = (
    _BASE,
    replace(_BASE, name="beit_base_patch16_384", image_size=384, parameters=86_744_104),
    _pretraining(_BASE, 85_665_360),
    _LARGE,
    replace(_LARGE, name="beit_large_patch16_384", image_size=384, parameters=304_998_888),
    replace(_LARGE, name="beit_large_patch16_512", image_size=512, parameters=305_674_728),
    _pretraining(_LARGE, 303_136_192),
    _MINI,
    _pretraining(_MINI, 2_708_652),
)


def build(spec: BEiTSpec) -> BEiT:
    """The BEiT of a row, initialised as its authors and timm do it.

    Truncated normal with 0.02, zero biases, the last product of each branch of block i smaller by √(2i + 2),
    and a head a thousand times smaller.
    """
    norm, grid = nn.LayerNorm(spec.width, eps=1e-6), spec.image_size // spec.patch_size
    pretraining = spec.purpose == "pretraining"
    model = BEiT(
        PatchEmbed(spec.image_size, spec.patch_size, spec.width, position=None, mean=spec.mean, std=spec.std),
        nn.ModuleList(
            RelativePositionBias(grid, spec.heads) for _ in range(1 if pretraining else spec.depth)
        ),
        transformer_blocks(
            spec.depth, spec.width, spec.heads, 4 * spec.width, layer_scale=spec.layer_scale, qkv=QKV
        ),
        norm if pretraining else nn.Identity(),
        ClassToken() if pretraining else MeanToken(1, norm),
        new_head(spec.width, spec.num_classes),
    )
    truncated(model.blocks)
    assert model.embed.prefix is not None
    nn.init.trunc_normal_(model.embed.prefix, std=0.02)
    with torch.no_grad():
        for i, block in enumerate(model.blocks):
            assert isinstance(block, Block)
            assert isinstance(block.attn, Attention)
            assert isinstance(block.attn.qkv, QKV)
            assert isinstance(block.mlp, MLP)
            nn.init.trunc_normal_(block.attn.qkv.weight, std=0.02)
            for last in (block.attn.proj, block.mlp.fc2):
                last.weight.div_((2 * i + 2) ** 0.5)
        if isinstance(model.head, Linear):
            model.head.weight.div_(1000)
    return model
