"""Vision transformers: ViT, and the image tower that CLIP makes of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from pymm.layers import AttentionPool, Blocks, ClassToken, Linear, MeanToken, PatchEmbed, transformer_blocks
from pymm.models.tokened import TokenNetwork, new_head, truncated
from pymm.ops.linear import Activation


class VisionTransformer(TokenNetwork):
    """A vision transformer (Dosovitskiy et al. 2021, arXiv:2010.11929, eq. 1 to 4) with timm's interface.

    Args:
        embed: pixels to `(B, P + N, C)`.
        norm_pre: between the embedding and the blocks; `nn.Identity()`, or CLIP's layer norm.
        blocks: the transformer.
        norm: after the blocks.
        pool: `(B, P + N, C)` -> `(B, C)`.
        head: the classifier, CLIP's projection, or `nn.Identity()`.
    """

    def __init__(
        self,
        embed: PatchEmbed,
        norm_pre: nn.Module,
        blocks: Blocks,
        norm: nn.Module,
        pool: nn.Module,
        head: nn.Module,
    ) -> None:
        super().__init__()
        self.embed, self.norm_pre, self.blocks, self.norm = embed, norm_pre, blocks, norm
        self.pool, self.head = pool, head

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"embed.prefix", "embed.position"}

    def stage_names(self) -> list[tuple[str, ...]]:
        """Modules and parameters by stage, from the pixels to the head; see `pymm.models.stages`."""
        blocks = [(f"blocks.{i}",) for i in range(len(self.blocks))]
        return [("embed", "norm_pre"), *blocks, ("norm", "pool", "head")]

    def forward_features(
        self,
        pixels: Tensor,
        *,
        keep: Tensor | None = None,
        intermediates: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Pixels to normalized tokens.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`; H and W multiples of the
                patch size. At another size than `image_size` the positions are interpolated.
            keep: `(B, K)` of an integer type, the patches to compute; all of them when None.
            intermediates: receives `"embed"`, `"blocks.0"`, ..., `"norm"`.

        Returns:
            `(B, P + N, C)`, or `(B, P + K, C)` with `keep`.
        """
        x = self.norm_pre(self.embed(pixels, keep=keep))
        if intermediates is not None:
            intermediates["embed"] = x
        x = self.norm(self.blocks(x, intermediates=intermediates))
        if intermediates is not None:
            intermediates["norm"] = x
        return x


@dataclass(frozen=True)
class ViTSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands.

    `prefix` counts class and register tokens; `position` says whether they have positions too. With the pool
    `"class"` the head reads the first token behind the final norm, with `"mean"` the normalized mean of the
    patches, with `"attention"` what a learned query finds among the normalized tokens.
    """

    name: str
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    parameters: int
    source: str
    image_size: int = 224
    num_classes: int = 1000
    aliases: tuple[str, ...] = ()
    # timm's ViT checkpoints are trained with these.
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    prefix: int = 1
    position: Literal["all", "patches"] = "all"
    pool: Literal["class", "mean", "attention"] = "class"
    layer_scale: float | None = None
    activation: Activation = "gelu"


def build(spec: ViTSpec) -> VisionTransformer:
    """The ViT of a row, initialised as timm does it: truncated normal with 0.02, zero biases."""
    norm = nn.LayerNorm(spec.width, eps=1e-6)
    mean = spec.pool == "mean"
    pool: nn.Module
    if spec.pool == "attention":
        pool = AttentionPool(spec.width, spec.heads, spec.mlp_width, activation=spec.activation)
    else:
        pool = MeanToken(spec.prefix, norm) if mean else ClassToken()
    model = VisionTransformer(
        PatchEmbed(
            spec.image_size,
            spec.patch_size,
            spec.width,
            prefix=spec.prefix,
            position=spec.position,
            mean=spec.mean,
            std=spec.std,
        ),
        nn.Identity(),
        transformer_blocks(
            spec.depth,
            spec.width,
            spec.heads,
            spec.mlp_width,
            activation=spec.activation,
            layer_scale=spec.layer_scale,
        ),
        nn.Identity() if mean else norm,
        pool,
        new_head(spec.width, spec.num_classes),
    )
    truncated(model.blocks)
    truncated(model.pool)
    return model


@dataclass(frozen=True)
class ViTTower:
    """Sizes of the vision transformer inside a CLIP row."""

    image_size: int
    patch_size: int
    width: int
    depth: int
    heads: int
    mlp_width: int


def build_tower(
    tower: ViTTower, embed: int, activation: Activation, mean: tuple[float, ...], std: tuple[float, ...]
) -> VisionTransformer:
    """CLIP's image tower: a layer norm before the blocks, no bias in the embedding, a projection as head.

    Radford et al. 2021, arXiv:2103.00020, sec. 2.4. Initialised as open_clip does it: class token, positions
    and projection normal with 1/√width, attention as `nn.MultiheadAttention`, the rest as `nn.Linear`.
    """
    width = tower.width
    head = Linear(width, embed, bias=False)
    model = VisionTransformer(
        PatchEmbed(tower.image_size, tower.patch_size, width, bias=False, mean=mean, std=std),
        nn.LayerNorm(width),
        transformer_blocks(tower.depth, width, tower.heads, tower.mlp_width, activation=activation, eps=1e-5),
        nn.LayerNorm(width),
        ClassToken(),
        head,
    )
    for parameter in (model.embed.prefix, model.embed.position, head.weight):
        assert parameter is not None
        nn.init.normal_(parameter, std=width**-0.5)
    for name, parameter in model.blocks.named_parameters():
        if name.endswith("attn.qkv.weight"):
            nn.init.xavier_uniform_(parameter)
        elif name.endswith(("attn.qkv.bias", "attn.proj.bias")):
            nn.init.zeros_(parameter)
    return model
