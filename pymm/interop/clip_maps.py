"""The names of CLIP in OpenAI's files, open_clip and transformers."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from pymm.interop import bert_maps, siglip_maps, transformers_maps, vit_maps
from pymm.interop.residual_maps import residual_stages
from pymm.interop.rules import TRANSPOSED, VECTOR, KeyMap, Rule, behind, stacked
from pymm.layers import AttentionPool2d
from pymm.models.bert import Bert
from pymm.models.clip import CLIP
from pymm.models.text import TextTransformer
from pymm.models.vit import VisionTransformer


def _blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
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
    *_blocks("visual.", "visual."),
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
# An image tower that open_clip takes from timm, whose last layer is timm's or its own.
_CLIP_TRUNK = (
    Rule(r"visual\.head\.(.*)", (r"visual.head.proj.\1",)),
    *behind("visual.", "visual.trunk.", (*vit_maps.TIMM, *vit_maps.TIMM_CLASS)),
)
_SIGLIP_TRUNK = behind("visual.", "visual.trunk.", (*vit_maps.TIMM_ATTENTION_POOL, *vit_maps.TIMM))
_SCALARS = Rule(r"(logit_scale|logit_bias)", (r"\1",))


def _text(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(r"text\.embed\.weight", (f"{prefix}token_embedding.weight",)),
        Rule(r"text\.embed\.position", (f"{prefix}positional_embedding",)),
        *_blocks("text.", prefix),
        Rule(r"text\.norm\.(.*)", (rf"{prefix}ln_final.\1",)),
        Rule(r"text\.head\.weight", (f"{prefix}text_projection",), TRANSPOSED),
    )


def _bert(*pooler: Rule) -> tuple[Rule, ...]:
    """A text tower that open_clip takes from transformers, with a linear layer behind it."""
    return (
        *behind("text.", "text.transformer.", (*bert_maps.ENCODER_RULES, *pooler)),
        Rule(r"text\.head\.weight", ("text.proj.weight",)),
    )


def _has_vit(model: CLIP) -> bool:
    return isinstance(model.visual, VisionTransformer) and model.visual.embed.bias is None


def _has_trunk(model: CLIP) -> bool:
    is_vit = isinstance(model.visual, VisionTransformer) and not _has_vit(model)
    return is_vit and not vit_maps.pools_by_attention(model.visual)


def _has_resnet(model: CLIP) -> bool:
    return isinstance(getattr(model.visual, "pool", None), AttentionPool2d)


def _reads(model: CLIP) -> bool:
    return isinstance(model.text, TextTransformer)


def _has_bert(model: CLIP) -> bool:
    return isinstance(model.text, Bert) and not bert_maps.has_pooler(model.text)


def _has_pooled_bert(model: CLIP) -> bool:
    return bert_maps.has_pooler(model.text)


_Fits = Callable[[CLIP], bool]


def _both(visual: _Fits, text: _Fits) -> Callable[[nn.Module], bool]:
    return lambda model: isinstance(model, CLIP) and visual(model) and text(model)


# What OpenAI's TorchScript archives say about themselves among their weights.
OPENAI_FACTS = ("input_resolution", "context_length", "vocab_size")
_POSITIONS, _POOLER = (r"text\.transformer\." + name for name in (bert_maps.POSITIONS, bert_maps.POOLER))

_VISUALS = (
    ("", _CLIP_VIT, _has_vit),
    ("ResNet", _CLIP_RESNET, _has_resnet),
    ("timm's ViT", _CLIP_TRUNK, _has_trunk),
)
_TEXTS = (
    ("a text tower of its own", _text("text."), (), _reads),
    ("BERT", _bert(), (_POSITIONS, _POOLER), _has_bert),
    ("BERT with its pooler", _bert(bert_maps.POOLER_RULE), (_POSITIONS,), _has_pooled_bert),
)

MAPS = (
    # OpenAI's names, whose text tower has no prefix.
    *(
        KeyMap(
            ("open_clip", "OpenAI's CLIP"),
            CLIP,
            (*visual, *_text(""), _SCALARS),
            variant=name,
            ignored=OPENAI_FACTS,
            fits=_both(has_visual, _reads),
        )
        for name, visual, has_visual in _VISUALS[:2]
    ),
    *(
        KeyMap(
            ("open_clip",),
            CLIP,
            (*visual, *text, _SCALARS),
            variant=" and ".join(filter(None, (of_visual, of_text))),
            ignored=ignored,
            fits=_both(has_visual, has_text),
        )
        for of_visual, visual, has_visual in _VISUALS
        for of_text, text, ignored, has_text in _TEXTS
    ),
    KeyMap(
        ("open_clip",),
        CLIP,
        (*_SIGLIP_TRUNK, siglip_maps.OPEN_CLIP_HEAD, *_text("text."), _SCALARS),
        variant="SigLIP",
        fits=siglip_maps.is_siglip,
    ),
    KeyMap(
        ("transformers",),
        CLIP,
        transformers_maps.CLIP_RULES,
        ignored=transformers_maps.CLIP_IGNORED,
        fits=_both(_has_vit, _reads),
    ),
)
