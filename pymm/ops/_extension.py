"""The compiled extension: loaded once, absent without harm, and never silently."""

from __future__ import annotations

import importlib
from types import ModuleType

EXTENSION: ModuleType | None
PROBLEM: str | None

try:
    EXTENSION = importlib.import_module("pymm._C")
    PROBLEM = None
except ImportError as error:
    EXTENSION = None
    PROBLEM = (
        f"the C++ extension pymm._C does not load ({error}); "
        "reinstall with: pip install --force-reinstall --no-deps ."
    )


def require_extension() -> ModuleType:
    """The extension, or RuntimeError saying why there is none."""
    if EXTENSION is None:
        raise RuntimeError(PROBLEM)
    return EXTENSION
