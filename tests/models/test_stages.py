from __future__ import annotations

import pytest
import torch
from torch import nn

from pymm.models import CLIP, create_model, list_models
from pymm.models.stages import parameter_stages


def image_model(name: str) -> nn.Module:
    """A model, or the image tower of a CLIP, without memory for its weights."""
    with torch.device("meta"):
        whole = create_model(name)
    return whole.visual if isinstance(whole, CLIP) else whole


def classifies(name: str) -> bool:
    """Whether the model has a head of its own, and so can be transferred; a MAE hands on its encoder."""
    return hasattr(image_model(name), "reset_classifier")


@pytest.mark.parametrize("name", filter(classifies, list_models()))
def test_every_parameter_is_in_one_stage_and_the_order_is_that_of_the_forward(name: str) -> None:
    model = image_model(name)
    stages = parameter_stages(model)
    assert sorted(n for stage in stages for n in stage) == sorted(n for n, _ in model.named_parameters())
    head = [n for n, _ in model.named_parameters() if n.startswith("head.")]
    assert set(head) <= set(stages[-1])
    assert all(stages[:-1])


@pytest.mark.parametrize(
    ("name", "size"), [("clip_tiny", 16), ("resnet18", 32), ("vgg_tiny", 32), ("lenet5", 32)]
)
def test_an_earlier_stage_is_nearer_to_the_pixels(name: str, size: int) -> None:
    """A gradient that stops at the input of a stage reaches the later ones only."""
    whole = create_model(name)
    model = whole.visual if isinstance(whole, CLIP) else whole
    stages = parameter_stages(model)
    for frozen in range(1, len(stages)):
        model.zero_grad()
        model.requires_grad_(True)
        for stage in stages[:frozen]:
            for n in stage:
                model.get_parameter(n).requires_grad_(False)
        pixels = torch.rand(2, len(model.mean), size, size)
        loss = model(pixels).square().sum()
        # Nothing in front of the first trainable stage is part of the graph.
        leaves: set[int] = set()
        todo, seen = [loss.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaves |= {id(node.variable)} if hasattr(node, "variable") else set()
            todo += [following for following, _ in node.next_functions]
        reached = {n for n, p in model.named_parameters() if id(p) in leaves}
        assert reached == {n for stage in stages[frozen:] for n in stage}


def test_a_model_without_stages_and_one_that_forgets_a_parameter() -> None:
    class Forgets(nn.Linear):
        def stage_names(self) -> list[tuple[str, ...]]:
            return [("weight",)]

    with pytest.raises(ValueError, match=r"model must be one with stage_names\(\), got Linear"):
        parameter_stages(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="hold every parameter once, got bias in 0 of Forgets"):
        parameter_stages(Forgets(1, 1))
