"""What the text towers share: sizes, the head, activations that are computed again."""

from __future__ import annotations

from torch import nn

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
