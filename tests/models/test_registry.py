"""Names, rows and what `create_model` makes of them."""

from __future__ import annotations

import pytest
import torch

import pymm
from pymm.models import CLIP, BertSpec, CLIPSpec, ResNet, VisionTransformer, describe
from pymm.models.vit import ViTTower

NAMES = pymm.list_models()

# Counted in the donors, not in pymm.
COUNTS = {
    "clip_vit_base_patch32": 151_277_313,
    "clip_vit_large_patch14": 427_616_513,
    "clip_rn50": 102_007_137,
    "vit_base_patch16_224": 86_567_656,
    "resnet50": 25_557_032,
    "alexnet": 61_100_840,
    "vgg16": 138_357_544,
    "lenet5_1998": 60_000,
    "bert_base": 109_482_240,
}


def count(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", NAMES)
def test_row(name: str) -> None:
    row = describe(name)
    with torch.device("meta"):
        model = pymm.create_model(name)
    assert all(p.is_meta for p in model.parameters())
    assert count(model) == row.parameters
    assert row.source
    if isinstance(row, BertSpec):
        return
    assert model.image_size == row.image_size
    assert model.mean == row.mean
    assert model.std == row.std


@pytest.mark.parametrize(("name", "parameters"), COUNTS.items())
def test_published_counts(name: str, parameters: int) -> None:
    assert describe(name).parameters == parameters


def test_list_models() -> None:
    assert sorted(NAMES) == NAMES
    assert len(set(NAMES)) == len(NAMES) > 30
    assert pymm.list_models("resnet*") == ["resnet101", "resnet152", "resnet18", "resnet34", "resnet50"]
    assert pymm.list_models("nothing*") == []


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("ViT-B-32", "clip_vit_base_patch32"),
        ("ViT-B-32-quickgelu", "clip_vit_base_patch32_quickgelu"),
        ("ViT-L-14-336", "clip_vit_large_patch14_336"),
        ("ViT-H-14", "clip_vit_huge_patch14"),
        ("RN50", "clip_rn50"),
        ("RN50x64-quickgelu", "clip_rn50x64_quickgelu"),
    ],
)
def test_aliases(alias: str, name: str) -> None:
    assert describe(alias) is describe(name)


def test_aliases_are_unique() -> None:
    aliases = [a for name in NAMES for a in describe(name).aliases]
    assert len(set(aliases) | set(NAMES)) == len(aliases) + len(NAMES)


def test_activations() -> None:
    """Rows with the suffix differ from their twins in nothing but the activation."""
    quick = [n for n in NAMES if n.endswith("_quickgelu")]
    assert len(quick) > 8
    for name in quick:
        row, twin = describe(name), describe(name.removesuffix("_quickgelu"))
        assert isinstance(row, CLIPSpec)
        assert isinstance(twin, CLIPSpec)
        assert (row.activation, twin.activation) == ("quick_gelu", "gelu")
        assert (row.image, row.text, row.embed) == (twin.image, twin.text, twin.embed)


def test_create_model_sizes() -> None:
    model = pymm.create_model("vit_tiny_patch16_224", num_classes=7, image_size=32)
    assert isinstance(model, VisionTransformer)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 7)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape == (1, 5, 192)
    model = pymm.create_model("resnet18", num_classes=0, image_size=64)
    assert isinstance(model, ResNet)
    assert model.num_classes == 0
    assert model.image_size == 64
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 512)
    clip = pymm.create_model("clip_tiny", image_size=32)
    assert isinstance(clip, CLIP)
    row = describe("clip_tiny")
    assert isinstance(row, CLIPSpec)
    assert isinstance(row.image, ViTTower)
    assert (
        clip.visual.forward_features(torch.randn(1, 3, 32, 32)).shape[1]
        == 1 + (32 // row.image.patch_size) ** 2
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"name": "clip_vit_bas_patch32"},
            "create_model: name must be one of list_models.* clip_vit_base_patch32",
        ),
        ({"name": "?"}, r"create_model: name must be one of list_models\(\), got '\?'"),
        ({"name": "clip_tiny", "num_classes": 3}, "create_model: num_classes must be None for clip_tiny"),
        ({"name": "bert_tiny", "num_classes": 3}, "create_model: num_classes must be None for bert_tiny"),
        ({"name": "bert_tiny", "image_size": 32}, "create_model: image_size must be None for bert_tiny"),
        ({"name": "resnet18", "num_classes": -1}, "create_model: num_classes must be at least 0, got -1"),
        ({"name": "resnet18", "image_size": 0}, "create_model: image_size must be positive, got 0"),
        (
            {"name": "vit_tiny_patch16_224", "image_size": 40},
            "image_size must be a multiple of the patch size 16",
        ),
        ({"name": "clip_rn50", "image_size": 16}, "ResNet: image_size must be at least 32, got 16"),
        (
            {"name": "alexnet", "image_size": 62},
            "ConvNet: image_size must be at least 63 for alexnet, got 62",
        ),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pymm.create_model(**arguments)  # type: ignore[arg-type]


def test_unknown_attribute() -> None:
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        pymm.create_modle  # noqa: B018
    assert "create_model" in dir(pymm)
