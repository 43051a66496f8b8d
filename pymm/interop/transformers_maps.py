"""The names of transformers, as its files have them and, where that differs, as its models do."""

from __future__ import annotations

import re

from pymm.interop.rules import BATCH_OF_ONE, VECTOR, Rule, stacked


def _clip_layers(ours: str, theirs: str) -> tuple[Rule, ...]:
    a, b = rf"{re.escape(ours)}blocks\.(\d+)\.", rf"{theirs}encoder.layers.\1."
    return (
        Rule(a + r"norm([12])\.(.*)", (b + r"layer_norm\2.\3",)),
        Rule(a + r"attn\.qkv\.(.*)", tuple(b + rf"self_attn.{x}_proj.\2" for x in "qkv"), stacked(3)),
        Rule(a + r"attn\.proj\.(.*)", (b + r"self_attn.out_proj.\2",)),
        Rule(a + r"(mlp\.fc[12]\..*)", (b + r"\2",)),
    )


CLIP_RULES = (
    Rule(r"visual\.embed\.weight", ("vision_model.embeddings.patch_embedding.weight",)),
    Rule(r"visual\.embed\.prefix", ("vision_model.embeddings.class_embedding",), VECTOR),
    Rule(r"visual\.embed\.position", ("vision_model.embeddings.position_embedding.weight",)),
    Rule(r"visual\.norm_pre\.(.*)", (r"vision_model.pre_layrnorm.\1",)),
    *_clip_layers("visual.", "vision_model."),
    Rule(r"visual\.norm\.(.*)", (r"vision_model.post_layernorm.\1",)),
    Rule(r"visual\.head\.weight", ("visual_projection.weight",)),
    Rule(r"text\.embed\.weight", ("text_model.embeddings.token_embedding.weight",)),
    Rule(r"text\.embed\.position", ("text_model.embeddings.position_embedding.weight",)),
    *_clip_layers("text.", "text_model."),
    Rule(r"text\.norm\.(.*)", (r"text_model.final_layer_norm.\1",)),
    Rule(r"text\.head\.weight", ("text_projection.weight",)),
    Rule(r"logit_scale", ("logit_scale",)),
)
CLIP_IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)


def _vit(blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        Rule(r"embed\.(weight|bias)", (r"vit.embeddings.patch_embeddings.projection.\1",)),
        Rule(r"embed\.prefix", ("vit.embeddings.cls_token",), BATCH_OF_ONE),
        Rule(r"embed\.position", ("vit.embeddings.position_embeddings",), BATCH_OF_ONE),
        *blocks,
        Rule(r"norm\.(.*)", (r"vit.layernorm.\1",)),
        Rule(r"head\.(.*)", (r"classifier.\1",)),
    )


_OURS, _FILE, _MODEL = r"blocks\.(\d+)\.", r"vit.encoder.layer.\1.", r"vit.layers.\1."

VIT_RULES = _vit(
    (
        Rule(_OURS + r"norm1\.(.*)", (_FILE + r"layernorm_before.\2",)),
        Rule(_OURS + r"norm2\.(.*)", (_FILE + r"layernorm_after.\2",)),
        Rule(
            _OURS + r"attn\.qkv\.(.*)",
            tuple(_FILE + rf"attention.attention.{x}.\2" for x in ("query", "key", "value")),
            stacked(3),
        ),
        Rule(_OURS + r"attn\.proj\.(.*)", (_FILE + r"attention.output.dense.\2",)),
        Rule(_OURS + r"mlp\.fc1\.(.*)", (_FILE + r"intermediate.dense.\2",)),
        Rule(_OURS + r"mlp\.fc2\.(.*)", (_FILE + r"output.dense.\2",)),
    )
)
VIT_MODEL_RULES = _vit(
    (
        Rule(_OURS + r"norm1\.(.*)", (_MODEL + r"layernorm_before.\2",)),
        Rule(_OURS + r"norm2\.(.*)", (_MODEL + r"layernorm_after.\2",)),
        Rule(
            _OURS + r"attn\.qkv\.(.*)", tuple(_MODEL + rf"attention.{x}_proj.\2" for x in "qkv"), stacked(3)
        ),
        Rule(_OURS + r"attn\.proj\.(.*)", (_MODEL + r"attention.o_proj.\2",)),
        Rule(_OURS + r"(mlp\.fc[12]\..*)", (_MODEL + r"\2",)),
    )
)


def _resnet_stages() -> tuple[Rule, ...]:
    rules: list[Rule] = []
    a, b = r"stages\.(\d+)\.(\d+)\.", r"resnet.encoder.stages.\1.layers.\2."
    for ours, theirs in (("conv", "convolution"), ("bn", "normalization")):
        rules.append(Rule(a + rf"downsample\.{ours}\.(.*)", (b + rf"shortcut.{theirs}.\3",)))
        for i in range(3):
            rules.append(Rule(a + rf"{ours}{i + 1}\.(.*)", (b + rf"layer.{i}.{theirs}.\3",)))
    return tuple(rules)


RESNET_RULES = (
    Rule(r"stem\.conv\.(.*)", (r"resnet.embedder.embedder.convolution.\1",)),
    Rule(r"stem\.bn\.(.*)", (r"resnet.embedder.embedder.normalization.\1",)),
    *_resnet_stages(),
    Rule(r"head\.(.*)", (r"classifier.1.\1",)),
)
