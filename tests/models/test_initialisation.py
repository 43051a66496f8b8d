"""Models begin as their papers and open_clip say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import pymm
from pymm.models import CLIP, ResNet, VisionTransformer
from pymm.models.clip import CLIPSpec, build
from pymm.models.resnet import ResNetTower
from pymm.models.text import TextTower
from pymm.models.vit import ViTTower

WIDTH = 128


def clip() -> CLIP:
    image, text = ViTTower(64, 8, WIDTH, 4, 2, 512), TextTower(WIDTH, 8, 2, 32, 1000)
    return build(CLIPSpec("test", image, text, 96, "gelu", 0, "test"))


def near(t: Tensor, std: float) -> None:
    assert t.std().item() == pytest.approx(std, rel=0.06)
    assert abs(t.mean().item()) < 0.1 * std


def test_text_tower() -> None:
    text = clip().text
    weights = dict(text.named_parameters())
    near(weights["embed.weight"], 0.02)
    near(weights["embed.position"], 0.01)
    near(weights["head.weight"], WIDTH**-0.5)
    for i in range(8):
        near(weights[f"blocks.{i}.attn.qkv.weight"], WIDTH**-0.5)
        near(weights[f"blocks.{i}.attn.proj.weight"], WIDTH**-0.5 * 16**-0.5)
        near(weights[f"blocks.{i}.mlp.fc1.weight"], (2 * WIDTH) ** -0.5)
        near(weights[f"blocks.{i}.mlp.fc2.weight"], WIDTH**-0.5 * 16**-0.5)
        assert not weights[f"blocks.{i}.attn.qkv.bias"].any()
        assert not weights[f"blocks.{i}.attn.proj.bias"].any()


def test_image_tower() -> None:
    weights = dict(clip().visual.named_parameters())
    near(weights["embed.position"], WIDTH**-0.5)
    near(weights["head.weight"], WIDTH**-0.5)
    assert weights["embed.prefix"].std().item() == pytest.approx(WIDTH**-0.5, rel=0.25)
    for i in range(4):
        qkv = weights[f"blocks.{i}.attn.qkv.weight"]  # Xavier uniform of a (3C, C) matrix
        assert qkv.abs().max() <= (6 / (4 * WIDTH)) ** 0.5
        near(qkv, (2 / (4 * WIDTH)) ** 0.5)
        near(weights[f"blocks.{i}.mlp.fc2.weight"], (512 * 3) ** -0.5)
        assert not weights[f"blocks.{i}.attn.qkv.bias"].any()


def test_vit() -> None:
    model = pymm.create_model("vit_tiny_patch16_224")
    assert isinstance(model, VisionTransformer)
    weights = dict(model.named_parameters())
    for name in ("blocks.3.attn.qkv", "blocks.7.mlp.fc1", "head"):
        near(weights[f"{name}.weight"], 0.02)
        assert not weights[f"{name}.bias"].any()
    near(weights["embed.position"], 0.02)
    assert weights["embed.prefix"].abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["resnet18", "resnet50"])
def test_resnet_blocks_begin_as_identities(kind: str) -> None:
    model = pymm.create_model(kind, num_classes=0)
    assert isinstance(model, ResNet)
    weight = model.stages[1][0].conv2.weight
    near(weight, (2 / (weight.shape[0] * 9)) ** 0.5)
    x = torch.rand(1, model.stages[0][1].conv1.in_channels, 4, 4)
    assert torch.equal(model.stages[0][1](x), x)


def test_clip_resnet() -> None:
    spec = CLIPSpec(
        "test", ResNetTower(64, (2, 1, 1, 1), 8), TextTower(32, 1, 1, 8, 20), 24, "gelu", 0, "test"
    )
    visual = build(spec).visual
    assert isinstance(visual, ResNet)
    x = torch.rand(1, 32, 4, 4)
    assert torch.equal(visual.stages[0][1](x), x)
    for name in ("pool.q.weight", "pool.kv.weight", "pool.position", "head.weight"):
        near(dict(visual.named_parameters())[name], 256**-0.5)
