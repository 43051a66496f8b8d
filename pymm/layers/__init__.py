"""Modules made of pymm's ops."""

from pymm.layers.attention import Attention
from pymm.layers.block import Block, Blocks, transformer_blocks
from pymm.layers.linear import Linear
from pymm.layers.mlp import MLP
from pymm.layers.patch_embed import PatchEmbed
from pymm.layers.pixels import Normalize, from_patches, to_patches
from pymm.layers.pool import AttentionPool, AttentionPool2d, ClassToken, MeanMap, MeanToken
from pymm.layers.position import resample_position, sincos_position
from pymm.layers.qkv import QKV
from pymm.layers.relative_position import (
    RelativePositionBias,
    relative_position_index,
    resample_relative_position,
)
from pymm.layers.residual import (
    BasicBlock,
    Bottleneck,
    antialiased_bottleneck,
    basic_block,
    bottleneck,
    checkpointed,
)
from pymm.layers.token_embed import TokenEmbed

__all__ = [
    "MLP",
    "QKV",
    "Attention",
    "AttentionPool",
    "AttentionPool2d",
    "BasicBlock",
    "Block",
    "Blocks",
    "Bottleneck",
    "ClassToken",
    "Linear",
    "MeanMap",
    "MeanToken",
    "Normalize",
    "PatchEmbed",
    "RelativePositionBias",
    "TokenEmbed",
    "antialiased_bottleneck",
    "basic_block",
    "bottleneck",
    "checkpointed",
    "from_patches",
    "relative_position_index",
    "resample_position",
    "resample_relative_position",
    "sincos_position",
    "to_patches",
    "transformer_blocks",
]
