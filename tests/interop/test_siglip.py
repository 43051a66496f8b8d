"""SigLIP against transformers, open_clip and timm: towers, the image tower alone, the loss, bad files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import pymm
from pymm.interop import load_state, save, to_donor
from pymm.interop.identify import identify
from pymm.models import CLIP, CLIPSpec, VisionTransformer, ViTSpec, describe, siglip_rows
from pymm.models.clip import build
from pymm.models.siglip import SigLIPTextTower
from pymm.models.vit import build as build_vit
from pymm.objectives import ContrastiveObjective
from tests.interop.compare import compare, error, randomize

IMAGE = replace(describe("vit_base_patch16_siglip_224"), patch_size=8, width=48, depth=2, heads=3)
IMAGE = replace(IMAGE, mlp_width=192, image_size=24)
TEXT = SigLIPTextTower(48, 2, 3, 192, context_length=9, vocab_size=50)
ROW = CLIPSpec("test", IMAGE, TEXT, 48, "gelu", 0, "test", logit_bias=-3.0)
SIZES = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 3}
PIXELS, TOKENS = torch.randn(3, 3, 24, 24), torch.randint(0, 50, (3, 9))


def tanh(row: CLIPSpec) -> CLIPSpec:
    return replace(row, image=replace(row.image, activation="gelu_tanh"), activation="gelu_tanh")


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


@pytest.fixture
def open_clip() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("open_clip")


def vision(transformers: Any, **more: Any) -> Any:
    return transformers.SiglipVisionConfig(**{**SIZES, "image_size": 24, "patch_size": 8, **more})


def of_transformers(transformers: Any, sizes: dict[str, Any], **more: Any) -> nn.Module:
    text = transformers.SiglipTextConfig(
        **{**SIZES, "vocab_size": 50, "max_position_embeddings": 9, **sizes, **more},
        bos_token_id=0,
        eos_token_id=1,
    )
    image = vision(transformers, **sizes)
    return transformers.SiglipModel(
        transformers.SiglipConfig(text_config=text.to_dict(), vision_config=image.to_dict())
    ).eval()


def trunk(**more: Any) -> nn.Module:
    vit = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
    sizes = {"img_size": 24, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 0}
    return vit(**{**sizes, "class_token": False, "global_pool": "map", **more})


def of_open_clip(open_clip: Any, image: nn.Module, **sizes: Any) -> nn.Module:
    """With a trunk of timm's class in the place of one of its names, which are all large."""
    config = open_clip.get_model_config("ViT-B-16-SigLIP")
    text = config["text_cfg"] | {"context_length": 9, "vocab_size": 50, "width": 48, "heads": 3, "layers": 2}
    seeing = config["vision_cfg"] | {"timm_model_name": "vit_tiny_patch16_224", "timm_pool": "token"}
    text |= sizes
    model = open_clip.CustomTextCLIP(text["width"], seeing, text, init_logit_bias=-10.0)
    model.visual.trunk = image
    return model.eval()


def features(model: Any) -> tuple[Tensor, ...]:
    """Of both towers, not normalized, with the scale and the bias."""
    scalars = model.logit_scale.reshape(()), model.logit_bias.reshape(())
    if hasattr(model, "encode_image"):
        return model.encode_image(PIXELS), model.encode_text(TOKENS), *scalars
    image, text = model.get_image_features(PIXELS), model.get_text_features(TOKENS)
    return image.pooler_output, text.pooler_output, *scalars


def test_transformers(transformers: Any) -> None:
    compare(build(tanh(ROW)).eval(), of_transformers(transformers, {}), features)


def test_open_clip(open_clip: Any) -> None:
    compare(build(ROW).eval(), of_open_clip(open_clip, trunk()), features)


def test_image_tower_of_transformers(transformers: Any) -> None:
    donor = transformers.SiglipVisionModel(vision(transformers)).eval()

    def run(model: Any) -> tuple[Tensor, ...]:
        if isinstance(model, VisionTransformer):
            x = model.forward_features(PIXELS)
            return x, model.forward_head(x)
        result = model(PIXELS)
        return result.last_hidden_state, result.pooler_output

    compare(build_vit(replace(IMAGE, activation="gelu_tanh")), donor, run)


def test_image_tower_of_timm() -> None:
    compare(build_vit(IMAGE), trunk(), lambda m: (m(PIXELS), m.forward_features(PIXELS)))
    classes = replace(IMAGE, num_classes=5)
    compare(build_vit(classes), trunk(num_classes=5), lambda m: (m(PIXELS),))


def test_names_of_a_file_of_both_towers(transformers: Any) -> None:
    donor = of_transformers(transformers, {})
    randomize(donor)
    ours = build_vit(replace(IMAGE, activation="gelu_tanh"))
    assert load_state(ours, donor.state_dict()).complete
    with torch.no_grad():
        assert error(ours(PIXELS), donor.get_image_features(PIXELS).pooler_output) < 1e-5
    names = to_donor(ours, "transformers").keys()
    assert names == {name for name in donor.state_dict() if name.startswith("vision_model.")}


def test_sigmoid_loss_of_a_checkpoint(transformers: Any, open_clip: Any) -> None:
    donor = of_transformers(transformers, {})
    randomize(donor)
    load_state(ours := build(tanh(ROW)), donor.state_dict())
    outputs = ours(PIXELS, TOKENS)
    loss = ContrastiveObjective("sigmoid")(outputs)
    theirs = donor(input_ids=TOKENS, pixel_values=PIXELS, return_loss=True).loss
    assert error(loss, theirs) < 1e-5
    assert error(open_clip.loss.SigLipLoss()(*outputs), loss) < 1e-5


def test_rows_are_open_clips(open_clip: Any) -> None:
    """Names, shapes, heads, pixels and numbers of parameters, on the meta device."""
    rows = [row for row in siglip_rows.ROWS if isinstance(row, CLIPSpec) and row.aliases]
    assert len(rows) == 8
    for row in rows:
        config = open_clip.get_model_config(row.aliases[0])
        with torch.device("meta"):
            theirs = open_clip.CustomTextCLIP(**{k: v for k, v in config.items() if k != "custom_text"})
            ours = pymm.create_model(row.name)
        assert isinstance(ours, CLIP)
        assert load_state(ours, theirs.state_dict()).complete, row.name
        assert isinstance(row.image, ViTSpec)
        image, blocks = theirs.visual.trunk, theirs.visual.trunk.blocks
        parameters = [sum(p.numel() for p in part.parameters()) for part in (theirs, image)]
        assert parameters == [row.parameters, row.image.parameters], row.name
        assert (blocks[0].attn.num_heads, image.attn_pool.num_heads) == (row.image.heads,) * 2
        assert theirs.text.transformer.resblocks[0].attn.num_heads == row.text.heads
        assert (theirs.visual.image_size, theirs.text.context_length) == (
            (row.image_size,) * 2,
            ours.context_length,
        )
        assert describe(row.image.name).parameters == row.image.parameters


@pytest.mark.parametrize("name", ["siglip_base_patch16_256", "siglip_tiny"])
def test_rows_are_told_apart(name: str) -> None:
    """By names alone: who has them computes one GELU."""
    with torch.device("meta"):
        ours = pymm.create_model(name)
        exact = pymm.create_model(f"{name}_gelu")
    assert isinstance(ours, CLIP)
    assert identify(to_donor(ours, "transformers"), {}).arch == name
    assert identify(to_donor(exact, "open_clip"), {}).arch == f"{name}_gelu"
    config = {"model_type": "siglip", "vision_config": {"hidden_act": "gelu"}}
    assert identify(to_donor(ours, "transformers"), config).arch == f"{name}_gelu"
    if name != "siglip_tiny":
        row = describe(name)
        assert isinstance(row, CLIPSpec)
        image = row.image.name  # type: ignore[union-attr]
        for donor, wanted in (("transformers", image), ("timm", image.removesuffix("_tanh"))):
            found = identify(to_donor(ours.visual, donor), {})
            assert (found.arch, found.num_classes, found.image_size) == (wanted, None, None)


TINY = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4}


def tiny(transformers: Any) -> nn.Module:
    config = of_transformers(
        transformers,
        {**TINY, "num_hidden_layers": 3},
        vocab_size=2048,
        max_position_embeddings=24,
        projection_size=128,
    ).config
    config.vision_config.num_hidden_layers, config.vision_config.image_size = 4, 48
    model = transformers.SiglipModel(config).eval()
    randomize(model)
    return model


def test_directory_there_and_back(transformers: Any, tmp_path: Path) -> None:
    theirs = tiny(transformers)
    theirs.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0.4] * 3, "image_std": [0.6] * 3})
    )
    ours = pymm.load(tmp_path)
    assert isinstance(ours, CLIP)
    assert (ours.arch, ours.mean) == ("siglip_tiny", (0.4,) * 3)
    x, tokens = torch.randn(2, 3, 48, 48), torch.randint(0, 2048, (2, 24))
    with torch.no_grad():
        result = theirs(input_ids=tokens, pixel_values=x)
        image, text, scale, bias = ours(x, tokens)
        assert error(image @ text.T * scale + bias, result.logits_per_image) < 1e-5
    back = to_donor(ours, "transformers")
    state = theirs.state_dict()
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)
    save(ours, tmp_path / "ours.safetensors")
    again = pymm.load(tmp_path / "ours.safetensors")
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_loaded_from_open_clip(open_clip: Any) -> None:
    image = trunk(img_size=48, embed_dim=128, depth=4, num_heads=4)
    sizes = {"context_length": 24, "vocab_size": 2048, "width": 128, "heads": 4, "layers": 3}
    theirs = of_open_clip(open_clip, image, **sizes)
    randomize(theirs)
    ours = pymm.load(theirs.state_dict())
    assert ours.arch == "siglip_tiny_gelu"
    x, tokens = torch.randn(2, 3, 48, 48), torch.randint(0, 2048, (2, 24))
    with torch.no_grad():
        for got, truth in zip(ours(x, tokens), theirs(x, tokens), strict=True):
            assert error(got, truth) < 1e-5


def test_bad_files(transformers: Any, tmp_path: Path) -> None:
    state = {name: t.clone() for name, t in tiny(transformers).state_dict().items()}

    def refused(words: str, arch: str | None = None, **changed: Tensor | None) -> None:
        names = {name.replace("__", "."): t for name, t in changed.items()}
        bad = {name: t for name, t in {**state, **names}.items() if t is not None}
        with pytest.raises(ValueError) as caught:
            pymm.load(bad, arch)
        text = str(caught.value)
        assert words in text
        assert "\n" not in text

    bias = "vision_model__head__attention__in_proj_bias"
    refused("NaN or infinity in visual.pool.qkv.bias", **{bias: torch.full((384,), float("nan"))})
    refused("no row fits", **{bias: torch.zeros(5)})
    mismatch = "1 mismatched (visual.pool.qkv.bias: expected (384,), got (5,))"
    refused(mismatch, "siglip_tiny", **{bias: torch.zeros(5)})
    refused("1 missing (visual.pool.probe)", "siglip_tiny", vision_model__head__probe=None)
    refused("1 unused (text_model.teacher)", "siglip_tiny", text_model__teacher=torch.zeros(2))
    refused("1 mismatched (logit_scale", "siglip_tiny", logit_scale=torch.zeros(2))
    refused("a complete checkpoint of clip_tiny_sigmoid", "clip_tiny_sigmoid")
    refused("a complete checkpoint of vit_base_patch16_siglip_224", "vit_base_patch16_siglip_224")
    path = tmp_path / "m.safetensors"
    save_file(state, path)
    data = path.read_bytes()
    for part in (0.001, 0.5, 0.999):
        path.write_bytes(data[: int(part * len(data))])
        with pytest.raises(ValueError, match="load: path must be a whole checkpoint"):
            pymm.load(path)
