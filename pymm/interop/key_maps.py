"""Where each donor keeps what a model of ours needs; `pymm.interop.rules` says how a map is added."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from pymm.interop import beit_maps, bert_maps, mae_maps, rcnn_maps, transformers_maps, vit_maps
from pymm.interop.residual_maps import residual_stages
from pymm.interop.rules import TRANSPOSED, VECTOR, KeyMap, Rule, convolution, own, stacked
from pymm.layers import AttentionPool2d
from pymm.models.clip import CLIP
from pymm.models.convnet import ConvNet, GridMap
from pymm.models.resnet import ResNet
from pymm.models.vit import VisionTransformer


def _clip_blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Transformer blocks of OpenAI's CLIP, behind the two prefixes."""
    a, b = rf"{re.escape(ours)}blocks\.(\d+)\.", rf"{theirs}transformer.resblocks.\1."
    return (
        Rule(a + r"norm([12])\.(.*)", (b + r"ln_\2.\3",)),
        Rule(a + r"attn\.qkv\.(weight|bias)", (b + r"attn.in_proj_\2",)),
        Rule(a + r"attn\.proj\.(.*)", (b + r"attn.out_proj.\2",)),
        Rule(a + r"mlp\.fc1\.(.*)", (b + r"mlp.c_fc.\2",)),
        Rule(a + r"mlp\.fc2\.(.*)", (b + r"mlp.c_proj.\2",)),
    )


_CLIP_VIT = (
    Rule(r"visual\.embed\.weight", ("visual.conv1.weight",)),
    Rule(r"visual\.embed\.prefix", ("visual.class_embedding",), VECTOR),
    Rule(r"visual\.embed\.position", ("visual.positional_embedding",)),
    Rule(r"visual\.norm_pre\.(.*)", (r"visual.ln_pre.\1",)),
    *_clip_blocks("visual.", "visual."),
    Rule(r"visual\.norm\.(.*)", (r"visual.ln_post.\1",)),
    Rule(r"visual\.head\.weight", ("visual.proj",), TRANSPOSED),
)
_CLIP_RESNET = (
    Rule(r"visual\.stem\.(.*)", (r"visual.\1",)),
    *residual_stages("visual.", "visual."),
    Rule(r"visual\.pool\.position", ("visual.attnpool.positional_embedding",)),
    Rule(r"visual\.pool\.q\.(.*)", (r"visual.attnpool.q_proj.\1",)),
    Rule(r"visual\.pool\.kv\.(.*)", (r"visual.attnpool.k_proj.\1", r"visual.attnpool.v_proj.\1"), stacked(2)),
    Rule(r"visual\.head\.(.*)", (r"visual.attnpool.c_proj.\1",)),
)
_SCALARS = Rule(r"(logit_scale|logit_bias)", (r"\1",))


def _has_vit(model: nn.Module) -> bool:
    return isinstance(model, CLIP) and isinstance(model.visual, VisionTransformer)


def _has_resnet(model: nn.Module) -> bool:
    return isinstance(model, CLIP) and isinstance(getattr(model.visual, "pool", None), AttentionPool2d)


def _clip_text(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(r"text\.embed\.weight", (f"{prefix}token_embedding.weight",)),
        Rule(r"text\.embed\.position", (f"{prefix}positional_embedding",)),
        *_clip_blocks("text.", prefix),
        Rule(r"text\.norm\.(.*)", (rf"{prefix}ln_final.\1",)),
        Rule(r"text\.head\.weight", (f"{prefix}text_projection",), TRANSPOSED),
    )


_TORCHVISION_RESNET = (
    Rule(r"stem\.(conv|bn)\.(.*)", (r"\g<1>1.\2",)),
    *residual_stages("", ""),
    Rule(r"head\.(.*)", (r"fc.\1",)),
)

# AlexNet's and VGG's fully connected layers have other numbers in torchvision and are convolutions in timm.
_STAGES = Rule(r"stages\.\d+\.(.*)", (r"features.\1",))
_TORCHVISION_HEAD = Rule(r"head\.(.*)", (r"classifier.6.\1",))
_ALEXNET = (
    _STAGES,
    Rule(r"mlp\.fc1\.(.*)", (r"classifier.1.\1",)),
    Rule(r"mlp\.fc2\.(.*)", (r"classifier.4.\1",)),
    _TORCHVISION_HEAD,
)
_VGG = (
    _STAGES,
    Rule(r"mlp\.fc1\.(.*)", (r"classifier.0.\1",)),
    Rule(r"mlp\.fc2\.(.*)", (r"classifier.3.\1",)),
    _TORCHVISION_HEAD,
)
_TIMM_VGG = (
    _STAGES,
    Rule(r"mlp\.fc1\.weight", ("pre_logits.fc1.weight",), convolution(7)),
    Rule(r"mlp\.fc2\.weight", ("pre_logits.fc2.weight",), convolution(1)),
    Rule(r"mlp\.(fc\d)\.bias", (r"pre_logits.\1.bias",)),
    Rule(r"head\.(.*)", (r"head.fc.\1",)),
)


def _is_alexnet(model: nn.Module) -> bool:
    assert isinstance(model, ConvNet)
    return isinstance(model.pool, GridMap) and isinstance(model.mlp, nn.Sequential) and model.pool.side == 6


def _is_vgg(model: nn.Module) -> bool:
    return not _is_alexnet(model)


# What OpenAI's TorchScript archives say about themselves among their weights.
OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")


def _clip_maps(
    visual: tuple[Rule, ...], variant: str, fits: Callable[[nn.Module], bool]
) -> tuple[KeyMap, ...]:
    """OpenAI's names, whose text tower has no prefix, and those of open_clip's custom text towers."""
    apart = f"{variant}{' and ' if variant else ''}a text tower of its own"
    plain, custom = (*visual, *_clip_text(""), _SCALARS), (*visual, *_clip_text("text."), _SCALARS)
    return (
        KeyMap(("open_clip", "OpenAI's CLIP"), CLIP, plain, variant=variant, ignored=OPENAI_FACTS, fits=fits),
        KeyMap(("open_clip",), CLIP, custom, variant=apart, fits=fits),
    )


KEY_MAPS = (
    *_clip_maps(_CLIP_VIT, "", _has_vit),
    *_clip_maps(_CLIP_RESNET, "ResNet", _has_resnet),
    KeyMap(
        ("transformers",),
        CLIP,
        transformers_maps.CLIP_RULES,
        ignored=transformers_maps.CLIP_IGNORED,
        fits=_has_vit,
    ),
    *vit_maps.MAPS,
    *mae_maps.MAPS,
    *beit_maps.MAPS,
    KeyMap(("transformers",), VisionTransformer, transformers_maps.VIT_RULES),
    KeyMap(
        ("transformers",),
        VisionTransformer,
        transformers_maps.VIT_MODEL_RULES,
        variant="as its models have it",
    ),
    KeyMap(
        ("transformers",), VisionTransformer, transformers_maps.VIT_HEADLESS_RULES, variant="without a head"
    ),
    KeyMap(("torchvision", "timm"), ResNet, _TORCHVISION_RESNET),
    KeyMap(("transformers",), ResNet, transformers_maps.RESNET_RULES),
    KeyMap(("torchvision",), ConvNet, _ALEXNET, variant="AlexNet", fits=_is_alexnet),
    KeyMap(("torchvision",), ConvNet, _VGG, variant="VGG", fits=_is_vgg),
    KeyMap(("timm",), ConvNet, _TIMM_VGG, fits=_is_vgg),
    *bert_maps.MAPS,
    *rcnn_maps.MAPS,
)

__all__ = ["KEY_MAPS", "OPENAI_FACTS", "own"]
