"""Reports of `load_state`, without any donor installed."""

from __future__ import annotations

import pytest
import torch

import pymm
from pymm.interop import load_state, to_donor


def test_own_checkpoint() -> None:
    source, target = pymm.create_model("clip_tiny"), pymm.create_model("clip_tiny")
    report = load_state(target, source.state_dict())
    assert report.complete
    assert report.donor == "pymm"
    assert len(report.placed) == len(source.state_dict())
    for name, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[name], value), name


def test_into_a_model_on_the_meta_device() -> None:
    source = pymm.create_model("resnet18", num_classes=3)
    with torch.device("meta"):
        target = pymm.create_model("resnet18", num_classes=3)
    assert load_state(target, source.state_dict()).complete
    pixels = torch.randn(1, 3, 64, 64)
    assert torch.equal(target.eval()(pixels), source.eval()(pixels))


def test_report_names_what_has_no_place() -> None:
    source = pymm.create_model("vit_tiny_patch16_224", image_size=32, num_classes=3)
    state = source.state_dict()
    del state["blocks.4.mlp.fc1.bias"]
    state["teacher.weight"] = torch.zeros(2)
    target = pymm.create_model("vit_tiny_patch16_224", image_size=64, num_classes=5)
    before = target.state_dict()["head.weight"].clone()
    report = load_state(target, state)
    assert not report.complete
    assert report.missing == ("blocks.4.mlp.fc1.bias",)
    assert report.unused == ("teacher.weight",)
    assert report.resampled == ("embed.position",)
    assert report.mismatched == (
        "head.weight: expected (5, 192), got (3, 192)",
        "head.bias: expected (5,), got (3,)",
    )
    assert torch.equal(target.state_dict()["head.weight"], before)
    assert "unused: teacher.weight" in str(report)


def test_other_type_is_cast() -> None:
    source = pymm.create_model("resnet18", num_classes=0).half()
    target = pymm.create_model("resnet18", num_classes=0)
    assert load_state(target, source.state_dict()).complete
    assert {p.dtype for p in target.parameters()} == {torch.float32}


@pytest.mark.parametrize("state", [{}, {"a.weight": torch.zeros(1), "b": torch.zeros(1)}])
def test_unknown_donor(state: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="load_state: state must be a state dict for CLIP, got the names"):
        load_state(pymm.create_model("clip_tiny"), state)


def test_own_names_are_no_donors() -> None:
    model = pymm.create_model("clip_rn_tiny")
    with pytest.raises(ValueError, match="to_donor: donor must be of such a model, got 'open_clip'"):
        to_donor(model, "open_clip")
    with pytest.raises(
        ValueError, match="to_donor: donor must be one of timm, torchvision, transformers for"
    ):
        to_donor(pymm.create_model("vit_tiny_patch16_224"), "keras")
