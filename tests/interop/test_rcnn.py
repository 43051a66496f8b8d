"""Faster and Fast R-CNN against torchvision: detections, losses, gradients, names."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymm
from pymm.interop import load_state
from pymm.models import RCNN, RCNNSpec, describe, rcnn
from pymm.objectives import DetectionObjective
from tests.interop.compare import error, randomize
from tests.torchvision_shim import require

SPEC = RCNNSpec(
    "test",
    (2, 2, 2, 2),
    False,
    0,
    "test",
    image_size=96,
    max_size=140,
    num_classes=5,
    vector=32,
    anchors=(16, 24, 32, 48, 64),
)


def donor(dtype: torch.dtype = torch.float32) -> Any:
    """torchvision's detector of the same sizes, with weights that find something."""
    detection = require().models.detection
    torchvision = require()
    body = torchvision.models.resnet18(norm_layer=torchvision.ops.misc.FrozenBatchNorm2d)
    backbone = detection.backbone_utils._resnet_fpn_extractor(body, 5)
    assert SPEC.anchors is not None
    anchors = detection.anchor_utils.AnchorGenerator(
        tuple((size,) for size in SPEC.anchors), ((0.5, 1.0, 2.0),) * 5
    )
    head = detection.faster_rcnn.TwoMLPHead(256 * 49, 32)
    predictor = detection.faster_rcnn.FastRCNNPredictor(32, 5)
    model = detection.FasterRCNN(
        backbone,
        min_size=96,
        max_size=140,
        rpn_anchor_generator=anchors,
        box_head=head,
        box_predictor=predictor,
    )
    randomize(model)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, torchvision.ops.misc.FrozenBatchNorm2d):
            for name, low in (("weight", 0.4), ("bias", 0.0), ("running_mean", -0.1), ("running_var", 0.5)):
                value = getattr(module, name)
                value.copy_(torch.rand(value.shape, generator=generator) * 0.3 + low)
    return model.to(dtype)


def ours(theirs: nn.Module, dtype: torch.dtype = torch.float32) -> RCNN:
    model = rcnn.build(SPEC).to(dtype)
    report = load_state(model, theirs.state_dict())
    assert report.complete, report
    return model


def pictures(dtype: torch.dtype) -> list[Tensor]:
    """In [0, 1], as torchvision takes them, of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [torch.rand((3, *size), generator=generator, dtype=dtype) for size in ((90, 120), (64, 64))]


def normalized(images: list[Tensor]) -> list[Tensor]:
    mean, std = (torch.tensor(v, dtype=images[0].dtype)[:, None, None] for v in (SPEC.mean, SPEC.std))
    return [(image - mean) / std for image in images]


BOXES = [
    torch.tensor([[10.0, 20, 60, 80], [50, 5, 110, 44], [3, 3, 20, 30]]),
    torch.tensor([[8.0, 8, 40, 50]]),
]
LABELS = [torch.tensor([1, 4, 2]), torch.tensor([3])]


def test_detections() -> None:
    theirs = donor().eval()
    model = ours(theirs).eval()
    images = pictures(torch.float32)
    with torch.no_grad():
        truth, found = theirs(images), model(normalized(images))
    assert sum(len(t["scores"]) for t in truth) > 20
    for t, f in zip(truth, found, strict=True):
        assert torch.equal(f.labels, t["labels"])
        assert error(f.scores, t["scores"]) < 1e-5
        assert error(f.boxes, t["boxes"]) < 1e-5


@pytest.mark.parametrize("empty", [False, True])
def test_losses_and_gradients(empty: bool) -> None:
    """Float64, for one anchor on the other side of a threshold would be another sample."""
    dtype = torch.float64
    theirs = donor(dtype).train()
    model = ours(theirs, dtype).train()
    images = pictures(dtype)
    boxes = [b.to(dtype) for b in BOXES]
    labels = list(LABELS)
    if empty:
        boxes[1], labels[1] = boxes[1][:0], labels[1][:0]
    targets = [{"boxes": b, "labels": label} for b, label in zip(boxes, labels, strict=True)]
    torch.manual_seed(5)
    truth = theirs(images, targets)
    torch.manual_seed(5)
    for _ in images:  # torchvision draws the size of each picture, of which it has one
        torch.empty(1).uniform_()
    losses = DetectionObjective()(model, normalized(images), boxes, labels)
    names = {
        "objectness": "loss_objectness",
        "proposals": "loss_rpn_box_reg",
        "classes": "loss_classifier",
        "boxes": "loss_box_reg",
    }
    assert losses.keys() == names.keys()
    for name, value in losses.items():
        assert error(value, truth[names[name]]) < 1e-5, name
    sum(losses.values()).backward()
    sum(truth.values()).backward()
    with torch.no_grad():  # the gradients go through the key map in the weights' places
        for p in theirs.parameters():
            assert p.grad is not None
            p.copy_(p.grad)
    expected = dict(ours(theirs, dtype).named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert error(p.grad, expected[name].detach()) < 1e-4, name


def test_given_proposals() -> None:
    """Fast R-CNN is the second stage alone: torchvision's, handed the regions."""
    theirs = donor().eval()
    row = replace(SPEC, anchors=None)
    model = rcnn.build(row).eval()
    report = load_state(model, {k: v for k, v in theirs.state_dict().items() if not k.startswith("rpn.")})
    assert report.complete, report
    images = pictures(torch.float32)
    with torch.no_grad():
        batch, _ = theirs.transform(images)
        regions = [torch.rand(40, 4) * 50 + torch.tensor([0.0, 0, 12, 12]) for _ in images]
        regions = [
            torch.cat([b[:, :2].minimum(b[:, 2:]), b[:, :2].maximum(b[:, 2:]) + 4], 1) for b in regions
        ]
        sizes = [image.shape[-2:] for image in images]
        resize = require().models.detection.transform.resize_boxes
        inside = [resize(b, s, t) for b, s, t in zip(regions, sizes, batch.image_sizes, strict=True)]
        truth, _ = theirs.roi_heads(theirs.backbone(batch.tensors), inside, batch.image_sizes)
        truth = theirs.transform.postprocess(truth, batch.image_sizes, sizes)
        found = model(normalized(images), regions)
    for t, f in zip(truth, found, strict=True):
        assert len(f.scores) > 5
        assert torch.equal(f.labels, t["labels"])
        assert error(f.scores, t["scores"]) < 1e-5
        assert error(f.boxes, t["boxes"]) < 1e-5
    with pytest.raises(ValueError, match=r"^RCNN: proposals must be given"):
        model(normalized(images))


def test_canonical_size() -> None:
    """Names, shapes and the published count, with the names of today and of the published file."""
    detection = require().models.detection
    weights = detection.FasterRCNN_ResNet50_FPN_Weights.DEFAULT
    assert describe("fasterrcnn_resnet50_fpn").parameters == weights.meta["num_params"]
    with torch.device("meta"):
        theirs = detection.fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None)
        model = pymm.create_model("fasterrcnn_resnet50_fpn")
    state = theirs.state_dict()
    old = {
        name.replace("conv.0.0.", "conv.").replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        if name.startswith(("rpn", "backbone.fpn"))
        else name: value
        for name, value in state.items()
    }
    assert "backbone.fpn.inner_blocks.0.weight" in old
    for names in (state, old):
        report = load_state(model, names)
        assert report.complete, report
