"""The names of BEiT in timm, in its authors' files and in transformers."""

from __future__ import annotations

from torch import nn

from pymm.interop.rules import BATCH_OF_ONE, KeyMap, Rule, stacked
from pymm.models.beit import BEiT

# What predicts the tokens of hidden patches belongs to the objective; indices are not learned.
_IGNORED = (r"lm_head\..*", r"(beit\.embeddings\.)?mask_token", r".*relative_position_index")

_AUTHORS = (
    Rule(r"embed\.(weight|bias)", (r"patch_embed.proj.\1",)),
    Rule(r"embed\.prefix", ("cls_token",), BATCH_OF_ONE),
    Rule(r"blocks\.(\d+)\.attn\.qkv\.weight", (r"blocks.\1.attn.qkv.weight",)),
    Rule(r"blocks\.(\d+)\.attn\.qkv\.([qv])_bias", (r"blocks.\1.attn.\2_bias",)),
    Rule(r"blocks\.(\d+)\.scale([12])", (r"blocks.\1.gamma_\2",)),
    Rule(r"pool\.norm\.(.*)", (r"fc_norm.\1",)),
    Rule(r"((?:blocks|norm|head)\..*)", (r"\1",)),
)
_AUTHORS_APART = Rule(r"biases\.(\d+)\.table", (r"blocks.\1.attn.relative_position_bias_table",))
_AUTHORS_SHARED = Rule(r"biases\.0\.table", ("rel_pos_bias.relative_position_bias_table",))

_OURS, _TABLE = r"blocks\.(\d+)\.", "relative_position_bias.relative_position_bias_table"
_FILE, _MODEL = r"beit.encoder.layer.\1.", r"beit.layers.\1."


def _file_blocks() -> tuple[Rule, ...]:
    inner = _FILE + "attention.attention."
    three = tuple(inner + f"{name}.weight" for name in ("query", "key", "value"))
    return (
        Rule(_OURS + r"attn\.qkv\.weight", three, stacked(3)),
        Rule(_OURS + r"attn\.qkv\.q_bias", (inner + "query.bias",)),
        Rule(_OURS + r"attn\.qkv\.v_bias", (inner + "value.bias",)),
        Rule(_OURS + r"attn\.proj\.(.*)", (_FILE + r"attention.output.dense.\2",)),
        Rule(_OURS + r"mlp\.fc1\.(.*)", (_FILE + r"intermediate.dense.\2",)),
        Rule(_OURS + r"mlp\.fc2\.(.*)", (_FILE + r"output.dense.\2",)),
    )


def _model_blocks() -> tuple[Rule, ...]:
    three = tuple(_MODEL + f"attention.{x}_proj.weight" for x in "qkv")
    return (
        Rule(_OURS + r"attn\.qkv\.weight", three, stacked(3)),
        Rule(_OURS + r"attn\.qkv\.([qv])_bias", (_MODEL + r"attention.\2_proj.bias",)),
        Rule(_OURS + r"attn\.proj\.(.*)", (_MODEL + r"attention.o_proj.\2",)),
        Rule(_OURS + r"(mlp\.fc[12]\..*)", (_MODEL + r"\2",)),
    )


def _transformers(block: str, blocks: tuple[Rule, ...]) -> tuple[Rule, ...]:
    return (
        Rule(r"embed\.(weight|bias)", (r"beit.embeddings.patch_embeddings.projection.\1",)),
        Rule(r"embed\.prefix", ("beit.embeddings.cls_token",), BATCH_OF_ONE),
        Rule(_OURS + r"norm1\.(.*)", (block + r"layernorm_before.\2",)),
        Rule(_OURS + r"norm2\.(.*)", (block + r"layernorm_after.\2",)),
        *blocks,
        Rule(_OURS + r"scale([12])", (block + r"lambda_\2",)),
        Rule(r"norm\.(.*)", (r"layernorm.\1",)),
        Rule(r"pool\.norm\.(.*)", (r"beit.pooler.layernorm.\1",)),
        Rule(r"head\.(.*)", (r"classifier.\1",)),
    )


def _is_shared(model: nn.Module) -> bool:
    assert isinstance(model, BEiT)
    return len(model.biases) == 1


def _is_apart(model: nn.Module) -> bool:
    return not _is_shared(model)


def _never(model: nn.Module) -> bool:
    return False


_APART = Rule(r"biases\.(\d+)\.table", (rf"beit.encoder.layer.\1.attention.attention.{_TABLE}",))
_SHARED = Rule(r"biases\.0\.table", (f"beit.encoder.{_TABLE}",))
_APART_MODEL = Rule(r"biases\.(\d+)\.table", (rf"beit.layers.\1.{_TABLE}",))
_SHARED_MODEL = Rule(r"biases\.0\.table", ("beit.shared_position_bias.relative_position_bias_table",))


def _layouts(
    donors: tuple[str, ...], rules: tuple[Rule, ...], apart: Rule, shared: Rule, variant: str = ""
) -> tuple[KeyMap, KeyMap]:
    """The maps of one set of names, for a bias in each block and for one that all blocks share."""
    with_shared = ", ".join(filter(None, (variant, "a shared bias")))
    return (
        KeyMap(donors, BEiT, (*rules, apart), variant, _IGNORED, _is_apart),
        KeyMap(donors, BEiT, (*rules, shared), with_shared, _IGNORED, _is_shared),
    )


MAPS = (
    *_layouts(("timm", "BEiT's authors"), _AUTHORS, _AUTHORS_APART, _AUTHORS_SHARED),
    *_layouts(("transformers",), _transformers(_FILE, _file_blocks()), _APART, _SHARED),
    *_layouts(
        ("transformers",),
        _transformers(_MODEL, _model_blocks()),
        _APART_MODEL,
        _SHARED_MODEL,
        "as its models have it",
    ),
    # Each block of a classifier begins with the bias that pretraining had for all of them.
    KeyMap(
        ("pymm",),
        BEiT,
        (
            Rule(r"biases\.\d+\.table", ("biases.0.table",)),
            Rule(r"pool\.norm\.(.*)", (r"norm.\1",)),
            Rule(r"((?:embed|blocks)\..*)", (r"\1",)),
        ),
        variant="a pretrained BEiT",
        fits=_never,
    ),
)
