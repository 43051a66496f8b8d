"""CLIP, ViT and ResNet against transformers, in its models' names and in its files'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pymm.interop import load_state, to_donor
from pymm.models import CLIPSpec, ResNetSpec, ViTSpec, clip, resnet, vit
from pymm.models.text import TextTower
from pymm.models.vit import ViTTower
from tests.interop.compare import check_way_back, compare, error, randomize

VIT = ViTSpec("test", 8, 48, 2, 3, 192, 0, "test", image_size=32, num_classes=10)
RESNET = ResNetSpec("test", (2, 1, 1, 1), True, 0, "test", width=8, num_classes=10)


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


def clip_spec(activation: Any) -> CLIPSpec:
    text = TextTower(32, 2, 2, context_length=9, vocab_size=50)
    return CLIPSpec("test", ViTTower(24, 8, 48, 2, 3, 192), text, 20, activation, 0, "test")


def clip_donor(transformers: Any, activation: str = "quick_gelu") -> Any:
    text = {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "eos_token_id": 49}
    text |= {"max_position_embeddings": 9, "vocab_size": 50, "bos_token_id": 48, "pad_token_id": 0}
    image = {"hidden_size": 48, "intermediate_size": 192, "num_attention_heads": 3}
    image |= {"image_size": 24, "patch_size": 8}
    more: dict[str, Any] = {"num_hidden_layers": 2, "hidden_act": activation}
    config = transformers.CLIPConfig(
        projection_dim=20, text_config={**text, **more}, vision_config={**image, **more}
    )
    return transformers.CLIPModel(config)


def vit_donor(transformers: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=10, layer_norm_eps=1e-6)
    return transformers.ViTForImageClassification(config)


def resnet_donor(transformers: Any) -> Any:
    config = transformers.ResNetConfig(
        hidden_sizes=[32, 64, 128, 256], embedding_size=8, depths=[2, 1, 1, 1], num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
def test_clip(transformers: Any, activation: str) -> None:
    pixels, tokens = torch.randn(3, 3, 24, 24), torch.randint(1, 48, (3, 9))
    tokens[:, 6] = 49

    def run(model: Any) -> tuple[Tensor, ...]:
        if isinstance(model, clip.CLIP):
            return model(pixels, tokens)
        result = model(input_ids=tokens, pixel_values=pixels)
        return result.image_embeds, result.text_embeds, model.logit_scale.exp()

    compare(clip.build(clip_spec(activation)), clip_donor(transformers, activation), run)


def test_vit(transformers: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)

    def run(model: Any) -> tuple[Tensor, ...]:
        return (model(pixels) if isinstance(model, vit.VisionTransformer) else model(pixels).logits,)

    compare(vit.build(VIT), vit_donor(transformers), run)


def test_resnet(transformers: Any) -> None:
    pixels = torch.randn(2, 3, 64, 64)

    def run(model: Any) -> tuple[Tensor, ...]:
        return (model(pixels) if isinstance(model, resnet.ResNet) else model(pixels).logits,)

    compare(resnet.build(RESNET).eval(), resnet_donor(transformers).eval(), run)


@pytest.mark.parametrize(
    ("make", "ours"),
    [
        (clip_donor, lambda: clip.build(clip_spec("quick_gelu"))),
        (vit_donor, lambda: vit.build(VIT)),
        (resnet_donor, lambda: resnet.build(RESNET)),
    ],
    ids=["clip", "vit", "resnet"],
)
def test_files_there_and_back(transformers: Any, tmp_path: Path, make: Any, ours: Any) -> None:
    """What transformers saves loads here, and what is written here it reads."""
    theirs: nn.Module = make(transformers)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    model = ours()
    assert load_state(model, state).complete
    check_way_back(model, "transformers", state)
    save_file(to_donor(model, "transformers"), tmp_path / "model.safetensors", {"format": "pt"})
    again = type(theirs).from_pretrained(tmp_path)
    for name, value in theirs.state_dict().items():
        assert error(again.state_dict()[name].double(), value.double()) == 0, name
