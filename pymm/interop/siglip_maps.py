"""The names of SigLIP in transformers, of both towers and of the image tower alone."""

from __future__ import annotations

from torch import nn

from pymm.interop.rules import BATCH_OF_ONE, Form, KeyMap, Rule, behind
from pymm.interop.transformers_maps import clip_layers
from pymm.interop.vit_maps import pools_by_attention
from pymm.models.clip import CLIP
from pymm.models.siglip import SigLIPText
from pymm.models.vit import VisionTransformer

# A number is a vector of one there.
_NUMBER = Form(lambda tensors: tensors[0][0] if tensors[0].shape == (1,) else tensors[0], lambda t: [t[None]])

_IMAGE = (
    Rule(r"embed\.(weight|bias)", (r"embeddings.patch_embedding.\1",)),
    Rule(r"embed\.position", ("embeddings.position_embedding.weight",)),
    *clip_layers("", ""),
    Rule(r"norm\.(.*)", (r"post_layernorm.\1",)),
    Rule(r"pool\.probe", ("head.probe",), BATCH_OF_ONE),
    Rule(r"pool\.qkv\.(.*)", (r"head.attention.in_proj_\1",)),
    Rule(r"pool\.proj\.(.*)", (r"head.attention.out_proj.\1",)),
    Rule(r"pool\.norm\.(.*)", (r"head.layernorm.\1",)),
    Rule(r"pool\.(mlp\..*)", (r"head.\1",)),
)
_TEXT = (
    Rule(r"embed\.weight", ("embeddings.token_embedding.weight",)),
    Rule(r"embed\.position", ("embeddings.position_embedding.weight",)),
    *clip_layers("", ""),
    Rule(r"norm\.(.*)", (r"final_layer_norm.\1",)),
    Rule(r"head\.(.*)", (r"head.\1",)),
)
_BOTH = (
    *behind("visual.", "vision_model.", _IMAGE),
    *behind("text.", "text_model.", _TEXT),
    Rule(r"(logit_scale|logit_bias)", (r"\1",), _NUMBER),
)
_POSITIONS = r"((text|vision)_model\.)?embeddings\.position_ids"
# The last layer of the text tower in open_clip, which is a matrix in its other towers.
OPEN_CLIP_HEAD = Rule(r"text\.head\.(.*)", (r"text.text_projection.\1",))


def is_siglip(model: nn.Module) -> bool:
    return isinstance(model, CLIP) and pools_by_attention(model.visual) and isinstance(model.text, SigLIPText)


MAPS = (
    KeyMap(("transformers",), CLIP, _BOTH, variant="SigLIP", ignored=(_POSITIONS,), fits=is_siglip),
    KeyMap(
        ("transformers",),
        VisionTransformer,
        behind("", "vision_model.", _IMAGE),
        variant="SigLIP's image tower",
        # What a file of both towers holds more.
        ignored=(_POSITIONS, r"text_model\..*", "logit_scale", "logit_bias"),
        fits=pools_by_attention,
    ),
    KeyMap(
        ("transformers",),
        VisionTransformer,
        _IMAGE,
        variant="SigLIP's image tower as its models have it",
        ignored=(_POSITIONS,),
        fits=pools_by_attention,
    ),
)
