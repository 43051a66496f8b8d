"""What networks of patch tokens have in common: a head that can be replaced, timm's names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn

from pymm.layers import Blocks, Linear, PatchEmbed
from pymm.ops._checks import fail


class TokenNetwork(nn.Module):
    """The part of timm's interface that does not depend on how tokens learn where they stand.

    A subclass sets the five modules and defines `forward_features`.
    """

    embed: PatchEmbed
    blocks: Blocks
    norm: nn.Module
    pool: nn.Module
    head: nn.Module

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
    def num_prefix_tokens(self) -> int:
        """P, the number of tokens in front of the patches."""
        return 0 if self.embed.prefix is None else self.embed.prefix.shape[0]

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

    def set_drop_path(self, rate: float) -> None:
        """Stochastic depth: a branch's probability of being dropped rises from 0 to `rate` with the depth.

        Raises:
            ValueError: when `rate` lies outside [0, 1).
        """
        self.blocks.set_drop_path(rate)

    def forward_features(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """`pixels (B, 3, H, W)` -> `(B, P + N, C)`; `intermediates` receives what the model names."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """Tokens `(B, P + N, C)` to `(B, num_classes)`, or to the pooled `(B, C)` with `pre_logits`."""
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """`pixels (B, 3, H, W)` -> `(B, num_classes)`; `intermediates` as in `forward_features`."""
        return self.forward_head(self.forward_features(pixels, intermediates=intermediates))

    def forward_intermediates(
        self,
        pixels: Tensor,
        indices: int | Sequence[int] | None = None,
        *,
        norm: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> tuple[Tensor, list[Tensor]] | list[Tensor]:
        """The patch tokens behind chosen blocks, as timm's method of that name gives them.

        Args:
            pixels: `(B, 3, H, W)`, as for `forward_features`.
            indices: of blocks, negative ones from the end; a number n means the last n; None means all.
            norm: pass each through the final norm.
            output_fmt: `"NCHW"` for maps `(B, C, h, w)`, `"NLC"` for tokens `(B, N, C)`.
            intermediates_only: leave the final tokens out.

        Returns:
            The tokens of `forward_features` and the list, or the list alone.

        Raises:
            ValueError: for a block that is not there, or an unknown format.
        """
        name, depth = type(self).__name__, len(self.blocks)
        if output_fmt not in ("NCHW", "NLC"):
            fail(name, "output_fmt", "'NCHW' or 'NLC'", repr(output_fmt))
        if isinstance(indices, int):
            if not 1 <= indices <= depth:
                fail(name, "indices", f"a number from 1 to {depth}, or a list", indices)
            indices = range(depth - indices, depth)
        chosen = list(range(depth) if indices is None else indices)
        if any(not -depth <= i < depth for i in chosen):
            fail(name, "indices", f"in [-{depth}, {depth})", chosen)
        named: dict[str, Tensor] = {}
        features = self.forward_features(pixels, intermediates=named)
        taken = [named[f"blocks.{i % depth}"] for i in sorted(i % depth for i in chosen)]
        taken = [(self.norm(x) if norm else x)[:, self.num_prefix_tokens :] for x in taken]
        if output_fmt == "NCHW":
            grid = [size // self.embed.patch_size for size in pixels.shape[2:]]
            taken = [x.mT.unflatten(2, grid) for x in taken]
        return taken if intermediates_only else (features, taken)


def new_head(width: int, num_classes: int) -> nn.Module:
    """A linear classifier, truncated normal with 0.02 and zero bias as timm's; nothing for 0 classes."""
    if num_classes == 0:
        return nn.Identity()
    head = Linear(width, num_classes)
    truncated(head)
    return head


def truncated(module: nn.Module) -> None:
    """Start every linear layer inside truncated normal with 0.02, biases zero, as timm's ViT."""
    for layer in module.modules():
        if isinstance(layer, Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
