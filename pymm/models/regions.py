"""A picture as vectors for a model of vision and language: of regions, or of the places of a grid."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.models.boxes import box_encoding, scale_boxes, widened
from pymm.models.rcnn import RCNN
from pymm.models.region_pool import RegionPool
from pymm.models.resnet import ResNet
from pymm.ops import batched_nms, roi_align
from pymm.ops._checks import fail, shape

STAGE_BINS, STAGE_STRIDE = 14, 16  # Anderson et al.: fourteen by fourteen places of the third stage's map


@dataclass(frozen=True)
class Regions:
    """The regions of one picture, best first.

    Attributes:
        vectors: `(R, C)`.
        boxes: `(R, 4)`, `x1, y1, x2, y2` in the picture's pixels.
        scores: `(R,)`, of the region's best class.
        labels: `(R,)`, that class, from 1.
        size: `(height, width)` of the picture.
    """

    vectors: Tensor
    boxes: Tensor
    scores: Tensor
    labels: Tensor
    size: tuple[int, int]

    def encoded(self, numbers: int = 4) -> Tensor:
        """The boxes as 4, 5 or 7 numbers, `(R, numbers)`; see `pymm.models.boxes.box_encoding`."""
        return box_encoding(self.boxes, self.size, numbers)


class RegionExtractor(nn.Module):
    """The regions of a picture that a detector finds something in, with a vector each.

    The bottom-up features of Anderson et al. 2018 (arXiv:1707.07998, sec. 3.1), which LXMERT, ViLBERT,
    VL-BERT and UNITER take: of the detector's proposals, those that suppression within a class leaves for
    some class, with a confidence of `confidence` at least, but never fewer than `least` nor more than `most`.

    Args:
        detector: Faster R-CNN.
        vectors: `"head"`, the vector that the detector classifies by: 1024 numbers in torchvision's, and in a
            detector on the third stage's map (`"fasterrcnn_resnet101_c4"`) 2048, the mean over the region
            of what the last stage makes of it, as the published features are made. Or `"stage"`, such a mean
            from a detector that has a pyramid, by a last stage that has seen whole pictures only.
        least, most: regions of a picture; equal for a fixed number, such as 36. There are fewer than
            `least` where the detector proposes fewer.
        confidence: of a region's best class, in [0, 1].
        overlap: the IoU above which the lower score of a class is suppressed.

    Raises:
        ValueError: for numbers out of range.
    """

    def __init__(
        self,
        detector: RCNN,
        *,
        vectors: Literal["head", "stage"] = "head",
        least: int = 10,
        most: int = 100,
        confidence: float = 0.2,
        overlap: float = 0.3,
    ) -> None:
        super().__init__()
        if vectors not in ("head", "stage"):
            fail("RegionExtractor", "vectors", "'head' or 'stage'", repr(vectors))
        if vectors == "stage" and len(detector.backbone.stages) < 4:
            fail(
                "RegionExtractor", "vectors", "'head' for a detector whose head is the last stage", "'stage'"
            )
        if not 1 <= least <= most:
            fail("RegionExtractor", "least and most", "1 <= least <= most", f"{least} and {most}")
        if not 0 <= confidence <= 1:
            fail("RegionExtractor", "confidence", "in [0, 1]", confidence)
        self.detector, self.vectors = detector, vectors
        self.stage_pool = RegionPool(roi_align, STAGE_BINS, (STAGE_STRIDE,))
        self.least, self.most, self.confidence, self.overlap = least, most, confidence, overlap

    @property
    def num_features(self) -> int:
        """C, the width of a vector."""
        if self.vectors == "head":
            return self.detector.head.num_features
        return self.detector.backbone.num_features

    def forward(
        self, images: Tensor | Sequence[Tensor], proposals: Sequence[Tensor] | None = None
    ) -> list[Regions]:
        """Find regions.

        Args:
            images: `(B, 3, H, W)` or for each picture `(3, h, w)`; normalized, or `uint8`.
            proposals: for each picture regions `(L, 4)` in its pixels to choose from, instead of the
                detector's own.
        """
        model = self.detector
        pictures = model.prepare(images)
        stages = model.stage_maps(pictures.pixels)
        maps: list[Tensor] = model.pyramid(stages)
        boxes = model.propose(maps, pictures).boxes if proposals is None else pictures.boxes(proposals)
        heads = model.head.vectors(model.pool(maps, boxes))
        logits, _ = model.head(heads)
        counts = [len(b) for b in boxes]
        chosen = [
            self._chosen(b, part)
            for b, part in zip(boxes, widened(logits).softmax(-1).split(counts), strict=True)
        ]
        kept = [b[rows] for b, (rows, _, _) in zip(boxes, chosen, strict=True)]
        if self.vectors == "head":
            parts = zip(heads.split(counts), chosen, strict=True)
            vectors = [part[rows] for part, (rows, _, _) in parts]
        else:
            vectors = list(self._of_stage(stages[2], kept).split([len(b) for b in kept]))
        found = []
        for i, (_, scores, labels) in enumerate(chosen):
            original = pictures.originals[i]
            places = scale_boxes(kept[i], pictures.sizes[i], original)
            found.append(Regions(vectors[i], places, scores, labels, original))
        return found

    def _chosen(self, boxes: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which regions, and the score and the class of each: `boxes (L, 4)`, `scores (L, classes)`."""
        objects = scores[:, 1:]
        count, classes = objects.shape
        if not count:
            none = torch.zeros(0, dtype=torch.int64, device=boxes.device)
            return none, objects.new_zeros(0), none
        region = torch.arange(count, device=boxes.device).repeat_interleave(classes)
        label = torch.arange(classes, device=boxes.device).repeat(count)
        # Below the confidence a pair counts only where there are fewer regions than `least`.
        flat = objects.flatten()
        left = torch.zeros_like(flat)
        survivors = batched_nms(boxes[region], flat, label, self.overlap)
        left[survivors] = flat[survivors]
        best, kind = left.view(count, classes).max(1)
        order = best.sort(descending=True, stable=True).indices
        confident = int((best >= self.confidence).sum())
        rows = order[: min(self.most, max(self.least, confident))]
        return rows, best[rows], kind[rows] + 1

    def _of_stage(self, x: Tensor, boxes: Sequence[Tensor]) -> Tensor:
        pooled = self.stage_pool([x], boxes)
        stage: nn.Module = self.detector.backbone.stages[3]
        return stage(pooled).mean((2, 3))


class GridFeatures(nn.Module):
    """The places of a residual network's last map as tokens (Huang et al. 2020, arXiv:2004.00849, sec. 3.2).

    Args:
        backbone: its last map has 1/32 of the picture's sides.
        pool: halve the map once more by 2×2 max pooling.
        sample: in training, so many random places of each picture and no more (sec. 3.4: 100); None for all.

    Raises:
        ValueError: when `sample` is not positive.
    """

    def __init__(self, backbone: ResNet, *, pool: bool = True, sample: int | None = None) -> None:
        super().__init__()
        if sample is not None and sample < 1:
            fail("GridFeatures", "sample", "positive or None", sample)
        self.backbone, self.pool, self.sample = backbone, pool, sample

    @property
    def num_features(self) -> int:
        """C, the width of a token."""
        return self.backbone.num_features

    def forward(self, pixels: Tensor, *, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens and where they are.

        Args:
            pixels: `(B, 3, H, W)`, normalized or `uint8`.
            keep: `(B, K)` int64, the places to take, row by row of the grid; by default all or, in training
                with `sample`, random ones from torch's generator, in the order of the grid.

        Returns:
            `(B, K, C)`, and `keep (B, K)`.

        Raises:
            ValueError: when the picture is too small for one place, or `keep` does not fit.
        """
        x = self.backbone.forward_features(pixels)
        if self.pool:
            if min(x.shape[2:]) < 2:
                fail("GridFeatures", "pixels", "of 64 pixels a side at least", shape(pixels))
            x = F.max_pool2d(x, 2)
        tokens = x.flatten(2).mT  # (B, N, C)
        b, n, c = tokens.shape
        if keep is None and self.training and self.sample is not None and self.sample < n:
            order = torch.rand(b, n, device=x.device).argsort(1)
            keep = order[:, : self.sample].sort(1).values
        if keep is None:
            return tokens, torch.arange(n, device=x.device).expand(b, n)
        if keep.ndim != 2 or keep.shape[0] != b:
            fail("GridFeatures", "keep", f"({b}, K)", shape(keep))
        return tokens.gather(1, keep[..., None].expand(-1, -1, c)), keep
