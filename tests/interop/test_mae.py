"""The masked autoencoder against transformers: outputs, loss and gradients, and its authors' names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import pymm
from pymm.interop import load_state, to_donor
from pymm.layers import from_patches, sincos_position, to_patches
from pymm.models import MAE, MAESpec, ViTSpec, mae, vit
from pymm.objectives import MaskedPixels
from tests.interop.compare import check_way_back, compare, error, randomize

ROW = MAESpec("test", 8, 48, 3, 3, 0, "", 32, decoder_width=32, decoder_depth=2, decoder_heads=2)


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


def donor(transformers: Any, **options: Any) -> Any:
    config = transformers.ViTMAEConfig(
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=192,
        image_size=32,
        patch_size=8,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=128,
        layer_norm_eps=1e-6,
        **options,
    )
    return transformers.ViTMAEForPreTraining(config).eval()


@pytest.mark.parametrize("normalize", [True, False])
def test_transformers(transformers: Any, normalize: bool) -> None:
    pixels, noise = torch.randn(3, 3, 32, 32), torch.rand(3, 16)
    keep = noise.argsort(1)[:, :4]
    mask = torch.ones(3, 16, dtype=torch.bool).scatter(1, keep, False)

    def run(model: Any) -> tuple[Tensor, ...]:
        if isinstance(model, MAE):
            predicted = model(pixels, keep)
            return predicted, MaskedPixels(normalize)(predicted, pixels, mask).mean()
        result = model(pixels, noise=noise)
        assert torch.equal(result.mask.bool(), mask)
        return result.logits, result.loss

    compare(mae.build(ROW), donor(transformers, norm_pix_loss=normalize), run)


def test_files(transformers: Any, tmp_path: Path) -> None:
    """What version 5 saves, and what the hub has, whose decoder has another name."""
    theirs = donor(transformers)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    hub = {
        name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers."): t
        for name, t in saved.items()
    }
    pixels, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    truth = theirs(pixels, noise=noise).logits
    for state in (saved, hub):
        ours = mae.build(ROW)
        assert load_state(ours, state).complete
        assert error(ours(pixels, noise.argsort(1)[:, :4]), truth) < 1e-5
    check_way_back(ours, "transformers", hub)


def test_authors_names() -> None:
    """Every parameter has a name that mae_pretrain files have, and finds its way back."""
    ours, again = mae.build(ROW), mae.build(ROW)
    randomize(ours)
    state = to_donor(ours, "MAE's authors")
    assert {name.partition(".")[0] for name in state} == {
        "patch_embed",
        "cls_token",
        "pos_embed",
        "blocks",
        "norm",
        "mask_token",
        "decoder_embed",
        "decoder_pos_embed",
        "decoder_blocks",
        "decoder_norm",
        "decoder_pred",
    }
    assert state["decoder_blocks.1.attn.qkv.weight"].shape == (96, 32)
    assert state["mask_token"].shape == (1, 1, 32)
    assert load_state(again, state).complete
    pixels, keep = torch.randn(2, 3, 32, 32), torch.tensor([[3, 9], [0, 1]])
    assert torch.equal(ours(pixels, keep), again(pixels, keep))


def test_authors_encoder_is_timms(transformers: Any) -> None:
    """The published encoders have timm's names, so they load into a ViT as they are."""
    ours = mae.build(ROW)
    names = {n for n in to_donor(ours, "MAE's authors") if not n.startswith(("decoder", "mask_token"))}
    row = ViTSpec("test", 8, 48, 3, 3, 192, 0, "test", image_size=32, num_classes=0)
    assert names == set(to_donor(vit.build(row), "timm"))


def test_other_resolution() -> None:
    """Both halves' positions are interpolated as the weights are read."""
    source, target = mae.build(ROW), mae.build(replace(ROW, image_size=48))
    report = load_state(target, source.state_dict())
    assert report.complete
    assert set(report.resampled) == {"encoder.embed.position", "decoder.position"}
    pixels, keep = torch.randn(1, 3, 48, 48), torch.tensor([[0, 7, 35]])
    torch.testing.assert_close(target(pixels, keep), source(pixels, keep))


@pytest.mark.parametrize("donor_name", ["transformers", "MAE's authors"])
def test_rows_are_found(donor_name: str) -> None:
    model = pymm.create_model("mae_vit_mini_patch8_64", image_size=32).eval()
    found = pymm.load(to_donor(model, donor_name))
    pixels, keep = torch.randn(1, 3, 32, 32), torch.tensor([[0, 7, 15]])
    assert torch.equal(found(pixels, keep), model(pixels, keep))


@pytest.mark.parametrize("pool", ["class", "mean"])
def test_encoder_becomes_a_classifier(pool: Any) -> None:
    pretrained = mae.build(ROW)
    randomize(pretrained)
    row = ViTSpec("test", 8, 48, 3, 3, 192, 0, "test", image_size=32, num_classes=5, pool=pool)
    model = vit.build(row)
    report = load_state(model, pretrained.state_dict())
    assert report.missing == ("head.weight", "head.bias")
    assert not report.unused
    assert not report.mismatched
    pixels = torch.randn(2, 3, 32, 32)
    features = pretrained.forward_features(pixels)
    got = model.forward_head(model.forward_features(pixels), pre_logits=True)
    if pool == "class":
        torch.testing.assert_close(got, features[:, 0])
    else:
        torch.testing.assert_close(model.pool.norm.weight, pretrained.encoder.norm.weight)
    assert model.embed.position is not None
    assert model.embed.position.requires_grad


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_rows(transformers: Any, size: str) -> None:
    sizes = {"base": (768, 12, 12, 16), "large": (1024, 24, 16, 16), "huge": (1280, 32, 16, 14)}
    width, depth, heads, patch = sizes[size]
    config = transformers.ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        patch_size=patch,
    )
    with torch.device("meta"):
        theirs = transformers.ViTMAEForPreTraining(config)
        ours = pymm.create_model(f"mae_vit_{size}_patch{patch}")
    assert load_state(ours, theirs.state_dict()).complete
    count = sum(p.numel() for p in ours.parameters())
    assert count == sum(p.numel() for p in theirs.parameters())
    if size == "base":
        assert count == 111_907_840


def test_positions_and_patches(transformers: Any) -> None:
    theirs, pixels = donor(transformers), torch.randn(2, 3, 32, 32)
    module = pytest.importorskip("transformers.models.vit_mae.modeling_vit_mae")
    rows_first = module.build_2d_sinusoidal_position_embedding(3, 5, 48, cls_token=True)
    truth = torch.cat([rows_first[:, 24:], rows_first[:, :24]], 1)  # the published weights have columns first
    assert torch.equal(sincos_position((3, 5), 48, prefix=1), truth)
    patches = to_patches(pixels, 8)
    assert torch.equal(patches, theirs.patchify(pixels))
    assert torch.equal(from_patches(patches, (4, 4), 8), pixels)
