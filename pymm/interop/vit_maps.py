"""The names of vision transformers in timm and torchvision, and of DeiT in transformers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pymm.interop.rules import BATCH_OF_ONE, Form, KeyMap, Rule
from pymm.interop.transformers_maps import vit_embed, vit_file_blocks, vit_model_blocks
from pymm.layers import AttentionPool, ClassToken, MeanToken
from pymm.models.deit import DeiT
from pymm.models.vit import VisionTransformer


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.flatten(0, -2) for t in tensors])


def _one_after_another(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


def _first_and_rest(t: Tensor) -> Sequence[Tensor] | None:
    return [t[None, :1], t[None, 1:]] if t.shape[0] > 1 else None


def _thirds(t: Tensor) -> Sequence[Tensor] | None:
    return t.split([t.shape[0] // 3, t.shape[0] - t.shape[0] // 3])


TIMM_ATTENTION_POOL = (
    Rule(r"pool\.probe", ("attn_pool.latent",), BATCH_OF_ONE),
    Rule(r"pool\.qkv\.(.*)", (r"attn_pool.q.\1", r"attn_pool.kv.\1"), Form(_one_after_another, _thirds)),
    Rule(r"pool\.((?:proj|norm|mlp)\..*)", (r"attn_pool.\1",)),
)
TIMM = (
    Rule(r"embed\.(weight|bias)", (r"patch_embed.proj.\1",)),
    Rule(r"embed\.position", ("pos_embed",), BATCH_OF_ONE),
    Rule(r"blocks\.(\d+)\.scale([12])", (r"blocks.\1.ls\2.gamma",)),
    Rule(r"pool\.norm\.(.*)", (r"fc_norm.\1",)),
    Rule(r"((?:norm_pre|blocks|norm|head)\..*)", (r"\1",)),
)
TIMM_CLASS = (
    Rule(r"embed\.prefix", ("cls_token", "reg_token"), Form(_joined, _first_and_rest)),
    Rule(r"embed\.prefix", ("cls_token",), BATCH_OF_ONE),
)
_TIMM_REGISTERS = (Rule(r"embed\.prefix", ("reg_token",), BATCH_OF_ONE),)

_TIMM_DISTILLED = (
    Rule(r"head\.classes\.(.*)", (r"head.\1",)),
    Rule(r"head\.distilled\.(.*)", (r"head_dist.\1",)),
    Rule(r"embed\.prefix", ("cls_token", "dist_token"), Form(_joined, _first_and_rest)),
    *TIMM,
)

_LAYER = r"encoder.layers.encoder_layer_\1."
_TORCHVISION = (
    Rule(r"embed\.(weight|bias)", (r"conv_proj.\1",)),
    Rule(r"embed\.prefix", ("class_token",), BATCH_OF_ONE),
    Rule(r"embed\.position", ("encoder.pos_embedding",), BATCH_OF_ONE),
    Rule(r"blocks\.(\d+)\.norm([12])\.(.*)", (_LAYER + r"ln_\2.\3",)),
    Rule(r"blocks\.(\d+)\.attn\.qkv\.(.*)", (_LAYER + r"self_attention.in_proj_\2",)),
    Rule(r"blocks\.(\d+)\.attn\.proj\.(.*)", (_LAYER + r"self_attention.out_proj.\2",)),
    Rule(r"blocks\.(\d+)\.mlp\.fc1\.(.*)", (_LAYER + r"mlp.0.\2",)),
    Rule(r"blocks\.(\d+)\.mlp\.fc2\.(.*)", (_LAYER + r"mlp.3.\2",)),
    # The published files are older than these numbers.
    Rule(r"blocks\.(\d+)\.mlp\.fc([12])\.(.*)", (_LAYER + r"mlp.linear_\2.\3",)),
    Rule(r"norm\.(.*)", (r"encoder.ln.\1",)),
    Rule(r"head\.(.*)", (r"heads.head.\1",)),
)


def _has_class_token(model: nn.Module) -> bool:
    """timm has rows of registers and the mean, but none of registers, a class token and the mean."""
    assert isinstance(model, VisionTransformer)
    return isinstance(model.pool, ClassToken) or (
        isinstance(model.pool, MeanToken) and model.num_prefix_tokens == 1
    )


def _has_registers_alone(model: nn.Module) -> bool:
    return not _has_class_token(model) and not pools_by_attention(model)


def pools_by_attention(model: nn.Module) -> bool:
    return isinstance(model, VisionTransformer) and isinstance(model.pool, AttentionPool)


def _transformers_distilled(blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    tokens = ("deit.embeddings.cls_token", "deit.embeddings.distillation_token")
    return (
        Rule(r"embed\.prefix", tokens, Form(_joined, _first_and_rest)),
        *vit_embed("", "deit."),
        *blocks,
        Rule(r"norm\.(.*)", (r"deit.layernorm.\1",)),
        Rule(r"head\.classes\.(.*)", (r"cls_classifier.\1",)),
        Rule(r"head\.distilled\.(.*)", (r"distillation_classifier.\1",)),
    )


MAPS = (
    KeyMap(("timm",), VisionTransformer, (*TIMM, *TIMM_CLASS), fits=_has_class_token),
    KeyMap(
        ("timm",),
        VisionTransformer,
        (*TIMM, *_TIMM_REGISTERS),
        variant="registers alone",
        fits=_has_registers_alone,
    ),
    KeyMap(
        ("timm",),
        VisionTransformer,
        (*TIMM_ATTENTION_POOL, *TIMM, *TIMM_CLASS),
        variant="pooled by attention",
        fits=pools_by_attention,
    ),
    KeyMap(("timm",), DeiT, _TIMM_DISTILLED),
    KeyMap(
        ("transformers",),
        DeiT,
        _transformers_distilled(vit_file_blocks(r"blocks\.", "deit.encoder.layer.")),
    ),
    KeyMap(
        ("transformers",),
        DeiT,
        _transformers_distilled(vit_model_blocks(r"blocks\.", "deit.layers.")),
        variant="as its models have it",
    ),
    KeyMap(("torchvision",), VisionTransformer, _TORCHVISION),
)
