"""The order of a model's parameters, for freezing its beginning and for layer-wise learning rates."""

from __future__ import annotations

from typing import Any

from torch import nn

from pymm.ops._checks import fail


def parameter_stages(model: nn.Module) -> list[list[str]]:
    """The names of a model's parameters by stage, from the pixels to the head, which is in the last.

    An image model declares its stages in a method `stage_names()`: for each stage the names of modules or
    parameters that make it. CLIP's image tower is such a model, CLIP itself is not.

    Raises:
        ValueError: when the model declares none, or a parameter is in no stage or in two.
    """
    declare: Any = getattr(model, "stage_names", None)
    if declare is None:
        fail("parameter_stages", "model", "one with stage_names()", type(model).__name__)
    declared = declare()
    stages: list[list[str]] = [[] for _ in declared]
    for name, _ in model.named_parameters():
        found = [
            i
            for i, names in enumerate(declared)
            for part in names
            if name == part or name.startswith(f"{part}.")
        ]
        if len(found) != 1:
            expected = "one whose stage_names() hold every parameter once"
            fail("parameter_stages", "model", expected, f"{name} in {len(found)} of {type(model).__name__}")
        stages[found[0]].append(name)
    return stages
