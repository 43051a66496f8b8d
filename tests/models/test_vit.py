"""What vision transformers promise without a donor."""

from __future__ import annotations

import pytest
import torch

import pymm
from pymm.models import VisionTransformer
from pymm.models.vit import ViTSpec, build

ROW = ViTSpec("test", 8, 48, 3, 3, 192, 0, "test", image_size=32, num_classes=10)


def test_intermediates_are_named() -> None:
    model, pixels, named = build(ROW), torch.randn(2, 3, 32, 32), dict[str, torch.Tensor]()
    logits = model(pixels, intermediates=named)
    assert list(named) == ["embed", "blocks.0", "blocks.1", "blocks.2", "norm"]
    torch.testing.assert_close(model.forward_head(named["norm"]), logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": 4}, "indices must be a number from 1 to 3, or a list, got 4"),
        ({"indices": [3]}, r"indices must be in \[-3, 3\), got \[3\]"),
        ({"output_fmt": "NHWC"}, "output_fmt must be 'NCHW' or 'NLC', got 'NHWC'"),
    ],
)
def test_intermediates_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"VisionTransformer: {message}"):
        build(ROW).forward_intermediates(torch.randn(1, 3, 32, 32), **arguments)  # type: ignore[arg-type]


def test_kept_patches_alone() -> None:
    """Of one block without attention among patches, a kept patch has the features that it has among all."""
    model, pixels = build(ROW), torch.randn(2, 3, 32, 32)
    del model.blocks[:]
    keep = torch.tensor([[3, 15, 0], [7, 1, 2]])
    all_, kept = model.forward_features(pixels), model.forward_features(pixels, keep=keep)
    assert kept.shape == (2, 4, 48)
    for i in range(2):
        torch.testing.assert_close(kept[i, 1:], all_[i, 1 + keep[i]])


def test_drop_path_is_set_for_all_blocks() -> None:
    model = pymm.create_model("vit_tiny_patch16_224", image_size=32)
    assert isinstance(model, VisionTransformer)
    model.set_drop_path(0.22)
    assert [round(block.drop_path, 3) for block in model.blocks] == [0.02 * i for i in range(12)]
    with pytest.raises(ValueError, match=r"Blocks: drop_path must be in \[0, 1\), got 1"):
        model.set_drop_path(1)


def test_mean_pooling_leaves_registers_out() -> None:
    model = pymm.create_model("vit_little_patch16_reg4_gap_256", num_classes=3, image_size=32).eval()
    assert isinstance(model, VisionTransformer)
    assert model.num_prefix_tokens == 4
    x = torch.randn(2, 8, 320)
    logits = model.forward_head(x)
    x[:, :4] = 7
    assert torch.equal(model.forward_head(x), logits)
    x[:, 4:] += torch.randn(320)
    assert not torch.equal(model.forward_head(x), logits)
