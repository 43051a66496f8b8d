"""The names of masked autoencoders in transformers and in their authors' files."""

from __future__ import annotations

from torch import nn

from pymm.interop.rules import BATCH_OF_ONE, Form, KeyMap, Rule
from pymm.interop.transformers_maps import vit_embed, vit_file_blocks, vit_model_blocks
from pymm.models.mae import MAE
from pymm.models.vit import VisionTransformer

TOKEN = Form(lambda tensors: tensors[0].flatten(), lambda t: [t[None, None]])

_ENCODER, _DECODER = r"encoder\.blocks\.", r"decoder\.blocks\."


def _transformers(*blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        *vit_embed(r"encoder\.", "vit."),
        *(rule for rules in blocks for rule in rules),
        Rule(r"encoder\.norm\.(.*)", (r"vit.layernorm.\1",)),
        Rule(r"decoder\.mask_token", ("decoder.mask_token",), TOKEN),
        Rule(r"decoder\.position", ("decoder.decoder_pos_embed",), BATCH_OF_ONE),
        Rule(r"decoder\.(embed|norm)\.(.*)", (r"decoder.decoder_\1.\2",)),
        Rule(r"decoder\.head\.(.*)", (r"decoder.decoder_pred.\1",)),
    )


_AUTHORS = (
    Rule(r"encoder\.embed\.(weight|bias)", (r"patch_embed.proj.\1",)),
    Rule(r"encoder\.embed\.prefix", ("cls_token",), BATCH_OF_ONE),
    Rule(r"encoder\.embed\.position", ("pos_embed",), BATCH_OF_ONE),
    Rule(r"encoder\.((?:blocks|norm)\..*)", (r"\1",)),
    Rule(r"decoder\.mask_token", ("mask_token",), TOKEN),
    Rule(r"decoder\.position", ("decoder_pos_embed",), BATCH_OF_ONE),
    Rule(r"decoder\.(embed|norm|blocks)\.(.*)", (r"decoder_\1.\2",)),
    Rule(r"decoder\.head\.(.*)", (r"decoder_pred.\1",)),
)


def _never(model: nn.Module) -> bool:
    return False


MAPS = (
    KeyMap(
        ("transformers",),
        MAE,
        _transformers(
            vit_file_blocks(_ENCODER, "vit.encoder.layer."),
            vit_file_blocks(_DECODER, "decoder.decoder_layers."),
        ),
    ),
    KeyMap(
        ("transformers",),
        MAE,
        _transformers(
            vit_file_blocks(_ENCODER, "vit.encoder.layer."),
            vit_file_blocks(_DECODER, "decoder.decoder_encoder.layer."),
        ),
        variant="as its version 5 saves it",
    ),
    KeyMap(
        ("transformers",),
        MAE,
        _transformers(
            vit_model_blocks(_ENCODER, "vit.layers."), vit_model_blocks(_DECODER, "decoder.decoder_layers.")
        ),
        variant="as its models have it",
    ),
    KeyMap(("MAE's authors",), MAE, _AUTHORS),
    # The encoder becomes a classifier; its final norm goes where the classifier has one.
    KeyMap(
        ("pymm",),
        VisionTransformer,
        (
            Rule(r"pool\.norm\.(.*)", (r"encoder.norm.\1",)),
            Rule(r"((?:embed|blocks|norm)\..*)", (r"encoder.\1",)),
        ),
        variant="the encoder of a masked autoencoder",
        ignored=(r"decoder\..*",),
        fits=_never,
    ),
)
