"""CLIP against open_clip, and against what OpenAI's archives hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymm
from pymm.interop import load_state
from pymm.models import CLIP, CLIPSpec, describe
from pymm.models.clip import build
from pymm.models.resnet import ResNetTower
from pymm.models.text import TextTower
from pymm.models.vit import ViTTower
from tests.interop.compare import compare, error, randomize

TEXT = TextTower(32, 2, 2, context_length=9, vocab_size=50)
VIT = ViTTower(24, 8, 48, 2, 3, 192)
RN = ResNetTower(64, (1, 2, 1, 1), 8)


@pytest.fixture
def open_clip() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("open_clip")


def spec(image: ViTTower | ResNetTower, activation: Any = "gelu", bias: float | None = None) -> CLIPSpec:
    return CLIPSpec("test", image, TEXT, 20, activation, 0, "test", logit_bias=bias)


def configs(row: CLIPSpec) -> tuple[dict[str, Any], dict[str, Any]]:
    text = {"context_length": 9, "vocab_size": 50, "width": 32, "heads": 2, "layers": 2}
    if isinstance(row.image, ViTTower):
        side, patch = row.image.image_size, row.image.patch_size
        return {"image_size": side, "layers": 2, "width": 48, "head_width": 16, "patch_size": patch}, text
    return {"image_size": 64, "layers": list(row.image.depths), "width": 8, "head_width": 64}, text


def donor(open_clip: Any, row: CLIPSpec, **options: Any) -> nn.Module:
    return open_clip.CLIP(row.embed, *configs(row), quick_gelu=row.activation == "quick_gelu", **options)


def inputs(size: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, 49, (3, 9))
    tokens[0, 4], tokens[1, 8], tokens[2, 2] = 49, 49, 49  # the end; what follows it may be anything
    tokens[0, 5:] = 0
    return torch.randn(3, 3, size, size), tokens


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_vit(open_clip: Any, activation: str) -> None:
    row, batch = spec(VIT, activation), inputs(24)
    compare(build(row), donor(open_clip, row), lambda m: m(*batch))


@pytest.mark.parametrize("training", [True, False])
def test_resnet(open_clip: Any, training: bool) -> None:
    row, batch = spec(RN, "quick_gelu"), inputs(64)
    theirs, ours = donor(open_clip, row).train(training), build(row).train(training)
    compare(ours, theirs, lambda m: m(*batch))
    load_state(after := build(row), theirs.state_dict())
    for name, buffer in after.named_buffers():  # batch norms' statistics moved alike
        assert error(ours.get_buffer(name).float(), buffer.float()) < 1e-5, name


def test_bias(open_clip: Any) -> None:
    row, batch = spec(VIT, bias=-3.0), inputs(24)
    compare(build(row), donor(open_clip, row, init_logit_bias=-10.0), lambda m: m(*batch))


def test_text_tower_of_its_own(open_clip: Any) -> None:
    row, batch = spec(VIT), inputs(24)
    compare(build(row), open_clip.CustomTextCLIP(20, *configs(row)), lambda m: m(*batch))


@pytest.mark.parametrize("image", [VIT, RN], ids=["vit", "resnet"])
def test_unnormalized_features(open_clip: Any, image: Any) -> None:
    row, (pixels, tokens) = spec(image), inputs(image.image_size)
    compare(
        build(row).eval(),
        donor(open_clip, row).eval(),
        lambda m: (m.encode_image(pixels), m.encode_text(tokens), m.logit_scale),
    )


def test_other_resolution(open_clip: Any) -> None:
    """Loading into a model for another image size interpolates as open_clip does."""
    from open_clip.model import resize_pos_embed

    theirs = donor(open_clip, spec(VIT))
    randomize(theirs)
    state = theirs.state_dict()
    large = spec(replace(VIT, image_size=40))
    report = load_state(ours := build(large), state)
    assert report.complete
    assert report.resampled == ("visual.embed.position",)
    larger = donor(open_clip, large)
    resize_pos_embed(state, larger)
    larger.load_state_dict(state)
    pixels, _ = inputs(40)
    assert error(ours.encode_image(pixels), larger.encode_image(pixels)) < 1e-5


def test_intermediates(open_clip: Any) -> None:
    row, batch = spec(VIT), inputs(24)
    theirs = donor(open_clip, row)
    randomize(theirs)
    load_state(ours := build(row), theirs.state_dict())
    named: dict[str, Tensor] = {}
    ours(*batch, intermediates=named)
    truth = theirs.forward_intermediates(*batch, image_output_fmt="NLC", image_output_extra_tokens=True)
    for i in range(2):
        x = torch.cat([truth["image_intermediates_prefix"][i], truth["image_intermediates"][i]], 1)
        assert error(named[f"visual.blocks.{i}"], x) < 1e-5
        assert error(named[f"text.blocks.{i}"], truth["text_intermediates"][i]) < 1e-5


def test_openai_archive_needs_quick_gelu(open_clip: Any) -> None:
    """OpenAI's archives hold open_clip's names and three facts; the activation is not among them."""
    facts = {"input_resolution": 24, "context_length": 9, "vocab_size": 50}
    weights = donor(open_clip, spec(VIT, "quick_gelu")).state_dict()
    state = {**weights, **{name: torch.tensor(value) for name, value in facts.items()}}
    assert load_state(build(spec(VIT, "quick_gelu")), state).complete
    with pytest.raises(ValueError, match="load_state: model must be a _quickgelu row"):
        load_state(build(spec(VIT, "gelu")), state)


def test_wrapped_names(open_clip: Any) -> None:
    theirs = donor(open_clip, spec(VIT))
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    ours = build(spec(VIT))
    assert load_state(ours, {"epoch": 3, "state_dict": state}).complete
    assert torch.equal(ours.text.embed.weight, theirs.token_embedding.weight)


def test_aliases_are_open_clips_architectures(open_clip: Any) -> None:
    """Names, shapes, heads and activation of every alias, on the meta device."""
    rows = [row for name in pymm.list_models("clip_*") if isinstance(row := describe(name), CLIPSpec)]
    aliases = [(alias, row) for row in rows for alias in row.aliases]
    assert len(aliases) > 20
    for alias, row in aliases:
        config = open_clip.get_model_config(alias)
        with torch.device("meta"):
            theirs, ours = open_clip.CLIP(**config), pymm.create_model(alias)
        assert isinstance(ours, CLIP)
        report = load_state(ours, theirs.state_dict())
        assert report.complete, f"{alias}: {report}"
        assert sum(p.numel() for p in theirs.parameters()) == row.parameters, alias
        assert config.get("quick_gelu", False) == (row.activation == "quick_gelu"), alias
        assert theirs.transformer.resblocks[0].attn.num_heads == row.text.heads, alias
        if isinstance(row.image, ViTTower):
            heads = theirs.visual.transformer.resblocks[0].attn.num_heads
            assert (heads, theirs.visual.image_size) == (row.image.heads, (row.image_size,) * 2), alias
        else:
            assert (theirs.visual.attnpool.num_heads, theirs.visual.image_size) == (
                ours.visual.pool.heads,
                row.image_size,
            ), alias
