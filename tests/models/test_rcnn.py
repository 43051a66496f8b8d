"""R-CNN and its parts by themselves; tests/interop/test_rcnn.py compares the whole with torchvision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import pymm
from pymm.models import RCNN, describe, rcnn
from pymm.models.boxes import box_encoding, box_iou, clip_boxes, decode_boxes, encode_boxes, scale_boxes
from pymm.models.pyramid import FeaturePyramid, FrozenBatchNorm, freeze_batch_norms


@pytest.fixture
def tiny() -> RCNN:
    row = describe("fasterrcnn_tiny")
    assert isinstance(row, rcnn.RCNNSpec)
    return rcnn.build(replace(row, width=8, pyramid=16, vector=24, num_classes=4)).eval()


def random_boxes(count: int) -> Tensor:
    corner = torch.rand(count, 2) * 50
    return torch.cat([corner, corner + 1 + torch.rand(count, 2) * 40], 1)


def test_offsets_go_there_and_back() -> None:
    boxes, references = random_boxes(20).double(), random_boxes(20).double()
    weights = (10.0, 10.0, 5.0, 5.0)
    offsets = encode_boxes(boxes, references, weights)
    torch.testing.assert_close(decode_boxes(offsets, references, weights), boxes)
    several = offsets[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(decode_boxes(several, references, weights), boxes[:, None].expand(-1, 3, -1))


def test_a_box_does_not_explode() -> None:
    found = decode_boxes(torch.tensor([[0.0, 0, 1e4, 1e4]]), torch.tensor([[0.0, 0, 2, 2]]))
    assert found.isfinite().all()
    assert (found[:, 2] - found[:, 0]).item() == pytest.approx(2 * 1000 / 16)


def test_iou() -> None:
    a = torch.tensor([[0.0, 0, 2, 2], [5, 5, 6, 6]])
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[1 / 7, 1.0], [0, 0]]))


def test_clip_and_scale() -> None:
    boxes = torch.tensor([[-3.0, -1, 30, 12]])
    assert clip_boxes(boxes, (10, 20)).tolist() == [[0, 0, 20, 10]]
    assert scale_boxes(torch.tensor([[1.0, 2, 3, 4]]), (10, 20), (20, 80)).tolist() == [[4, 4, 12, 8]]


def test_encodings() -> None:
    boxes, size = torch.tensor([[10.0, 20, 30, 60]]), (100, 200)
    corners = [0.05, 0.2, 0.15, 0.6]
    assert box_encoding(boxes, size)[0].tolist() == pytest.approx(corners)
    assert box_encoding(boxes, size, 5)[0].tolist() == pytest.approx([*corners, 0.04])
    assert box_encoding(boxes, size, 7)[0].tolist() == pytest.approx([*corners, 0.1, 0.4, 0.04])
    with pytest.raises(ValueError, match=r"^box_encoding: numbers must be 4, 5 or 7, got 6"):
        box_encoding(boxes, size, 6)


def test_frozen_norms_compute_what_norms_in_eval_mode_do() -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sequential(nn.BatchNorm2d(6), nn.ReLU()))
    norm = model[1][0]
    for p in (norm.weight, norm.bias):
        nn.init.uniform_(p, 0.5, 1.5)
    norm.running_mean.uniform_(), norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 7, 7)
    expected = model.eval()(x)
    freeze_batch_norms(model)
    assert isinstance(model[1][0], FrozenBatchNorm)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    torch.testing.assert_close(model.train()(x), expected)


def test_pyramid_adds_the_coarser_map_enlarged() -> None:
    pyramid = FeaturePyramid((2, 3), 4)
    fine, coarse = torch.randn(1, 2, 6, 5), torch.randn(1, 3, 3, 3)
    first, second, last = pyramid([fine, coarse])
    top = pyramid.lateral[1](coarse)
    at = torch.tensor([0, 0, 1, 1, 2])  # five columns from three, by repetition
    enlarged = top.repeat_interleave(2, 2)[..., at]
    torch.testing.assert_close(first, pyramid.output[0](pyramid.lateral[0](fine) + enlarged))
    torch.testing.assert_close(second, pyramid.output[1](top))
    assert torch.equal(last, second[:, :, ::2, ::2])


def test_anchors_are_where_and_as_large_as_they_should_be(tiny: RCNN) -> None:
    assert tiny.proposals is not None
    maps = [torch.zeros(1, 16, 128 // s, 64 // s) for s in (4, 8, 16, 32, 64)]
    anchors = tiny.proposals.anchors(maps, (128, 64))
    assert [len(a) for a in anchors] == [3 * x.shape[2] * x.shape[3] for x in maps]
    middle = (anchors[1][:, :2] + anchors[1][:, 2:]) / 2
    assert middle[3 * 8 : 3 * 8 + 6].tolist() == [[0, 8]] * 3 + [[8, 8]] * 3  # second row, eight columns
    sides = anchors[1][:3, 2:] - anchors[1][:3, :2]
    assert sides.tolist() == [[40, 20], [28, 28], [20, 40]]


def test_a_box_is_pooled_from_the_map_of_its_size(tiny: RCNN) -> None:
    maps = [torch.full((1, 2, 256 // s, 256 // s), float(s)) for s in (4, 8, 16, 32, 64)]
    boxes = torch.tensor([[0.0, 0, side, side] for side in (20, 111, 113, 223, 225, 256)])
    pooled = tiny.pool(maps, [boxes])
    assert pooled.shape == (6, 2, 7, 7)
    assert pooled.mean((1, 2, 3)).round().tolist() == [4, 4, 8, 8, 16, 16]


def test_bytes_and_numbers_are_the_same_picture(tiny: RCNN) -> None:
    image = torch.randint(0, 256, (3, 100, 77), dtype=torch.uint8)
    normalized = tiny.backbone.normalize(image[None], torch.float32)[0]
    a, b = tiny.prepare([image, normalized]).pixels
    assert torch.equal(a, b)
    prepared = tiny.prepare([image])
    assert prepared.originals == [(100, 77)]
    assert prepared.sizes == [(166, 128)]
    assert prepared.pixels.shape == (1, 3, 192, 128)


def test_boxes_come_back_in_pixels_of_the_picture(tiny: RCNN) -> None:
    tiny.score = 0.0
    image = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8)
    with torch.no_grad():
        (found,) = tiny([image])
    assert len(found.scores) == tiny.most
    assert (found.boxes >= 0).all()
    assert (found.boxes <= torch.tensor([60.0, 40, 60, 40]) + 1e-4).all()
    assert found.boxes[:, 2].max() > 50
    assert (found.scores[:-1] >= found.scores[1:]).all()
    assert set(found.labels.tolist()) <= {1, 2, 3}


def test_no_regions(tiny: RCNN) -> None:
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        found = tiny([image, image], [torch.zeros(0, 4), torch.tensor([[3.0, 3, 30, 40]])])
    assert found[0].boxes.shape == (0, 4)


def test_errors(tiny: RCNN) -> None:
    with pytest.raises(ValueError, match=r"^RCNN: images must be at least one picture"):
        tiny([])
    with pytest.raises(ValueError, match=r"^RCNN: images must be pictures \(3, h, w\), got \(1, 8, 8\)"):
        tiny([torch.zeros(1, 8, 8)])


def test_bfloat16(tiny: RCNN) -> None:
    tiny.score = 0.0
    image = torch.randint(0, 256, (3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        expected = tiny.classify(tiny.maps(tiny.prepare([image]).pixels), [random_boxes(9)])[0]
        tiny.to(torch.bfloat16)
        (found,) = tiny([image])
        assert found.boxes.dtype == found.scores.dtype == torch.float32
    assert expected.isfinite().all()


def test_create_model_with_other_classes() -> None:
    model = pymm.create_model("fasterrcnn_tiny", num_classes=7, image_size=96)
    assert isinstance(model, RCNN)
    assert (model.num_classes, model.image_size) == (7, 96)
