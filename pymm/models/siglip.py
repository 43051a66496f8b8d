"""SigLIP's text transformer; its image tower is a `VisionTransformer` that pools by attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from pymm.layers import Linear, TokenEmbed, transformer_blocks
from pymm.models.text_network import TokenTransformer
from pymm.models.tokened import truncated
from pymm.ops.linear import Activation


class SigLIPText(TokenTransformer):
    """A transformer that sees all of a row and is read at its last place (arXiv:2303.15343, sec. 4 and 5).

    Padding is not masked, and the last place is padding for all but the longest texts, so rows must be as
    long as those of training: `context_length`. SigLIP's own tokens are 32,000 SentencePiece units of the
    English C4, of lower case text without punctuation; `</s>`, id 1, ends a text and fills up its row.

    Args:
        embed: tokens to `(B, L, C)`.
        blocks: the transformer, without a mask.
        norm: after the blocks.
        head: the projection, with a bias.
    """

    def forward_head(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Vectors `(B, L, C)` to the projected last one, `(B, E)`."""
        vector: Tensor = self.head(x[:, -1])
        return vector


@dataclass(frozen=True)
class SigLIPTextTower:
    """Sizes of the text transformer inside a SigLIP row."""

    width: int
    depth: int
    heads: int
    mlp_width: int
    context_length: int = 64
    vocab_size: int = 32_000


def build_text(tower: SigLIPTextTower, embed: int, activation: Activation) -> SigLIPText:
    """The text tower of a row, initialised as our ViT: truncated normal with 0.02, zero biases."""
    model = SigLIPText(
        TokenEmbed(tower.vocab_size, tower.context_length, tower.width),
        transformer_blocks(tower.depth, tower.width, tower.heads, tower.mlp_width, activation=activation),
        nn.LayerNorm(tower.width, eps=1e-6),
        Linear(tower.width, embed),
    )
    truncated(model)
    return model
