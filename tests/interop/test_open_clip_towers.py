"""open_clip's towers of other libraries: BERT of transformers that reads, ViT of timm that sees."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pymm
from pymm.interop import load_state
from pymm.models import CLIPSpec
from pymm.models.bert import BertSpec
from pymm.models.clip import build
from pymm.models.vit import ViTSpec, ViTTower
from tests.interop.compare import compare, error, randomize

VIT = ViTTower(24, 8, 48, 2, 3, 192)
BERT = BertSpec("test", 32, 2, 4, 64, 0, "test", "mean", vocab_size=50, context_length=9)
POOLERS = {"mean": "mean_pooler", "class": "cls_last_hidden_state_pooler", "pooler": "cls_pooler"}


@pytest.fixture
def open_clip() -> Any:
    pytest.importorskip("torchvision")
    pytest.importorskip("transformers")
    return pytest.importorskip("open_clip")


def config(path: Path, row: BertSpec) -> str:
    """What open_clip builds the tower from."""
    (path / "config.json").write_text(
        json.dumps(
            {
                "model_type": "bert",
                "hidden_size": row.width,
                "num_hidden_layers": row.depth,
                "num_attention_heads": row.heads,
                "intermediate_size": row.mlp_width,
                "vocab_size": row.vocab_size,
                "max_position_embeddings": row.context_length,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            }
        )
    )
    return str(path)


def vision(image: ViTTower) -> dict[str, Any]:
    return {
        "image_size": image.image_size,
        "layers": image.depth,
        "width": image.width,
        "head_width": image.width // image.heads,
        "patch_size": image.patch_size,
    }


def donor(
    open_clip: Any, path: Path, row: CLIPSpec, seeing: dict[str, Any] | None = None, **text: Any
) -> nn.Module:
    assert isinstance(row.text, BertSpec)
    if seeing is None:
        assert isinstance(row.image, ViTTower)
        seeing = vision(row.image)
    reading = {
        "hf_model_name": config(path, row.text),
        "hf_model_pretrained": False,
        "hf_pooler_type": POOLERS[row.text.pooling],
        "hf_proj_type": "linear",
    }
    return open_clip.CustomTextCLIP(row.embed, seeing, {**reading, **text}).eval()


def inputs(vocabulary: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(1, vocabulary, (3, 9))
    tokens[1, 4:] = 0
    return torch.randn(3, 3, size, size), tokens


@pytest.mark.parametrize("pooling", POOLERS)
def test_bert(open_clip: Any, tmp_path: Path, pooling: Any) -> None:
    row = CLIPSpec("test", VIT, replace(BERT, pooling=pooling), 20, "gelu", 0, "test")
    batch = inputs(50, 24)
    theirs = donor(open_clip, tmp_path, row)
    # Of the two segments one is used, so the other's gradient is zero in both.
    compare(build(row).eval(), theirs, lambda m: m(*batch))


def test_load(open_clip: Any, tmp_path: Path) -> None:
    row = pymm.models.describe("clip_tiny_bert")
    assert isinstance(row, CLIPSpec)
    theirs = donor(open_clip, tmp_path, row)
    randomize(theirs)
    ours = pymm.load(theirs.state_dict())
    assert ours.arch == "clip_tiny_bert"
    assert ours.load_report.donor == "open_clip, BERT"
    batch = inputs(2048, 48)
    with torch.no_grad():
        for got, truth in zip(ours(*batch), theirs(*batch), strict=True):
            assert error(got, truth) < 1e-5
    state = theirs.state_dict()
    state["text.proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=r"load: arch must be given, for no row fits"):
        pymm.load(state)
    with pytest.raises(ValueError, match=r"1 mismatched \(text.head.weight: expected \(128, 128\), got"):
        pymm.load(state, "clip_tiny_bert")


def test_two_layers_behind_bert_are_refused(open_clip: Any, tmp_path: Path) -> None:
    row = pymm.models.describe("clip_tiny_bert")
    assert isinstance(row, CLIPSpec)
    state = donor(open_clip, tmp_path, row, hf_proj_type="mlp").state_dict()
    with pytest.raises(ValueError, match=r"1 missing \(text.head.weight\); 2 unused \(text.proj.0.weight\)"):
        pymm.load(state, "clip_tiny_bert")


def test_timms_vit(open_clip: Any, tmp_path: Path) -> None:
    """With a projection of open_clip's, and with timm's classifier in its place."""
    image = pymm.models.describe("vit_tiny_patch16_224")
    assert isinstance(image, ViTSpec)
    row = CLIPSpec("test", image, BERT, 20, "gelu", 0, "test")
    seeing = {"image_size": 224, "timm_model_name": image.name, "timm_pool": "token", "timm_proj_bias": True}
    batch, ours = inputs(50, 224), build(row).eval()
    compare(ours, donor(open_clip, tmp_path, row, {**seeing, "timm_proj": "linear"}), lambda m: m(*batch))
    theirs = donor(open_clip, tmp_path, row, {**seeing, "timm_proj": ""})
    randomize(theirs)
    assert load_state(ours, theirs.state_dict()).complete
    with torch.no_grad():
        assert error(ours.encode_image(batch[0]), theirs.encode_image(batch[0])) < 1e-5
