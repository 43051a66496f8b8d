"""Vision transformers of several kinds against timm, transformers and torchvision."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pymm
from pymm.interop import load_state
from pymm.models import DeiTSpec, ViTSpec, deit, vit
from tests.interop.compare import check_way_back, compare, error, randomize

ROW = ViTSpec("test", 8, 48, 3, 3, 192, 0, "test", image_size=32, num_classes=10)
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 10}
KINDS = {
    "registers, mean": (
        replace(ROW, prefix=4, position="patches", pool="mean", layer_scale=0.1),
        {
            "class_token": False,
            "no_embed_class": True,
            "global_pool": "avg",
            "reg_tokens": 4,
            "init_values": 1,
        },
    ),
    "registers, class": (
        replace(ROW, prefix=5, position="patches"),
        {"no_embed_class": True, "reg_tokens": 4},
    ),
    "class has a position, mean": (replace(ROW, pool="mean"), {"global_pool": "avg"}),
    "layer scale": (replace(ROW, layer_scale=0.1), {"init_values": 0.1}),
}


@pytest.fixture
def timm() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("timm")


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("kind", KINDS)
def test_timm(timm: Any, kind: str) -> None:
    row, options = KINDS[kind]
    theirs = timm.models.vision_transformer.VisionTransformer(**SIZES, **options)
    pixels = torch.randn(2, 3, 32, 32)
    compare(vit.build(row), theirs, lambda m: (m(pixels), m.forward_features(pixels)))


def test_timm_distilled(timm: Any) -> None:
    theirs = timm.models.deit.VisionTransformerDistilled(**SIZES)
    pixels = torch.randn(2, 3, 32, 32)
    ours = deit.build(DeiTSpec("test", 8, 48, 3, 3, 0, image_size=32, num_classes=10))

    def run(model: Any) -> tuple[torch.Tensor, ...]:
        features = model.forward_features(pixels)
        if isinstance(model, deit.DeiT):
            first, second = model.forward_apart(pixels)
        else:
            first, second = model.head(features[:, 0]), model.head_dist(features[:, 1])
        return model(pixels), features, model.forward_head(features, pre_logits=True), first, second

    compare(ours, theirs, run)
    ours.reset_classifier(0)
    theirs.reset_classifier(0)
    assert error(ours(pixels), theirs(pixels)) < 1e-5
    assert ours.num_classes == 0


@pytest.mark.parametrize("kind", KINDS)
def test_timm_other_resolution(timm: Any, kind: str) -> None:
    """The same whether positions are interpolated for an input or, as the weights are read, for the model."""
    row, options = KINDS[kind]
    theirs = timm.models.vision_transformer.VisionTransformer(**SIZES, **options, dynamic_img_size=True)
    randomize(theirs)
    ours, larger = vit.build(row), vit.build(replace(row, image_size=48))
    assert load_state(ours, theirs.state_dict()).complete
    report = load_state(larger, theirs.state_dict())
    assert report.complete
    assert report.resampled == ("embed.position",)
    pixels = torch.randn(2, 3, 48, 48)
    assert error(ours(pixels), theirs(pixels)) < 1e-5
    assert error(larger(pixels), theirs(pixels)) < 1e-5


@pytest.mark.parametrize("indices", [None, 2, [0, -1]])
@pytest.mark.parametrize("norm", [True, False])
def test_timm_intermediates(timm: Any, indices: Any, norm: bool) -> None:
    row, options = KINDS["registers, class"]
    theirs = timm.models.vision_transformer.VisionTransformer(**SIZES, **options)
    randomize(theirs)
    ours = vit.build(row)
    load_state(ours, theirs.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    last, maps = ours.forward_intermediates(pixels, indices, norm=norm)
    truth, their_maps = theirs.forward_intermediates(pixels, indices, norm=norm)
    assert error(last, truth) < 1e-5
    for ours_, theirs_ in zip(maps, their_maps, strict=True):
        assert error(ours_, theirs_) < 1e-5
    tokens = ours.forward_intermediates(pixels, indices, norm=norm, output_fmt="NLC", intermediates_only=True)
    assert torch.equal(tokens[0].mT.unflatten(2, (4, 4)), maps[0])


def test_transformers_without_a_head(transformers: Any, tmp_path: Path) -> None:
    """A file of the bare model, whose names have no prefix."""
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6)
    theirs = transformers.ViTModel(config, add_pooling_layer=False).eval()
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    ours, pixels = vit.build(replace(ROW, num_classes=0)), torch.randn(2, 3, 32, 32)
    assert load_state(ours, load_file(tmp_path / "model.safetensors")).complete
    assert error(ours.forward_features(pixels), theirs(pixels).last_hidden_state) < 1e-5


def test_transformers_distilled(transformers: Any, tmp_path: Path) -> None:
    """The names of its models, with gradients, and those of its files."""
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    config = transformers.DeiTConfig(**sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6, num_labels=10)
    theirs = transformers.DeiTForImageClassificationWithTeacher(config).eval()
    row, pixels = DeiTSpec("test", 8, 48, 3, 3, 0, image_size=32, num_classes=10), torch.randn(2, 3, 32, 32)

    def run(model: Any) -> tuple[torch.Tensor, ...]:
        if isinstance(model, deit.DeiT):
            return model(pixels), *model.forward_apart(pixels)
        result = model(pixels)
        return result.logits, result.cls_logits, result.distillation_logits

    compare(deit.build(row), theirs, run)
    theirs.save_pretrained(tmp_path)
    state, ours = load_file(tmp_path / "model.safetensors"), deit.build(row)
    assert load_state(ours, state).complete
    assert error(ours(pixels), theirs(pixels).logits) < 1e-5
    check_way_back(ours, "transformers", state)


def test_torchvision() -> None:
    module = pytest.importorskip("torchvision.models.vision_transformer")
    theirs = module.VisionTransformer(32, 8, 3, 3, 48, 192, num_classes=10)
    pixels = torch.randn(2, 3, 32, 32)
    compare(vit.build(ROW), theirs, lambda m: (m(pixels),))


@pytest.mark.parametrize(
    ("name", "donor"),
    [("vit_base_patch16_224", "vit_b_16"), ("vit_large_patch32_224", "vit_l_32")],
)
def test_torchvision_rows(name: str, donor: str) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        theirs, ours = models.get_model(donor), pymm.create_model(name)
    assert load_state(ours, theirs.state_dict()).complete
    weights = models.get_model_weights(donor).DEFAULT
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count == models.get_model_weights(donor).IMAGENET1K_V1.meta["num_params"], weights


def test_transformers_row(transformers: Any) -> None:
    """The base model of google's checkpoint: names, shapes and count."""
    config = transformers.ViTConfig(num_labels=1000)
    with torch.device("meta"):
        theirs = transformers.ViTForImageClassification(config)
        ours = pymm.create_model("vit_base_patch16_224")
    assert load_state(ours, theirs.state_dict()).complete
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())


def test_distilled_row_is_found(timm: Any) -> None:
    """With the classes of the checkpoint, or none."""
    for classes in (7, 0):
        theirs = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=classes)
        ours = pymm.load(theirs.state_dict())
        assert isinstance(ours, deit.DeiT)
        assert ours.num_classes == classes
