"""pymm's attention behind the attention interface of transformers."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from pymm import ops

NAME = "pymm"


def _configs(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Configurations of a model and its parts, each once, behind the name of the first module with it."""
    seen = set()
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and id(config) not in seen:
            seen.add(id(config))
            yield name, config


def swap(model: nn.Module, changed: dict[str, str], left: dict[str, str]) -> None:
    """Choose pymm's attention where the model has SDPA's."""
    if "transformers" not in sys.modules:
        return
    for name, config in _configs(model):
        before = config._attn_implementation_internal
        if before == "sdpa":
            _register()
            config._attn_implementation_internal = NAME
            changed[f"{name}.config" if name else "config"] = "attention"
        elif before is not None:
            left[f"{name}.config" if name else "config"] = f"the model is set to the attention {before!r}"


def restore(model: nn.Module) -> None:
    for _, config in _configs(model):
        if config._attn_implementation_internal == NAME:
            config._attn_implementation_internal = "sdpa"


def _register() -> None:
    masking = importlib.import_module("transformers.masking_utils")
    importlib.import_module("transformers").AttentionInterface.register(NAME, attention)
    masking.AttentionMaskInterface.register(NAME, masking.sdpa_mask)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: `(B, H, T, D)` in, `(B, T, H, D)` out; anything unusual goes to SDPA's."""
    more = {k: v for k, v in kwargs.items() if v is not None and k in ("position_bias", "cache", "softcap")}
    groups = getattr(module, "num_key_value_groups", 1)
    if more or query.shape[0] != key.shape[0]:
        sdpa = importlib.import_module("transformers.integrations.sdpa_attention")
        return sdpa.sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(causal) and attention_mask is None and query.shape[2] > 1
    out = ops.attention(query, key, value, attention_mask, dropout, causal, scaling, enable_gqa=groups > 1)
    return out.transpose(1, 2), None  # which is dense as it is
