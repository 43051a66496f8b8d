"""torchvision's own operators run here, and transformers imports: what the other tests compare with."""

from __future__ import annotations

import pytest
import torch

from tests.torchvision_shim import require


def test_native_operators() -> None:
    torchvision = require()
    assert torchvision.extension._has_ops()
    boxes = torch.tensor([[0.0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.1, 0.9, 0.5]), 0.5).tolist() == [1, 2]
    features = torch.rand(1, 4, 16, 16, requires_grad=True)
    torchvision.ops.roi_align(features, [boxes], (3, 3)).sum().backward()
    assert features.grad is not None
    assert features.grad.sum().item() == pytest.approx(3 * 4 * 9, rel=0.5)


def test_transformers_runs_its_clip() -> None:
    require()
    transformers = pytest.importorskip("transformers")
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**tower, "vocab_size": 9, "eos_token_id": 8},
            vision_config={**tower, "image_size": 8, "patch_size": 4},
            projection_dim=4,
        )
    )
    tokens = torch.tensor([[1, 2, 8], [3, 8, 8]])
    out = model(input_ids=tokens, pixel_values=torch.randn(2, 3, 8, 8))
    assert out.logits_per_image.shape == (2, 2)
