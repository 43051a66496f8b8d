"""Vision transformers: ViT, and the image tower that CLIP makes of it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pymm.layers import Blocks, ClassToken, Linear, PatchEmbed, transformer_blocks
from pymm.ops.linear import Activation


class VisionTransformer(nn.Module):
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

    @property
    def image_size(self) -> int:
        return self.embed.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.embed.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.embed.std

    @property
    def num_features(self) -> int:
        """C, the width of a token."""
        return self.embed.weight.shape[0]

    @property
    def num_classes(self) -> int:
        """The size of the head's result; 0 without a head."""
        return self.head.out_features if isinstance(self.head, Linear) else 0

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a new linear one, or by none when `num_classes` is 0."""
        self.head = new_head(self.num_features, num_classes).to(self.embed.weight)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self.blocks.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"embed.prefix", "embed.position"}

    def forward_features(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """Pixels to normalized tokens.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`; H and W multiples of the
                patch size. At another size than `image_size` the positions are interpolated.
            intermediates: receives `"embed"`, `"blocks.0"`, ..., `"norm"`.

        Returns:
            `(B, P + N, C)`.
        """
        x = self.norm_pre(self.embed(pixels))
        if intermediates is not None:
            intermediates["embed"] = x
        x = self.norm(self.blocks(x, intermediates=intermediates))
        if intermediates is not None:
            intermediates["norm"] = x
        return x

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Tokens `(B, P + N, C)` to `(B, num_classes)`, or to the pooled `(B, C)` with `pre_logits`."""
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """`pixels (B, 3, H, W)` -> `(B, num_classes)`; `intermediates` as in `forward_features`."""
        return self.forward_head(self.forward_features(pixels, intermediates=intermediates))


def new_head(width: int, num_classes: int) -> nn.Module:
    """A linear classifier, truncated normal with 0.02 and zero bias as timm's; nothing for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = Linear(width, num_classes)
    _truncated(head)
    return head


def _truncated(linear: Linear) -> None:
    nn.init.trunc_normal_(linear.weight, std=0.02)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


@dataclass(frozen=True)
class ViTSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands."""

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


_VIT = "Dosovitskiy et al. 2021, arXiv:2010.11929, table 1"
_DEIT = "Touvron et al. 2021, arXiv:2012.12877, table 1"
_STEINER = "Steiner et al. 2022, arXiv:2106.10270, sec. 3.2"

ROWS = (
    ViTSpec("vit_tiny_patch16_224", 16, 192, 12, 3, 768, 5_717_416, _DEIT),
    ViTSpec("vit_small_patch32_224", 32, 384, 12, 6, 1536, 22_878_952, _STEINER),
    ViTSpec("vit_small_patch16_224", 16, 384, 12, 6, 1536, 22_050_664, _DEIT),
    ViTSpec("vit_base_patch32_224", 32, 768, 12, 12, 3072, 88_224_232, _VIT),
    ViTSpec("vit_base_patch16_224", 16, 768, 12, 12, 3072, 86_567_656, _VIT),
    ViTSpec("vit_base_patch16_384", 16, 768, 12, 12, 3072, 86_859_496, _VIT, image_size=384),
    ViTSpec("vit_large_patch32_224", 32, 1024, 24, 16, 4096, 306_535_400, _VIT),
    ViTSpec("vit_large_patch16_224", 16, 1024, 24, 16, 4096, 304_326_632, _VIT),
    ViTSpec("vit_huge_patch14_224", 14, 1280, 32, 16, 5120, 632_045_800, _VIT),
)


def build(spec: ViTSpec) -> VisionTransformer:
    """The ViT of a row, initialised as timm does it: truncated normal with 0.02, zero biases."""
    model = VisionTransformer(
        PatchEmbed(spec.image_size, spec.patch_size, spec.width, mean=spec.mean, std=spec.std),
        nn.Identity(),
        transformer_blocks(spec.depth, spec.width, spec.heads, spec.mlp_width),
        nn.LayerNorm(spec.width, eps=1e-6),
        ClassToken(),
        new_head(spec.width, spec.num_classes),
    )
    for module in model.blocks.modules():
        if isinstance(module, Linear):
            _truncated(module)
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
