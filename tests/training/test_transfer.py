"""Weights from a checkpoint, frozen stages, and rates, for every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pymm.models import CLIP, create_model
from pymm.models.stages import parameter_stages
from pymm.training.errors import SettingsError
from pymm.training.transfer import build_backbone, build_from, freeze, learning_rates

FAMILIES = ["lenet5", "lenet5_1998", "alexnet_tiny", "vgg_tiny", "resnet18", "clip_tiny", "clip_rn_tiny"]


def filled(model: nn.Module, value: float = 0.5) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(t, value) for name, t in model.state_dict().items()}


def body(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t for name, t in model.state_dict().items() if not name.startswith("head.")}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_body_loads_and_a_head_of_other_classes_is_new(name: str, tmp_path: Path) -> None:
    donor, file = build_backbone(name, 7), tmp_path / "donor.safetensors"
    save_file(filled(donor), file)
    model, report = build_from(name, 4, file)
    assert all((t == torch.full_like(t, 0.5)).all() for t in body(model).values())
    drawn = build_backbone(name, 4)
    for key, t in model.state_dict().items():
        if key.startswith("head."):
            assert torch.equal(t, drawn.state_dict()[key]), "drawn from the seed"
    same, report = build_from(name, 7, file)
    assert report.complete
    assert all((t == torch.full_like(t, 0.5)).all() for t in same.state_dict().values())


@pytest.mark.parametrize("name", ["clip_tiny", "clip_rn_tiny"])
def test_the_image_tower_of_a_clip(name: str, tmp_path: Path) -> None:
    whole, file = create_model(name), tmp_path / "clip.safetensors"
    assert isinstance(whole, CLIP)
    save_file(whole.state_dict(), file)
    # As many classes as the projection has rows: it is no classifier all the same.
    for classes in (5, whole.embed_dim):
        model, _ = build_from(name, classes, file)
        own = whole.visual.state_dict()
        assert all(torch.equal(t, own[key]) for key, t in body(model).items())
        assert model.head.bias is not None
        assert model(torch.rand(1, 3, 48, 48)).shape == (1, classes)


def test_a_checkpoint_that_contains_the_model(tmp_path: Path) -> None:
    state = filled(build_backbone("vgg_tiny", 3))
    decoder = {"decoder.weight": torch.zeros(2, 2)}
    save_file({f"encoder.{name}": t for name, t in state.items()} | decoder, tmp_path / "a.safetensors")
    model, _ = build_from("vgg_tiny", 9, tmp_path / "a.safetensors")
    assert all((t == torch.full_like(t, 0.5)).all() for t in body(model).values())


def test_anothers_names(tmp_path: Path) -> None:
    """torchvision's names of a ResNet-18, made from ours, in a file that torch.save wrote."""
    ours, theirs = filled(build_backbone("resnet18", 1000)), {}
    for name, t in ours.items():
        name = name.replace("stem.conv", "conv1").replace("stem.bn", "bn1").replace("head", "fc")
        for i in range(4):
            name = name.replace(f"stages.{i}.", f"layer{i + 1}.")
        theirs[name.replace("downsample.conv", "downsample.0").replace("downsample.bn", "downsample.1")] = t
    torch.save(theirs, tmp_path / "resnet18.pth")
    model, report = build_from("resnet18", 10, tmp_path / "resnet18.pth")
    assert "torchvision" in report.donor
    assert all((t == torch.full_like(t, 0.5)).all() for t in body(model).values())


def test_another_resolution_resamples_positions(tmp_path: Path) -> None:
    save_file(build_backbone("clip_tiny", 3).state_dict(), tmp_path / "a.safetensors")
    model, report = build_from("clip_tiny", 3, tmp_path / "a.safetensors", image_size=64)
    assert report.resampled == ("embed.position",)
    assert model.image_size == 64


def test_what_is_wrong_with_a_checkpoint_is_one_line(tmp_path: Path) -> None:
    def attempt(
        state: Any, message: str, name: str = "vgg_tiny", error: type[Exception] = SettingsError
    ) -> None:
        save_file(state, tmp_path / "a.safetensors")
        with pytest.raises(error, match=message) as raised:
            build_from(name, 3, tmp_path / "a.safetensors")
        assert "\n" not in str(raised.value)

    good = build_backbone("vgg_tiny", 3).state_dict()
    some = {name: t for name, t in good.items() if not name.startswith("stages.2.")}
    attempt(some, r"which lacks 6 of \d+ tensors \(first stages.2")
    attempt(good | {"mlp.fc1.weight": torch.zeros(2, 2)}, r"lacks 1 of \d+ tensors \(first mlp.fc1.weight")
    attempt(good | {"mlp.fc1.bias": torch.full((64,), torch.nan)}, "NaN or infinity in mlp.fc1.bias")
    attempt(good, "must be a checkpoint of clip_tiny", "clip_tiny")
    attempt({"x": torch.zeros(1)}, "must be a checkpoint of vgg_tiny, got .* with x, ...")
    (tmp_path / "b.safetensors").write_bytes(b"rubbish")
    with pytest.raises(ValueError, match=r"b\.safetensors"):
        build_from("vgg_tiny", 3, tmp_path / "b.safetensors")
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        build_from("vgg_tiny", 3, tmp_path / "nothing")
    with pytest.raises(ValueError, match="name must be one of"):
        build_backbone("vgg_tinny", 3)


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_stops_at_its_stage(name: str) -> None:
    stages = parameter_stages(build_backbone(name, 3))
    for n in range(len(stages) - (name == "lenet5_1998")):
        model = build_backbone(name, 3)
        freeze(model, n)
        trained = [key for key, p in model.named_parameters() if p.requires_grad]
        assert trained == [key for stage in stages[n:] for key in stage]
    with pytest.raises(SettingsError, match=f"model.freeze must be below {len(stages)}"):
        freeze(build_backbone(name, 3), len(stages))


@pytest.mark.parametrize("name", FAMILIES)
def test_freezing_all_leaves_the_head(name: str) -> None:
    model = build_backbone(name, 3)
    if name == "lenet5_1998":  # its head has nothing to train
        with pytest.raises(SettingsError, match="must leave something to train of ConvNet, got 'all'"):
            freeze(model, "all")
        return
    freeze(model, "all")
    assert {key for key, p in model.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


@pytest.mark.parametrize("name", FAMILIES)
def test_rates_rise_from_the_pixels_to_the_head(name: str) -> None:
    model = build_backbone(name, 3)
    rates, stages = learning_rates(model, 0.5, head_rate=10), parameter_stages(model)
    assert rates.keys() == dict(model.named_parameters()).keys()
    for i, stage in enumerate(stages):
        for key in stage:
            assert rates[key] == (10 if key.startswith("head.") else 0.5 ** (len(stages) - 1 - i))
    assert set(learning_rates(model).values()) == {1.0}


def test_rates_of_a_transformer_are_those_of_beit_and_mae() -> None:
    """The embedding has d^(depth + 1), block i d^(depth - i), what is behind the blocks 1."""
    rates = learning_rates(build_backbone("clip_tiny", 3), 0.75)
    assert rates["embed.position"] == pytest.approx(0.75**5)
    assert rates["blocks.0.mlp.fc1.weight"] == pytest.approx(0.75**4)
    assert rates["blocks.3.mlp.fc1.weight"] == pytest.approx(0.75)
    assert rates["norm.weight"] == 1
