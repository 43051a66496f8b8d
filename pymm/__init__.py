"""Vision-language models on fused kernels."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymm.interop.accelerate import accelerate, restore
    from pymm.interop.checkpoint import load
    from pymm.models import create_model, list_models

__version__ = "0.1.0"

# Loaded on first use, so that `import pymm` is light.
_LAZY = {
    "accelerate": "pymm.interop.accelerate",
    "create_model": "pymm.models",
    "list_models": "pymm.models",
    "load": "pymm.interop.checkpoint",
    "restore": "pymm.interop.accelerate",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])


__all__ = ["__version__", "accelerate", "create_model", "list_models", "load", "restore"]
