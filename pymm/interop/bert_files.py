"""What stands beside a BERT's tensors: sizes that no shape shows, and how its tokens become one vector."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from pymm.interop.files import read_json
from pymm.layers import MLP
from pymm.models.bert import Bert, BertSpec, ClassVector, MeanVector, Pooling, PostNormBlock, read_config
from pymm.ops._checks import fail
from pymm.ops.linear import Activation

# What `pymm.interop.save` writes of a BERT into the metadata of its file.
METADATA = "bert"
_POOLINGS: dict[str, Pooling] = {"pooling_mode_cls_token": "class", "pooling_mode_mean_tokens": "mean"}


def sentence_encoder(folder: Path) -> tuple[Path, Pooling] | None:
    """The folder of the transformer and the pooling, where sentence-transformers wrote the folder.

    Raises:
        ValueError: when its modules are others than a transformer, a pooling that is here, and a
            normalization, which changes no direction.
    """
    if not (folder / "modules.json").is_file():
        return None
    modules = read_json(folder / "modules.json")
    expected = "a sentence encoder of a Transformer, a Pooling and at most a Normalize"
    try:
        places = {str(m["type"]).rpartition(".")[2]: str(m["path"]) for m in modules}
    except (TypeError, KeyError):
        fail("load", "path", expected, f"the modules {str(modules)[:80]}")
    inside = all(Path(place).name == place for place in places.values())
    if places.keys() - {"Normalize"} != {"Transformer", "Pooling"} or not inside:
        fail("load", "path", expected, ", ".join(f"{kind} in {place!r}" for kind, place in places.items()))
    config = read_json(folder / places["Pooling"] / "config.json")
    flags = config if isinstance(config, dict) else {}
    modes = sorted(name for name, on in flags.items() if name.startswith("pooling_mode_") and on is True)
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        got = ", ".join(modes) or "none"
        fail("load", "path", f"a sentence encoder with one of {', '.join(_POOLINGS)}", got)
    return folder / places["Transformer"], _POOLINGS[modes[0]]


def sizes(row: BertSpec, values: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Where a checkpoint of a BERT differs from the row that it fits.

    Args:
        row: the row.
        values: the checkpoint under our names.
        config: transformers' configuration, with a sentence encoder's `"pooling"` and what `facts` wrote.

    Raises:
        ValueError: when the configuration is that of another kind of model, or says what is not here.
    """
    shapes = (("vocab_size", "embed.weight"), ("context_length", "embed.position"), ("types", "types"))
    found: dict[str, Any] = {size: values[name].shape[0] for size, name in shapes if name in values}
    if "model_type" in config:
        theirs = read_config(config)
        found |= {"heads": theirs.heads, "activation": theirs.activation, "eps": theirs.eps}
    if row.pooling == "pooler" and "pool.dense.weight" not in values:
        found["pooling"] = "class"
    if "pooling" in config:
        found["pooling"] = config["pooling"]
    return found | config.get(METADATA, {})


def facts(model: Bert) -> str:
    """What no shape shows of a BERT, as text for a file's metadata."""
    block = model.blocks[0]
    assert isinstance(block, PostNormBlock)
    assert isinstance(block.mlp, MLP)
    pooling = {ClassVector: "class", MeanVector: "mean"}.get(type(model.pool), "pooler")
    said = {
        "pooling": pooling,
        "heads": block.attn.heads,
        "activation": block.mlp.fc1.activation,
        "eps": block.norm1.eps,
    }
    return json.dumps(said)


def read_facts(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What `facts` wrote.

    Raises:
        ValueError: when the metadata hold something else.
    """
    if METADATA not in metadata:
        return {}
    try:
        said = json.loads(metadata[METADATA])
        known = {name: said[name] for name in _FACTS}
    except (KeyError, TypeError, ValueError):
        known = {}
    if not known or not all(fits(known[name]) for name, fits in _FACTS.items()):
        fail("load", "path", f"a file whose metadata {METADATA!r} are sizes", metadata[METADATA][:80])
    return {METADATA: known}


_FACTS: dict[str, Callable[[Any], bool]] = {
    "pooling": lambda value: value in get_args(Pooling),
    "heads": lambda value: isinstance(value, int) and value > 0,
    "activation": lambda value: value in get_args(Activation),
    "eps": lambda value: isinstance(value, float) and value > 0,
}
