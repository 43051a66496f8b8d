"""Fast and Faster R-CNN, and the rows of those on a residual network with a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.models import resnet
from pymm.models.boxes import Weights, at_least, clip_boxes, decode_boxes, scale_boxes, widened
from pymm.models.proposals import ProposalNetwork, Proposals
from pymm.models.pyramid import FeaturePyramid, LastMap, freeze_batch_norms
from pymm.models.region_heads import BoxHead, StageHead
from pymm.models.region_pool import RegionPool
from pymm.models.resnet import ResNet, ResNetSpec
from pymm.ops import batched_nms, roi_align, roi_pool
from pymm.ops._checks import fail, shape

OFFSET_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)  # Girshick's, of the second stage
SMALLEST = 1e-2  # side of a detection, in pixels
STRIDE = 32  # of the coarsest stage: pictures are padded to a multiple
BINS, SAMPLES = 7, 2
STRIDES = (4, 8, 16, 32)


class Detections(NamedTuple):
    """What is in one picture: `boxes (R, 4)` in its pixels, `scores (R,)` and `labels (R,)`, best first."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pictures:
    """A padded batch of pictures, `pixels (B, 3, H, W)`; their sizes in it, and those they came with."""

    pixels: Tensor
    sizes: list[tuple[int, int]]
    originals: list[tuple[int, int]]

    def boxes(self, boxes: Sequence[Tensor]) -> list[Tensor]:
        """Boxes in pixels of the pictures, for each `(L, 4)`, in pixels of the batch."""
        sizes = zip(boxes, self.originals, self.sizes, strict=True)
        return [scale_boxes(b, original, size) for b, original, size in sizes]


class RCNN(nn.Module):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497), or, without a proposal network, Fast R-CNN.

    Args:
        backbone: a residual network without head.
        pyramid: the maps of its stages to those that are looked at: a pyramid, or the last one.
        proposals: proposes regions; `None` for Fast R-CNN, which is given them.
        regions: pools regions from the maps.
        head: pooled regions to vectors, and these to classes and boxes.
        image_size: the short side that pictures are resized to, unless the long one exceeds `max_size`.
        max_size: the long side at most.
        score: the lowest score of a detection.
        overlap: the IoU above which the lower score of a class is suppressed.
        most: detections in a picture at most.
    """

    def __init__(
        self,
        backbone: ResNet,
        pyramid: FeaturePyramid | LastMap,
        proposals: ProposalNetwork | None,
        regions: RegionPool,
        head: BoxHead | StageHead,
        *,
        image_size: int,
        max_size: int,
        score: float = 0.05,
        overlap: float = 0.5,
        most: int = 100,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.proposals = backbone, pyramid, proposals
        self.regions, self.head = regions, head
        self.image_size, self.max_size = image_size, max_size
        self.score, self.overlap, self.most = score, overlap, most

    @property
    def mean(self) -> tuple[float, ...]:
        return self.backbone.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.backbone.std

    @property
    def num_classes(self) -> int:
        """Classes, the background included."""
        return int(self.head.classes.out_features)

    def stage_names(self) -> list[tuple[str, ...]]:
        """Modules by stage, from the pixels to the head; see `pymm.models.stages`."""
        stages = [(f"backbone.stages.{i}",) for i in range(len(self.backbone.stages))]
        return [("backbone.stem",), *stages, ("pyramid", "proposals", "head")]

    def prepare(self, images: Tensor | Sequence[Tensor]) -> Pictures:
        """Resize pictures and pad them into a batch whose sides are multiples of 32.

        Args:
            images: `(B, 3, H, W)` or for each picture `(3, h, w)`; normalized with `mean` and `std`, or
                `uint8`.
        """
        if not len(images):
            fail("RCNN", "images", "at least one picture", "none")
        dtype = next(self.parameters()).dtype
        resized, originals = [], []
        for image in images:
            if image.ndim != 3 or image.shape[0] != 3 or not image.numel():
                fail("RCNN", "images", "pictures (3, h, w)", shape(image))
            h, w = int(image.shape[1]), int(image.shape[2])
            originals.append((h, w))
            x = self.backbone.normalize(image[None], dtype)
            factor = min(self.image_size / min(h, w), self.max_size / max(h, w))
            resized.append(
                F.interpolate(
                    x, scale_factor=factor, mode="bilinear", recompute_scale_factor=True, align_corners=False
                )[0]
            )
        sizes = [(int(x.shape[1]), int(x.shape[2])) for x in resized]
        height, width = (-(-max(side) // STRIDE) * STRIDE for side in zip(*sizes, strict=True))
        padded = [F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in resized]
        return Pictures(torch.stack(padded), sizes, originals)

    def maps(self, pixels: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` -> what regions are proposed and pooled from.

        The pyramid's maps, of strides 4 to 64, or the third stage's, of stride 16.
        """
        maps: list[Tensor] = self.pyramid(self.stage_maps(pixels))
        return maps

    def stage_maps(self, pixels: Tensor) -> list[Tensor]:
        """`(B, 3, H, W)` -> the maps of the backbone's stages, of strides 4 to 16 or 32."""
        found: dict[str, Tensor] = {}
        self.backbone.forward_features(pixels, intermediates=found)
        return [found[f"stages.{i}"] for i in range(len(self.backbone.stages))]

    def propose(self, maps: list[Tensor], pictures: Pictures) -> Proposals:
        """What the proposal network says of the maps.

        Raises:
            ValueError: when there is none.
        """
        if self.proposals is None:
            fail("RCNN", "proposals", "given, for Fast R-CNN proposes none", None)
        height, width = pictures.pixels.shape[-2:]
        proposals: Proposals = self.proposals(maps, (int(height), int(width)), pictures.sizes)
        return proposals

    def pool(self, maps: list[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Boxes in pixels of the batch, for each picture `(L, 4)` -> `(K, C, h, w)`, picture by picture."""
        pooled: Tensor = self.regions(maps, boxes)
        return pooled

    def classify(self, maps: list[Tensor], boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Boxes as in `pool` -> logits `(K, num_classes)` and offsets `(K, num_classes, 4)` from them."""
        logits, offsets = self.head(self.head.vectors(self.pool(maps, boxes)))
        return logits, offsets

    def forward(
        self, images: Tensor | Sequence[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[Detections]:
        """Find the objects.

        Args:
            images: as for `prepare`.
            proposals: for each picture regions `(L, 4)` in its pixels, instead of the network's own.

        Returns:
            For each picture what is in it.
        """
        pictures = self.prepare(images)
        maps = self.maps(pictures.pixels)
        if proposals is None:
            boxes = self.propose(maps, pictures).boxes
        else:
            boxes = pictures.boxes(proposals)
        logits, offsets = self.classify(maps, boxes)
        counts = [len(b) for b in boxes]
        parts = zip(boxes, logits.split(counts), offsets.split(counts), strict=True)
        found = []
        for i, (regions, scores, moved) in enumerate(parts):
            found.append(self._detections(regions, scores, moved, pictures.sizes[i], pictures.originals[i]))
        return found

    def _detections(
        self,
        regions: Tensor,
        logits: Tensor,
        offsets: Tensor,
        size: tuple[int, int],
        original: tuple[int, int],
    ) -> Detections:
        scores = widened(logits).softmax(-1)
        boxes = clip_boxes(decode_boxes(offsets.to(scores), regions.to(scores), OFFSET_WEIGHTS), size)
        region, label = (scores[:, 1:] > self.score).nonzero(as_tuple=True)
        label = label + 1
        b, s = boxes[region, label], scores[region, label]
        large = at_least(b, SMALLEST)
        b, s, label = b[large], s[large], label[large]
        kept = batched_nms(b, s, label, self.overlap)[: self.most]
        return Detections(scale_boxes(b[kept], size, original), s[kept], label[kept])


@dataclass(frozen=True)
class RCNNSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands.

    `num_classes` counts the background, `image_size` and `max_size` are the sides that pictures are resized
    to, `vector` is the width of a region's vector, and `anchors` are sides of anchors, one for each map.
    `norm_eps` belongs to the frozen batch norms; None leaves batch norms to be trained. `pooling` takes of
    regions the mean of bilinear samples or, as Girshick 2015 (arXiv:1504.08083), the largest value.
    """

    name: str
    depths: tuple[int, int, int, int]
    bottleneck: bool
    parameters: int
    source: str
    width: int = 64
    image_size: int = 800
    max_size: int = 1333
    num_classes: int = 91
    pyramid: int = 256
    vector: int = 1024
    anchors: tuple[float, ...] | None = (32, 64, 128, 256, 512)
    norm_eps: float | None = 1e-5
    pooling: Literal["align", "max"] = "align"
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


_LIN = "Lin et al. 2017, arXiv:1612.03144, sec. 5, with the sizes of torchvision"
ROWS = (
    # torchvision's published weights are used with a zero eps.
    RCNNSpec("fasterrcnn_resnet50_fpn", (3, 4, 6, 3), True, 41_755_286, _LIN, norm_eps=0.0),
    RCNNSpec("fastrcnn_resnet50_fpn", (3, 4, 6, 3), True, 41_161_351, _LIN, norm_eps=0.0, anchors=None),
    RCNNSpec(
        "fasterrcnn_tiny",
        (1, 1, 1, 1),
        False,
        2_342_680,
        "sizes of our own, for pictures of few pixels",
        width=32,
        image_size=128,
        max_size=256,
        num_classes=21,
        pyramid=64,
        vector=256,
        anchors=(16, 28, 40, 56, 80),
        norm_eps=None,
    ),
)


def _aligned(x: Tensor, rows: Tensor, bins: int, scale: float) -> Tensor:
    return roi_align(x, rows, bins, scale, SAMPLES)


class Residual(Protocol):
    """What the rows of detectors say of their residual network."""

    @property
    def name(self) -> str: ...
    @property
    def depths(self) -> tuple[int, int, int, int]: ...
    @property
    def bottleneck(self) -> bool: ...
    @property
    def width(self) -> int: ...
    @property
    def norm_eps(self) -> float | None: ...
    @property
    def mean(self) -> tuple[float, ...]: ...
    @property
    def std(self) -> tuple[float, ...]: ...


def residual_network(row: Residual) -> ResNet:
    """The network of a row without head, as `pymm.models.resnet` builds it, with the row's batch norms."""
    sizes = ResNetSpec(
        row.name,
        row.depths,
        row.bottleneck,
        0,
        width=row.width,
        num_classes=0,
        mean=row.mean,
        std=row.std,
    )
    network = resnet.build(sizes)
    if row.norm_eps is not None:
        freeze_batch_norms(network, row.norm_eps)
    return network


def build(spec: RCNNSpec) -> RCNN:
    """The detector of a row."""
    backbone = residual_network(spec)
    expansion = 4 if spec.bottleneck else 1
    channels = tuple(spec.width * 2**i * expansion for i in range(4))
    anchors = None if spec.anchors is None else tuple((side,) for side in spec.anchors)
    return RCNN(
        backbone,
        FeaturePyramid(channels, spec.pyramid),
        None if anchors is None else ProposalNetwork(spec.pyramid, anchors),
        RegionPool(roi_pool if spec.pooling == "max" else _aligned, BINS, STRIDES),
        BoxHead(spec.pyramid * BINS * BINS, spec.vector, spec.num_classes),
        image_size=spec.image_size,
        max_size=spec.max_size,
    )
