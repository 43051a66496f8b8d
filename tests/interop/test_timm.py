"""ViT and ResNet against timm and torchvision."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import pymm
from pymm.interop import load_state
from pymm.models import CLIPSpec, ResNetSpec, ViTSpec, describe, resnet, vit
from tests.interop.compare import compare, error, randomize

VIT = ViTSpec("test", 8, 48, 3, 3, 192, 0, "test", image_size=32, num_classes=10)
RESNET = ResNetSpec("test", (2, 1, 1, 1), True, 0, "test", num_classes=10)


@pytest.fixture
def timm() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("timm")


def timm_vit(timm: Any, **options: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
    return timm.models.vision_transformer.VisionTransformer(**{**sizes, **options})


def test_vit(timm: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    compare(vit.build(VIT), timm_vit(timm), lambda m: (m(pixels), m.forward_features(pixels)))


def test_vit_other_resolution(timm: Any) -> None:
    theirs = timm_vit(timm, dynamic_img_size=True)
    randomize(theirs)
    ours = vit.build(VIT)
    assert load_state(ours, theirs.state_dict()).complete
    pixels = torch.randn(2, 3, 48, 24)
    assert error(ours(pixels), theirs(pixels)) < 1e-5


def test_head_and_classifier(timm: Any) -> None:
    theirs = timm_vit(timm)
    randomize(theirs)
    ours = vit.build(VIT)
    load_state(ours, theirs.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    features = ours.forward_features(pixels)
    assert (
        error(ours.forward_head(features, pre_logits=True), theirs.forward_head(features, pre_logits=True))
        < 1e-5
    )
    for classes in (0, 7):
        ours.reset_classifier(classes)
        theirs.reset_classifier(classes)
        assert ours.num_classes == theirs.num_classes
        assert ours(pixels).shape == theirs(pixels).shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bottleneck", [True, False])
def test_resnet(timm: Any, bottleneck: bool, training: bool) -> None:
    row = replace(RESNET, bottleneck=bottleneck)
    kind = timm.models.resnet.Bottleneck if bottleneck else timm.models.resnet.BasicBlock
    # In training, batch norm divides by the spread of eight numbers, which multiplies float32's rounding.
    dtype = torch.float64 if training else torch.float32
    theirs = timm.models.resnet.ResNet(kind, row.depths, num_classes=10).train(training).to(dtype)
    pixels = torch.randn(4, 3, 32, 64, dtype=dtype)
    ours = resnet.build(row).train(training).to(dtype)
    compare(ours, theirs, lambda m: (m(pixels), m.forward_features(pixels)))


def test_torchvision_resnet() -> None:
    module = pytest.importorskip("torchvision.models.resnet")
    theirs = module.ResNet(module.Bottleneck, list(RESNET.depths), num_classes=10).eval()
    pixels = torch.randn(2, 3, 32, 32)
    compare(resnet.build(RESNET).eval(), theirs, lambda m: (m(pixels),))


def test_rows_are_timms(timm: Any) -> None:
    """Names, shapes, heads and normalization of every row that timm has, on the meta device."""
    kinds = [
        describe(name)
        for pattern in ("vit_*", "deit*", "resnet*", "vgg1*")
        for name in pymm.list_models(pattern)
        if not name.endswith("_tanh")  # SigLIP's image tower as transformers computes it
    ]
    rows = [row for row in kinds if not isinstance(row, CLIPSpec) and row.source != "pymm"]
    assert len(rows) == 67
    for row in rows:
        with torch.device("meta"):
            theirs = timm.create_model(row.name, num_classes=row.num_classes)
            ours = pymm.create_model(row.name)
        report = load_state(ours, theirs.state_dict())
        assert report.complete, f"{row.name}: {report}"
        assert sum(p.numel() for p in theirs.parameters()) == row.parameters, row.name
        config = theirs.default_cfg
        assert (row.mean, row.std) == (config["mean"], config["std"]), row.name
        assert config["input_size"] == (3, row.image_size, row.image_size), row.name
        if isinstance(row, ViTSpec):
            assert theirs.blocks[0].attn.num_heads == row.heads, row.name
