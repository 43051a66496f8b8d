"""Fast and Faster R-CNN on a residual network with a feature pyramid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import Linear
from pymm.models import resnet
from pymm.models.boxes import Weights, at_least, clip_boxes, decode_boxes, scale_boxes, widened
from pymm.models.proposals import ProposalNetwork, Proposals
from pymm.models.pyramid import FeaturePyramid, freeze_batch_norms
from pymm.models.resnet import ResNet, ResNetSpec
from pymm.ops import batched_nms, roi_align
from pymm.ops._checks import fail, shape

OFFSET_WEIGHTS: Weights = (10.0, 10.0, 5.0, 5.0)  # Girshick's, of the second stage
SMALLEST = 1e-2  # side of a detection, in pixels
STRIDE = 32  # of the coarsest stage: pictures are padded to a multiple
BINS, SAMPLES = 7, 2
# A box of 224 pixels is pooled from the fourth level, of stride 16 (Lin et al. 2017, eq. 1).
CANONICAL_SIDE, CANONICAL_LEVEL, FINEST_LEVEL = 224, 4, 2


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


class BoxHead(nn.Module):
    """Pooled regions to a vector, and that to classes and moved boxes (Girshick 2015, arXiv:1504.08083).

    Args:
        inputs: numbers in a pooled region.
        width: of the vector.
        num_classes: the background, which is class 0, included.
    """

    def __init__(self, inputs: int, width: int, num_classes: int) -> None:
        super().__init__()
        self.fc1 = Linear(inputs, width, activation="relu")
        self.fc2 = Linear(width, width, activation="relu")
        self.classes = Linear(width, num_classes)
        self.offsets = Linear(width, 4 * num_classes)

    def vectors(self, pooled: Tensor) -> Tensor:
        """`(K, C, 7, 7)` -> `(K, width)`."""
        return self.fc2(self.fc1(pooled.flatten(1)))

    def forward(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """`(K, width)` -> logits `(K, num_classes)` and offsets `(K, num_classes, 4)`."""
        return self.classes(vectors), self.offsets(vectors).unflatten(1, (-1, 4))


class RCNN(nn.Module):
    """Faster R-CNN (Ren et al. 2015, arXiv:1506.01497), or, without a proposal network, Fast R-CNN.

    Args:
        backbone: a residual network without head.
        pyramid: of the maps of its stages.
        proposals: proposes regions; `None` for Fast R-CNN, which is given them.
        head: regions to classes and boxes.
        image_size: the short side that pictures are resized to, unless the long one exceeds `max_size`.
        max_size: the long side at most.
        score: the lowest score of a detection.
        overlap: the IoU above which the lower score of a class is suppressed.
        most: detections in a picture at most.
    """

    def __init__(
        self,
        backbone: ResNet,
        pyramid: FeaturePyramid,
        proposals: ProposalNetwork | None,
        head: BoxHead,
        *,
        image_size: int,
        max_size: int,
        score: float = 0.05,
        overlap: float = 0.5,
        most: int = 100,
    ) -> None:
        super().__init__()
        self.backbone, self.pyramid, self.proposals, self.head = backbone, pyramid, proposals, head
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
        return self.head.classes.out_features

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
        """`(B, 3, H, W)` -> the pyramid's five maps, of strides 4 to 64."""
        found: dict[str, Tensor] = {}
        self.backbone.forward_features(pixels, intermediates=found)
        return self.pyramid([found[f"stages.{i}"] for i in range(4)])

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
        """Boxes in pixels of the batch, for each picture `(L, 4)` -> `(K, C, 7, 7)`, picture by picture."""
        image = torch.cat([torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)])
        rows = torch.cat([image, torch.cat(list(boxes))], 1)
        side = (rows[:, 3:] - rows[:, 1:3]).prod(1).sqrt()
        level = (CANONICAL_LEVEL + (side / CANONICAL_SIDE).log2() + 1e-6).floor()
        level = level.clamp(FINEST_LEVEL, FINEST_LEVEL + 3).long() - FINEST_LEVEL
        parts, places = [], []
        for i, x in enumerate(maps[:4]):
            at = (level == i).nonzero()[:, 0]
            places.append(at)
            of_type = (
                rows[at] if rows.dtype == torch.float32 and x.dtype.itemsize == 2 else rows[at].to(x.dtype)
            )
            parts.append(roi_align(x, of_type, BINS, 2.0 ** -(FINEST_LEVEL + i), SAMPLES))
        return torch.cat(parts)[torch.cat(places).argsort()]

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
    `norm_eps` belongs to the frozen batch norms; None leaves batch norms to be trained.
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


def build(spec: RCNNSpec) -> RCNN:
    """The detector of a row; the residual network is that of `pymm.models.resnet`."""
    row = ResNetSpec(
        spec.name,
        spec.depths,
        spec.bottleneck,
        0,
        width=spec.width,
        num_classes=0,
        mean=spec.mean,
        std=spec.std,
    )
    backbone = resnet.build(row)
    if spec.norm_eps is not None:
        freeze_batch_norms(backbone, spec.norm_eps)
    expansion = 4 if spec.bottleneck else 1
    channels = tuple(spec.width * 2**i * expansion for i in range(4))
    return RCNN(
        backbone,
        FeaturePyramid(channels, spec.pyramid),
        None if spec.anchors is None else ProposalNetwork(spec.pyramid, spec.anchors),
        BoxHead(spec.pyramid * BINS * BINS, spec.vector, spec.num_classes),
        image_size=spec.image_size,
        max_size=spec.max_size,
    )
