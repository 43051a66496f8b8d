"""The names of transformers, as its files have them and, where that differs, as its models do."""

from __future__ import annotations

import re

from pymm.interop.rules import BATCH_OF_ONE, VECTOR, Rule, stacked


def clip_layers(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The blocks of its CLIP and SigLIP, behind the two prefixes."""
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
    *clip_layers("visual.", "vision_model."),
    Rule(r"visual\.norm\.(.*)", (r"vision_model.post_layernorm.\1",)),
    Rule(r"visual\.head\.weight", ("visual_projection.weight",)),
    Rule(r"text\.embed\.weight", ("text_model.embeddings.token_embedding.weight",)),
    Rule(r"text\.embed\.position", ("text_model.embeddings.position_embedding.weight",)),
    *clip_layers("text.", "text_model."),
    Rule(r"text\.norm\.(.*)", (r"text_model.final_layer_norm.\1",)),
    Rule(r"text\.head\.weight", ("text_projection.weight",)),
    Rule(r"logit_scale", ("logit_scale",)),
)
CLIP_IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)


def vit_embed(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The patch embedding of its vision transformers, behind the two prefixes."""
    return (
        Rule(ours + r"embed\.(weight|bias)", (theirs + r"embeddings.patch_embeddings.projection.\1",)),
        Rule(ours + r"embed\.prefix", (theirs + "embeddings.cls_token",), BATCH_OF_ONE),
        Rule(ours + r"embed\.position", (theirs + "embeddings.position_embeddings",), BATCH_OF_ONE),
    )


def vit_file_blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The blocks of its vision transformers in its files, behind prefixes that end before the number."""
    a, b = ours + r"(\d+)\.", theirs + r"\1."
    three = tuple(b + rf"attention.attention.{x}.\2" for x in ("query", "key", "value"))
    return (
        Rule(a + r"norm1\.(.*)", (b + r"layernorm_before.\2",)),
        Rule(a + r"norm2\.(.*)", (b + r"layernorm_after.\2",)),
        Rule(a + r"attn\.qkv\.(weight|bias)", three, stacked(3)),
        Rule(a + r"attn\.proj\.(.*)", (b + r"attention.output.dense.\2",)),
        Rule(a + r"mlp\.fc1\.(.*)", (b + r"intermediate.dense.\2",)),
        Rule(a + r"mlp\.fc2\.(.*)", (b + r"output.dense.\2",)),
    )


def vit_model_blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The same blocks in its models."""
    a, b = ours + r"(\d+)\.", theirs + r"\1."
    three = tuple(b + rf"attention.{x}_proj.\2" for x in "qkv")
    return (
        Rule(a + r"norm1\.(.*)", (b + r"layernorm_before.\2",)),
        Rule(a + r"norm2\.(.*)", (b + r"layernorm_after.\2",)),
        Rule(a + r"attn\.qkv\.(weight|bias)", three, stacked(3)),
        Rule(a + r"attn\.proj\.(.*)", (b + r"attention.o_proj.\2",)),
        Rule(a + r"(mlp\.fc[12]\..*)", (b + r"\2",)),
    )


def _vit(prefix: str, blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        *vit_embed("", prefix),
        *blocks,
        Rule(r"norm\.(.*)", (prefix + r"layernorm.\1",)),
        Rule(r"head\.(.*)", (r"classifier.\1",)),
    )


VIT_RULES = _vit("vit.", vit_file_blocks(r"blocks\.", "vit.encoder.layer."))
VIT_MODEL_RULES = _vit("vit.", vit_model_blocks(r"blocks\.", "vit.layers."))
VIT_HEADLESS_RULES = _vit("", vit_file_blocks(r"blocks\.", "encoder.layer."))


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
