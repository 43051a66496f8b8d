"""Errors of the data layer: one sentence that names where, argument, expected and got."""

from __future__ import annotations

from typing import NoReturn


def fail(where: str, argument: str, expected: str, got: object) -> NoReturn:
    """Raise the ValueError that every wrong argument ends in."""
    raise ValueError(f"{where}: {argument} must be {expected}, got {got}")
