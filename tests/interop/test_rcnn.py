"""Faster and Fast R-CNN against torchvision: detections, losses, gradients, names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pymm
from pymm.interop import load_state
from pymm.models import (
    RCNN,
    RCNNC4Spec,
    RCNNSpec,
    RegionExtractor,
    ResNetSpec,
    describe,
    rcnn,
    rcnn_c4,
    resnet,
)
from pymm.models.pyramid import freeze_batch_norms
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


def randomized(model: Any) -> Any:
    """With weights that find something."""
    randomize(model)
    generator = torch.Generator().manual_seed(3)
    for module in model.modules():
        if isinstance(module, require().ops.misc.FrozenBatchNorm2d):
            for name, low in (("weight", 0.4), ("bias", 0.0), ("running_mean", -0.1), ("running_var", 0.5)):
                value = getattr(module, name)
                value.copy_(torch.rand(value.shape, generator=generator) * 0.3 + low)
    return model


def donor(dtype: torch.dtype = torch.float32, pooling: str = "align") -> Any:
    """torchvision's detector of the same sizes."""
    torchvision = require()
    detection = torchvision.models.detection
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
    if pooling == "max":
        model.roi_heads.box_roi_pool = LargestValues()
    return randomized(model).to(dtype)


class LargestValues(nn.Module):
    """torchvision's roi_pool on the map that torchvision's own pooling takes for a box."""

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], shapes: list[tuple[int, int]]) -> Tensor:
        ops = require().ops
        levels = ops.poolers.LevelMapper(2, 5)(boxes)
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rows = torch.cat([image, torch.cat(boxes)], 1)
        pooled = [
            ops.roi_pool(x[str(int(level))], row[None], 7, 0.25 / 2 ** int(level))
            for level, row in zip(levels, rows, strict=True)
        ]
        return torch.cat(pooled)


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


def check_detections(theirs: Any, model: RCNN, dtype: torch.dtype = torch.float32) -> None:
    images = pictures(dtype)
    with torch.no_grad():
        truth, found = theirs(images), model(normalized(images))
    assert sum(len(t["scores"]) for t in truth) > 20
    for t, f in zip(truth, found, strict=True):
        assert torch.equal(f.labels, t["labels"])
        assert error(f.scores, t["scores"]) < 1e-5
        assert error(f.boxes, t["boxes"]) < 1e-5


def test_detections() -> None:
    theirs = donor().eval()
    check_detections(theirs, ours(theirs).eval())


def check_losses(
    theirs: Any, model: RCNN, expected: Callable[[], RCNN], empty: bool = False, regions: int = 512
) -> None:
    """Float64, for one anchor on the other side of a threshold would be another sample.

    `expected` makes a model of ours whose weights are the donor's.
    """
    dtype = torch.float64
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
    losses = DetectionObjective(regions=regions)(model, normalized(images), boxes, labels)
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
    gradients = dict(expected().named_parameters())
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert error(p.grad, gradients[name].detach()) < 1e-4, name


@pytest.mark.parametrize("empty", [False, True])
def test_losses_and_gradients(empty: bool) -> None:
    theirs = donor(torch.float64).train()
    check_losses(theirs, ours(theirs, torch.float64).train(), lambda: ours(theirs, torch.float64), empty)


def test_losses_and_gradients_from_largest_values() -> None:
    """Of losses, not of detections: regions that share their largest values have one score, in any order."""
    theirs = donor(torch.float64, pooling="max").train()

    def made() -> RCNN:
        model = rcnn.build(replace(SPEC, pooling="max")).double()
        assert load_state(model, theirs.state_dict()).complete
        return model

    check_losses(theirs, made().train(), made)


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


C4 = RCNNC4Spec(
    "test",
    (1, 1, 1, 1),
    True,
    0,
    "test",
    image_size=96,
    max_size=140,
    num_classes=5,
    anchors=(16, 32, 64),
    bins=6,
)
PROPOSED, SAMPLED = 50, 16  # fewer regions than usual, each of which passes a stage of 2048 channels


class LastStage(nn.Module):
    """A box head of torchvision's parts: the last stage of its residual network, and the mean."""

    def __init__(self, stage: nn.Module) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.stage(x)
        return pooled.mean((2, 3))


def c4_donor(spec: RCNNC4Spec) -> Any:
    """torchvision's FasterRCNN on the third stage of one of its residual networks."""
    torchvision = require()
    detection = torchvision.models.detection
    body = torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        list(spec.depths),
        norm_layer=torchvision.ops.misc.FrozenBatchNorm2d,
    )
    names = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")
    backbone: Any = nn.Sequential(OrderedDict((name, getattr(body, name)) for name in names))
    backbone.out_channels = 1024
    return detection.FasterRCNN(
        backbone,
        min_size=spec.image_size,
        max_size=spec.max_size,
        rpn_anchor_generator=detection.anchor_utils.AnchorGenerator((spec.anchors,), ((0.5, 1.0, 2.0),)),
        rpn_post_nms_top_n_test=PROPOSED,
        box_batch_size_per_image=SAMPLED,
        box_roi_pool=torchvision.ops.MultiScaleRoIAlign(["0"], spec.bins, sampling_ratio=-1),
        box_head=LastStage(body.layer4),
        box_predictor=detection.faster_rcnn.FastRCNNPredictor(2048, spec.num_classes),
    )


def c4_state(theirs: nn.Module) -> dict[str, Tensor]:
    """The donor's weights under our names; those of the residual network through torchvision's map."""
    state = theirs.state_dict()
    network = resnet.build(ResNetSpec("test", C4.depths, True, 0, num_classes=0))
    freeze_batch_norms(network)
    network.to(state["backbone.conv1.weight"].dtype)
    parts = {
        name.removeprefix("backbone.").replace("roi_heads.box_head.stage.", "layer4."): value
        for name, value in state.items()
        if name.startswith(("backbone.", "roi_heads.box_head."))
    }
    assert load_state(network, parts).complete
    found = {}
    for name, value in network.state_dict().items():
        last = name.removeprefix("stages.3.")
        found[f"backbone.{name}" if last == name else f"head.stage.{last}"] = value
    renamed = {
        "rpn.head.conv.0.0": "proposals.conv",
        "rpn.head.cls_logits": "proposals.objectness",
        "rpn.head.bbox_pred": "proposals.offsets",
        "roi_heads.box_predictor.cls_score": "head.classes",
        "roi_heads.box_predictor.bbox_pred": "head.offsets",
    }
    for old, new in renamed.items():
        found |= {f"{new}.{kind}": state[f"{old}.{kind}"] for kind in ("weight", "bias")}
    return found


def ours_c4(theirs: nn.Module, dtype: torch.dtype = torch.float32) -> RCNN:
    model = rcnn_c4.build(C4).to(dtype)
    model.load_state_dict(c4_state(theirs))
    assert model.proposals is not None
    model.proposals.kept = (2000, PROPOSED)
    return model


def test_c4_detections() -> None:
    """Float64, for the scores are close to one another."""
    theirs = randomized(c4_donor(C4)).double().eval()
    check_detections(theirs, ours_c4(theirs, torch.float64).eval(), torch.float64)


def test_c4_losses_and_gradients() -> None:
    theirs = randomized(c4_donor(C4)).double().train()

    def made() -> RCNN:
        return ours_c4(theirs, torch.float64)

    check_losses(theirs, made().train(), made, regions=SAMPLED)


@torch.no_grad()
def test_c4_region_vectors() -> None:
    """Of torchvision's proposals those that are chosen, with the vectors and scores that its parts give."""
    theirs = randomized(c4_donor(C4)).eval()
    extractor = RegionExtractor(ours_c4(theirs).eval(), least=10, most=36)
    assert extractor.num_features == 2048
    images = pictures(torch.float32)
    found = extractor(normalized(images))
    batch, _ = theirs.transform(images)
    maps = OrderedDict([("0", theirs.backbone(batch.tensors))])
    proposed, _ = theirs.rpn(batch, maps)
    vectors = theirs.roi_heads.box_head(theirs.roi_heads.box_roi_pool(maps, proposed, batch.image_sizes))
    scores = theirs.roi_heads.box_predictor(vectors)[0].softmax(-1)
    counts = [len(b) for b in proposed]
    resized = require().models.detection.transform.resize_boxes
    for i, (v, s) in enumerate(zip(vectors.split(counts), scores.split(counts), strict=True)):
        regions = found[i]
        assert 10 <= len(regions.vectors) <= 36
        boxes = resized(proposed[i], batch.image_sizes[i], images[i].shape[-2:])
        at = (regions.boxes[:, None] - boxes[None]).abs().sum(-1).argmin(1)
        assert len(at.unique()) == len(at)
        assert error(regions.boxes, boxes[at]) < 1e-5
        assert error(regions.vectors, v[at]) < 1e-5
        assert error(regions.scores, s[at, regions.labels]) < 1e-5


@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_c4", "fasterrcnn_resnet101_c4"])
def test_c4_canonical_size(name: str) -> None:
    row = describe(name)
    assert isinstance(row, RCNNC4Spec)
    with torch.device("meta"):
        theirs, model = c4_donor(row), pymm.create_model(name)
    assert sum(p.numel() for p in theirs.parameters()) == row.parameters
    assert sorted(tuple(t.shape) for t in theirs.state_dict().values()) == sorted(
        tuple(t.shape) for t in model.state_dict().values()
    )
