"""CLIP's causal text transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pymm.layers import Linear, TokenEmbed, transformer_blocks
from pymm.models.text_network import TokenTransformer
from pymm.ops.linear import Activation


class TextTransformer(TokenTransformer):
    """A causal transformer read at its end token (Radford et al. 2021, arXiv:2103.00020, sec. 2.4).

    The end token has the highest id of the vocabulary, so it stands where the ids are largest; what follows
    it is padding, which a causal transformer cannot see from there.

    Args:
        embed: tokens to `(B, L, C)`.
        blocks: the transformer, run with a causal mask.
        norm: after the blocks.
        head: the projection.
    """

    is_causal = True

    def forward_head(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Vectors `(B, L, C)` of `tokens (B, L)` to the projected end token, `(B, E)`."""
        rows = torch.arange(x.shape[0], device=x.device)
        return self.head(x[rows, tokens.argmax(1)])


def trim(tokens: Tensor) -> Tensor:
    """`tokens (B, L)` without the columns behind the last end token of the batch.

    `TextTransformer` gives the same result for both, since nothing behind an end token is seen from it; with
    short captions in a long context it has several times less to do. It looks at the values, so it belongs in
    front of a compiled model, and on a GPU it waits for them.
    """
    return tokens[:, : int(tokens.argmax(1).max()) + 1] if tokens.numel() else tokens


@dataclass(frozen=True)
class TextTower:
    """Sizes of the text transformer inside a CLIP row."""

    width: int
    depth: int
    heads: int
    context_length: int = 77
    vocab_size: int = 49408


def build_tower(tower: TextTower, embed: int, activation: Activation) -> TextTransformer:
    """CLIP's text tower, with its own initialisation (arXiv:2103.00020, sec. 2.4; as open_clip does it)."""
    width = tower.width
    head = Linear(width, embed, bias=False)
    nn.init.normal_(head.weight, std=width**-0.5)
    model = TextTransformer(
        TokenEmbed(tower.vocab_size, tower.context_length, width),
        transformer_blocks(tower.depth, width, tower.heads, 4 * width, activation=activation, eps=1e-5),
        nn.LayerNorm(width),
        head,
    )
    after_sum = width**-0.5 * (2 * tower.depth) ** -0.5  # keeps the residual stream's size whatever the depth
    stds = {
        "attn.qkv.weight": width**-0.5,
        "attn.proj.weight": after_sum,
        "mlp.fc1.weight": (2 * width) ** -0.5,
        "mlp.fc2.weight": after_sum,
        "attn.qkv.bias": 0.0,
        "attn.proj.bias": 0.0,
    }
    for name, parameter in model.blocks.named_parameters():
        part = name.partition(".")[2]
        if part in stds:
            nn.init.normal_(parameter, std=stds[part])
    return model
