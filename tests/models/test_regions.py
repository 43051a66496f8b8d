"""Region vectors and grid features."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.models import RCNN, GridFeatures, RegionExtractor, describe, rcnn, rcnn_c4, resnet
from pymm.models.boxes import box_iou
from pymm.models.resnet import ResNetSpec
from pymm.models.stages import parameter_stages


@pytest.fixture
def detector() -> RCNN:
    row = describe("fasterrcnn_tiny")
    assert isinstance(row, rcnn.RCNNSpec)
    return rcnn.build(replace(row, width=8, pyramid=16, vector=24, num_classes=4)).eval()


@pytest.fixture
def c4() -> RCNN:
    row = describe("fasterrcnn_tiny_c4")
    assert isinstance(row, rcnn_c4.RCNNC4Spec)
    return rcnn_c4.build(replace(row, width=8, num_classes=4)).eval()


def pictures() -> list[Tensor]:
    return [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((100, 140), (64, 64))]


@pytest.mark.parametrize("vectors", ["head", "stage"])
@torch.no_grad()
def test_regions(detector: RCNN, vectors: Any) -> None:
    extractor = RegionExtractor(detector, vectors=vectors, least=5, most=12, confidence=0.9)
    found = extractor(pictures())
    assert [r.size for r in found] == [(100, 140), (64, 64)]
    for r in found:
        assert r.vectors.shape == (5, extractor.num_features)  # untrained, it is sure of nothing
        assert r.boxes.shape == (5, 4)
        assert (r.scores[:-1] >= r.scores[1:]).all()
        assert r.labels.min() >= 1
        assert r.labels.max() <= 3
        corners = r.encoded()
        assert corners.min() >= 0
        assert corners.max() <= 1 + 1e-6
        assert r.encoded(7).shape == (5, 7)


@torch.no_grad()
def test_a_detector_whose_head_is_the_last_stage(c4: RCNN) -> None:
    extractor = RegionExtractor(c4, least=5, most=5)
    assert extractor.num_features == 64
    found = extractor(pictures())
    assert [r.vectors.shape for r in found] == [(5, 64), (5, 64)]
    with pytest.raises(
        ValueError, match="vectors must be 'head' for a detector whose head is the last stage"
    ):
        RegionExtractor(c4, vectors="stage")
    stages = parameter_stages(c4)
    assert len(stages) == 5
    assert any(name.startswith("head.stage.") for name in stages[-1])


@torch.no_grad()
def test_a_fixed_number(detector: RCNN) -> None:
    found = RegionExtractor(detector, least=36, most=36)(pictures())
    assert [len(r.vectors) for r in found] == [36, 36]


@torch.no_grad()
def test_the_vectors_are_those_of_the_boxes(detector: RCNN) -> None:
    """Handed its own boxes, the second stage gives the same vectors, scores and classes."""
    for image in pictures():  # one at a time: what pads a picture shows in the maps at its border
        (r,) = RegionExtractor(detector, confidence=0.0, most=30)([image])
        prepared = detector.prepare([image])
        pooled = detector.pool(detector.maps(prepared.pixels), prepared.boxes([r.boxes]))
        vectors = detector.head.vectors(pooled)
        torch.testing.assert_close(r.vectors, vectors, rtol=1e-4, atol=1e-4)
        scores = detector.head(vectors)[0].softmax(-1)
        at = torch.arange(len(scores))
        torch.testing.assert_close(r.scores, scores[at, r.labels], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_stage_vectors_are_of_the_crop(detector: RCNN) -> None:
    """A region that is the whole picture is what the network makes of the picture, nearly."""
    image = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    detector.image_size = 224
    box = torch.tensor([[0.0, 0, 224, 224]])
    (r,) = RegionExtractor(detector, vectors="stage", least=1)(image, [box])
    stages: dict[str, Tensor] = {}
    detector.backbone.forward_features(image, intermediates=stages)
    pooled = F.avg_pool2d(F.pad(stages["stages.2"], (0, 1, 0, 1), mode="replicate"), 2, 1)
    expected = detector.backbone.stages[3](pooled).mean((2, 3))
    torch.testing.assert_close(r.vectors, expected, rtol=1e-3, atol=1e-3)


def test_the_choice_of_regions(detector: RCNN) -> None:
    extractor = RegionExtractor(detector, least=1, most=3, confidence=0.3, overlap=0.5)
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 9, 10], [50, 50, 60, 60]])
    assert box_iou(boxes[:1], boxes[1:3]).min() > 0.5
    scores = torch.tensor(
        [[0.1, 0.8, 0.1, 0], [0.1, 0.7, 0.2, 0], [0.5, 0.0, 0.1, 0.4], [0.9, 0.05, 0.05, 0]]
    )
    rows, best, labels = extractor._chosen(boxes, scores)
    # The second is the first one's class and overlaps it: only its other class is left, which is not sure.
    assert rows.tolist() == [0, 2]
    assert best.tolist() == pytest.approx([0.8, 0.4])
    assert labels.tolist() == [1, 3]
    extractor.least = 3
    assert extractor._chosen(boxes, scores)[0].tolist() == [0, 2, 1]
    extractor.most = 1
    extractor.least = 1
    assert extractor._chosen(boxes, scores)[0].tolist() == [0]
    assert len(extractor._chosen(boxes[:0], scores[:0])[0]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vectors": "pixels"}, "vectors must be 'head' or 'stage'"),
        ({"least": 5, "most": 4}, "least and most must be 1 <= least <= most, got 5 and 4"),
        ({"confidence": 2.0}, r"confidence must be in \[0, 1\], got 2.0"),
    ],
)
def test_errors(detector: RCNN, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^RegionExtractor: {message}"):
        RegionExtractor(detector, **options)


@pytest.fixture
def backbone() -> resnet.ResNet:
    return resnet.build(ResNetSpec("test", (1, 1, 1, 1), False, 0, width=8, num_classes=0)).eval()


@torch.no_grad()
def test_grid(backbone: resnet.ResNet) -> None:
    pixels = torch.randn(2, 3, 128, 192)
    tokens, keep = GridFeatures(backbone)(pixels)
    features = backbone.forward_features(pixels)
    assert tokens.shape == (2, 2 * 3, 64)
    assert keep.tolist() == [list(range(6))] * 2
    assert torch.equal(tokens[1, 4], features[1, :, 2:4, 2:4].amax((1, 2)))
    tokens, _ = GridFeatures(backbone, pool=False)(pixels)
    assert torch.equal(tokens[0, 7], features[0, :, 1, 1])


@torch.no_grad()
def test_random_places_in_training_only(backbone: resnet.ResNet) -> None:
    pixels = torch.randn(2, 3, 256, 256)
    grid = GridFeatures(backbone, sample=5).eval()
    every, _ = grid(pixels)
    assert every.shape == (2, 16, 64)
    grid.training = True  # the batch norms stay as they are, so that the tokens are the same
    some, keep = grid(pixels)
    assert some.shape == (2, 5, 64)
    assert (keep[:, 1:] > keep[:, :-1]).all()
    for i in range(2):
        assert torch.equal(some[i], every[i, keep[i]])
    again, _ = grid(pixels, keep=keep)
    assert torch.equal(again, some)
    with pytest.raises(ValueError, match=r"^GridFeatures: pixels must be of 64 pixels a side"):
        grid(torch.randn(1, 3, 32, 32))
