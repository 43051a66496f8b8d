"""What the text towers share: sizes, the head, activations that are computed again."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from pymm.layers import Blocks, Linear, TokenEmbed


class TextNetwork(nn.Module):
    """A transformer over tokens.

    Args:
        embed: tokens with positions.
        blocks: the transformer.
        norm: where the network has it.
        head: the projection into a shared embedding, or `nn.Identity()`.
    """

    def __init__(self, embed: TokenEmbed, blocks: Blocks, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed, self.blocks, self.norm, self.head = embed, blocks, norm, head

    @property
    def context_length(self) -> int:
        return self.embed.position.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.embed.weight.shape[0]

    @property
    def num_features(self) -> int:
        """C, the width of a token."""
        return self.embed.weight.shape[1]

    @property
    def num_classes(self) -> int:
        """E, the size of the head's result; 0 without a head."""
        return self.head.out_features if isinstance(self.head, Linear) else 0

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self.blocks.grad_checkpointing = enable


class TokenTransformer(TextNetwork):
    """Blocks and a norm over tokens, read at one of them: `forward_head` says at which."""

    is_causal: ClassVar[bool] = False

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"embed.position"}

    def forward_features(self, tokens: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """Token ids to normalized vectors.

        Args:
            tokens: `(B, L)` int64, L ≤ context_length, ids in [0, vocab_size).
            intermediates: receives `"embed"`, `"blocks.0"`, ..., `"norm"`.

        Returns:
            `(B, L, C)`.
        """
        x = self.embed(tokens)
        if intermediates is not None:
            intermediates["embed"] = x
        x = self.norm(self.blocks(x, is_causal=self.is_causal, intermediates=intermediates))
        if intermediates is not None:
            intermediates["norm"] = x
        return x

    def forward_head(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Vectors `(B, L, C)` of `tokens (B, L)` to one projected vector of each row, `(B, E)`."""
        raise NotImplementedError

    def forward(self, tokens: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """`tokens (B, L)` -> `(B, E)`; `intermediates` as in `forward_features`."""
        return self.forward_head(self.forward_features(tokens, intermediates=intermediates), tokens)
