"""The names of residual blocks, which several libraries share."""

from __future__ import annotations

import re

from pymm.interop.rules import Rule


def residual_stages(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Residual blocks with the names of torchvision, timm and OpenAI's CLIP, behind the two prefixes."""
    rules: list[Rule] = []
    for i in range(4):
        a, b = rf"{re.escape(ours)}stages\.{i}\.(\d+)\.", rf"{theirs}layer{i + 1}.\1."
        rules += [
            Rule(a + r"downsample\.conv\.(.*)", (b + r"downsample.0.\2",)),
            Rule(a + r"downsample\.bn\.(.*)", (b + r"downsample.1.\2",)),
            Rule(a + r"((?:conv|bn)\d\..*)", (b + r"\2",)),
        ]
    return tuple(rules)
