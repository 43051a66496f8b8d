"""DeiT: a vision transformer with a second token that learns from a teacher."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pymm.layers import Blocks, PatchEmbed, transformer_blocks
from pymm.models.tokened import TokenNetwork, new_head, truncated
from pymm.ops._checks import fail, shape


class TwoHeads(nn.Module):
    """A classifier of the class token and one of the distillation token, `(B, 2, C)` -> `(B, K)`: their mean.

    Args:
        width: C.
        num_classes: K, at least 1.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.out_features = num_classes
        self.classes, self.distilled = new_head(width, num_classes), new_head(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.apart(x)
        return (first + second) / 2

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Both answers, for an objective that asks the second for the teacher's."""
        return self.classes(x[:, 0]), self.distilled(x[:, 1])


class DeiT(TokenNetwork):
    """A vision transformer that is distilled through a token (Touvron et al. 2021, arXiv:2012.12877, sec. 4).

    Args:
        embed: pixels to `(B, 2 + N, C)`, the class token and the distillation token in front.
        blocks: the transformer.
        norm: after the blocks.
        head: `TwoHeads`, or `nn.Identity()`.
    """

    def __init__(self, embed: PatchEmbed, blocks: Blocks, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm, self.head = embed, blocks, norm, head
        if self.num_prefix_tokens != 2:
            fail("DeiT", "embed", "with two tokens in front", self.num_prefix_tokens)

    @property
    def num_classes(self) -> int:
        """The size of the heads' result; 0 without them."""
        return self.head.out_features if isinstance(self.head, TwoHeads) else 0

    def reset_classifier(self, num_classes: int) -> None:
        """Replace both heads by new ones, or by none when `num_classes` is 0."""
        self.head = _heads(self.num_features, num_classes).to(self.embed.weight)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"embed.prefix", "embed.position"}

    def stage_names(self) -> list[tuple[str, ...]]:
        """Modules and parameters by stage, from the pixels to the head; see `pymm.models.stages`."""
        return [("embed",), *((f"blocks.{i}",) for i in range(len(self.blocks))), ("norm", "head")]

    def forward_features(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """Pixels to normalized tokens.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`; H and W multiples of the
                patch size.
            intermediates: receives `"embed"`, `"blocks.0"`, ..., `"norm"`.

        Returns:
            `(B, 2 + N, C)`.
        """
        x = self.embed(pixels)
        if intermediates is not None:
            intermediates["embed"] = x
        x = self.norm(self.blocks(x, intermediates=intermediates))
        if intermediates is not None:
            intermediates["norm"] = x
        return x

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Tokens to `(B, num_classes)`, or with `pre_logits` to the mean of the first two, `(B, C)`."""
        if pre_logits or not isinstance(self.head, TwoHeads):
            return x[:, :2].mean(1)
        return self.head(x[:, :2])

    def forward_apart(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """`pixels (B, 3, H, W)` -> what the class and the distillation token say, `(B, num_classes)` each.

        Raises:
            ValueError: when the model has no heads.
        """
        if not isinstance(self.head, TwoHeads):
            fail("DeiT", "head", "of at least one class", shape(pixels))
        return self.head.apart(self.forward_features(pixels)[:, :2])


def _heads(width: int, num_classes: int) -> nn.Module:
    return TwoHeads(width, num_classes) if num_classes else nn.Identity()


@dataclass(frozen=True)
class DeiTSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands."""

    name: str
    patch_size: int
    width: int
    depth: int
    heads: int
    parameters: int
    source: str = "Touvron et al. 2021, arXiv:2012.12877, table 1 and sec. 4"
    image_size: int = 224
    num_classes: int = 1000
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


ROWS = (
    DeiTSpec("deit_tiny_distilled_patch16_224", 16, 192, 12, 3, 5_910_800),
    DeiTSpec("deit_small_distilled_patch16_224", 16, 384, 12, 6, 22_436_432),
    DeiTSpec("deit_base_distilled_patch16_224", 16, 768, 12, 12, 87_338_192),
    DeiTSpec("deit_base_distilled_patch16_384", 16, 768, 12, 12, 87_630_032, image_size=384),
)


def build(spec: DeiTSpec) -> DeiT:
    """The DeiT of a row, initialised as timm does it: truncated normal with 0.02, zero biases."""
    embed = PatchEmbed(spec.image_size, spec.patch_size, spec.width, prefix=2, mean=spec.mean, std=spec.std)
    assert embed.prefix is not None
    nn.init.trunc_normal_(embed.prefix, std=0.02)
    model = DeiT(
        embed,
        transformer_blocks(spec.depth, spec.width, spec.heads, 4 * spec.width),
        nn.LayerNorm(spec.width, eps=1e-6),
        _heads(spec.width, spec.num_classes),
    )
    truncated(model.blocks)
    return model
