"""BEiT against timm and transformers: classification and the prediction of hidden tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pymm
from pymm.interop import load_state, to_donor
from pymm.models import BEiT, BEiTSpec, beit, describe
from pymm.objectives import MaskedTokens
from tests.interop.compare import GRADIENT, check_way_back, compare, error, randomize

ROW = BEiTSpec("test", 8, 48, 3, 3, 0.1, 0, "", 32, num_classes=10)
PRETRAINING = BEiTSpec("test", 8, 48, 3, 3, 0.1, 0, "", 32, num_classes=0, purpose="pretraining")


@pytest.fixture
def timm() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("timm")


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


def config(transformers: Any, **options: Any) -> Any:
    sizes = {"hidden_size": 48, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 3}
    return transformers.BeitConfig(
        **sizes, image_size=32, patch_size=8, layer_norm_eps=1e-6, drop_path_rate=0.0, **options
    )


def classifier(transformers: Any) -> Any:
    options = {"use_relative_position_bias": True, "use_mean_pooling": True, "num_labels": 10}
    return transformers.BeitForImageClassification(config(transformers, **options)).eval()


def pretraining(transformers: Any) -> Any:
    options = {"use_shared_relative_position_bias": True, "use_mask_token": True, "use_mean_pooling": True}
    return transformers.BeitForMaskedImageModeling(config(transformers, **options, vocab_size=60)).eval()


def timm_beit(timm: Any, **options: Any) -> Any:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return timm.models.beit.Beit(**sizes, use_abs_pos_emb=False, init_values=0.1, **options)


def test_timm(timm: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    theirs = timm_beit(timm, use_rel_pos_bias=True, num_classes=10)
    compare(beit.build(ROW), theirs, lambda m: (m(pixels), m.forward_features(pixels)))


def test_timm_shared_bias(timm: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)
    theirs = timm_beit(timm, use_shared_rel_pos_bias=True, num_classes=0, global_pool="token")
    compare(beit.build(PRETRAINING), theirs, lambda m: (m(pixels), m.forward_features(pixels)))


def test_transformers(transformers: Any) -> None:
    pixels = torch.randn(2, 3, 32, 32)

    def run(model: Any) -> tuple[Tensor, ...]:
        return (model(pixels) if isinstance(model, BEiT) else model(pixels).logits,)

    compare(beit.build(ROW), classifier(transformers), run)


def test_transformers_other_resolution(transformers: Any) -> None:
    """The table is interpolated for an input, and alike as weights are read for a larger model."""
    theirs = classifier(transformers)
    randomize(theirs)
    ours, larger = beit.build(ROW), beit.build(BEiTSpec("", 8, 48, 3, 3, 0.1, 0, "", 48, num_classes=10))
    assert load_state(ours, theirs.state_dict()).complete
    report = load_state(larger, theirs.state_dict())
    assert report.complete
    assert report.resampled == tuple(f"biases.{i}.table" for i in range(3))
    pixels = torch.randn(2, 3, 48, 48)
    truth = theirs(pixels).logits
    assert error(ours(pixels), truth) < 1e-5
    assert error(larger(pixels), truth) < 1e-5


def test_hidden_tokens(transformers: Any) -> None:
    """Loss, logits and every gradient, those of the shared table, the mask token and its head among them."""
    theirs = pretraining(transformers)
    randomize(theirs)
    ours, objective = beit.build(PRETRAINING), MaskedTokens(48, 60)
    assert load_state(ours, theirs.state_dict()).complete
    apart = {
        "mask_token": theirs.beit.embeddings.mask_token.flatten(),
        "head.weight": theirs.lm_head.weight,
        "head.bias": theirs.lm_head.bias,
    }
    objective.load_state_dict(apart)
    pixels, tokens = torch.randn(3, 3, 32, 32), torch.randint(60, (3, 16))
    mask = torch.stack([torch.randperm(16) < 6 for _ in range(3)])
    truth = theirs(pixels, bool_masked_pos=mask, labels=tokens[mask])
    features = ours.forward_features(pixels, mask=mask, mask_token=objective.mask_token)
    assert error(objective.head(features[:, 1:]), truth.logits) < 1e-5
    losses, right = objective(features, tokens, mask)
    assert error(losses.mean(), truth.loss) < 1e-5
    assert error(right.mean(), (truth.logits[mask].argmax(1) == tokens[mask]).float().mean()) < 1e-6
    losses.mean().backward()
    truth.loss.backward()
    gradients = gradients_of(theirs)
    twin = beit.build(PRETRAINING)
    assert load_state(twin, gradients).complete
    for (name, wanted), p in zip(twin.named_parameters(), ours.parameters(), strict=True):
        assert p.grad is not None, name
        assert error(p.grad, wanted, 1e-9) < GRADIENT, name
    for name, theirs_name in (
        ("mask_token", "beit.embeddings.mask_token"),
        ("head.weight", "lm_head.weight"),
        ("head.bias", "lm_head.bias"),
    ):
        grad = objective.get_parameter(name).grad
        assert grad is not None
        assert error(grad, gradients[theirs_name].reshape(grad.shape)) < GRADIENT, name


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["classifier", "pretraining"])
def test_files(transformers: Any, tmp_path: Path, kind: str) -> None:
    theirs = classifier(transformers) if kind == "classifier" else pretraining(transformers)
    randomize(theirs)
    theirs.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    ours, pixels = beit.build(ROW if kind == "classifier" else PRETRAINING), torch.randn(2, 3, 32, 32)
    assert load_state(ours, state).complete
    if kind == "classifier":
        assert error(ours(pixels), theirs(pixels).logits) < 1e-5
    else:
        features = theirs.layernorm(theirs.beit(pixels).last_hidden_state)
        assert error(ours.forward_features(pixels), features) < 1e-5
    extra = ("lm_head.", "beit.embeddings.mask_token")
    check_way_back(ours, "transformers", {k: v for k, v in state.items() if not k.startswith(extra)})


@pytest.mark.parametrize("name", ["beit_mini_patch8_64", "beit_mini_patch8_64_pretraining"])
@pytest.mark.parametrize("donor", ["timm", "transformers"])
def test_rows_are_found(name: str, donor: str) -> None:
    """By names and shapes, at another resolution."""
    model: Any = pymm.create_model(name, image_size=32).eval()
    found: Any = pymm.load(to_donor(model, donor))
    assert found.image_size == 32
    pixels = torch.randn(1, 3, 32, 32)
    assert torch.equal(found.forward_features(pixels), model.forward_features(pixels))


def test_rows_are_timms(timm: Any) -> None:
    rows = [describe(n) for n in pymm.list_models("beit_*") if "pretraining" not in n and "mini" not in n]
    assert len(rows) == 5
    for row in rows:
        with torch.device("meta"):
            theirs, ours = timm.create_model(row.name), pymm.create_model(row.name)
        assert load_state(ours, theirs.state_dict()).complete, row.name
        assert sum(p.numel() for p in theirs.parameters()) == row.parameters, row.name
        assert (row.mean, row.std) == (theirs.default_cfg["mean"], theirs.default_cfg["std"])


def test_pretraining_row(transformers: Any) -> None:
    """Model and objective have what the published pretraining checkpoint has."""
    options = {"use_shared_relative_position_bias": True, "use_mask_token": True}
    with torch.device("meta"):
        theirs = transformers.BeitForMaskedImageModeling(transformers.BeitConfig(vocab_size=8192, **options))
        ours = pymm.create_model("beit_base_patch16_224_pretraining")
        objective = MaskedTokens(768, 8192)
    assert load_state(ours, theirs.state_dict()).complete
    count = sum(p.numel() for module in (ours, objective) for p in module.parameters())
    assert count == sum(p.numel() for p in theirs.parameters()) == 91_965_776
