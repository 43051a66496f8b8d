"""The objective of Fast and Faster R-CNN: which regions are what, and how wrong a model is about them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.models.boxes import box_iou, encode_boxes, widened
from pymm.models.proposals import Proposals
from pymm.models.rcnn import OFFSET_WEIGHTS, RCNN
from pymm.ops._checks import fail, shape

IGNORED = -1
BEYOND = 1 / 9  # where the loss of an offset turns from a parabola into a line


def matched(
    targets: Tensor, candidates: Tensor, foreground: float, background: float, *, all_targets: bool = False
) -> tuple[Tensor, Tensor]:
    """Which target each candidate is, by overlap (Ren et al. 2015, arXiv:1506.01497, sec. 3.1.2).

    Args:
        targets: `(G, 4)`.
        candidates: `(K, 4)`.
        foreground: the IoU from which a candidate is its best target.
        background: the IoU below which it is none.
        all_targets: a target that no candidate reaches so gets those that overlap it most.

    Returns:
        The index of the best target `(K,)`, and `(K,)` int64: 1 for it, 0 for none, -1 for neither.
    """
    if not len(targets) or not len(candidates):
        none = torch.zeros(len(candidates), dtype=torch.int64, device=candidates.device)
        return none, none.clone()
    iou = box_iou(targets, candidates)
    best, at = iou.max(0)
    kind = (best >= foreground).long()
    kind[(best >= background) & (best < foreground)] = IGNORED
    if all_targets:
        most = iou.amax(1, keepdim=True)
        kind[(iou == most).any(0)] = 1
    return at, kind


def sampled(kind: Tensor, count: int, positive: float) -> tuple[Tensor, Tensor]:
    """Random indices of positives (kind above 0), at most a share of `count`, and of negatives (0).

    Random numbers come from torch's generator.
    """
    ones, zeros = (kind > 0).nonzero()[:, 0], (kind == 0).nonzero()[:, 0]
    wanted = min(len(ones), int(count * positive))
    first = ones[torch.randperm(len(ones), device=kind.device)[:wanted]]
    rest = zeros[torch.randperm(len(zeros), device=kind.device)[: min(len(zeros), count - wanted)]]
    return first, rest


@dataclass(frozen=True)
class DetectionObjective:
    r"""The losses of Faster R-CNN's two stages (Ren et al. 2015, arXiv:1506.01497, eq. 1).

    Each stage asks a random sample of its candidates what they are, by cross-entropy, and those that are
    something where it is, by the smooth L1 loss of the offsets, summed and divided by the sample's size.

    Args:
        anchor_iou: the overlap of an anchor with an object above which it is one and below which it is none.
        anchors: sampled in a picture.
        anchor_positive: the largest share of them that may be objects.
        region_iou: from this overlap on a region is its object, and below it the background.
        regions: sampled in a picture, the true boxes being among the candidates.
        region_positive: the largest share of them that may be objects.
    """

    anchor_iou: tuple[float, float] = (0.7, 0.3)
    anchors: int = 256
    anchor_positive: float = 0.5
    region_iou: float = 0.5
    regions: int = 512
    region_positive: float = 0.25

    def __call__(
        self,
        model: RCNN,
        images: Tensor | Sequence[Tensor],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
        proposals: Sequence[Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """The losses of a batch; their sum is what is trained.

        Args:
            model: in training mode.
            images: as for `RCNN.prepare`.
            boxes: for each picture the objects' `(G, 4)` in its pixels; a picture may have none.
            labels: for each picture `(G,)` int64 from 1.
            proposals: for each picture regions in its pixels, instead of the model's proposals.

        Returns:
            Scalars by name: `"classes"`, `"boxes"` and, where the model proposes, `"objectness"` and
            `"proposals"`.

        Raises:
            ValueError: when targets do not fit the pictures, or a box has no area.
        """
        _check(images, boxes, labels, model.num_classes)
        pictures = model.prepare(images)
        maps = model.maps(pictures.pixels)
        targets = [widened(t) for t in pictures.boxes(boxes)]
        losses: dict[str, Tensor] = {}
        if proposals is None:
            proposed = model.propose(maps, pictures)
            losses["objectness"], losses["proposals"] = self.of_anchors(proposed, targets)
            candidates = proposed.boxes
        else:
            candidates = pictures.boxes(proposals)
        regions, kinds, offsets = self.regions_of(candidates, targets, labels)
        logits, moved = model.classify(maps, regions)
        losses["classes"], losses["boxes"] = of_regions(logits, moved, kinds, offsets)
        return losses

    def of_anchors(self, proposed: Proposals, targets: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The proposal network's two losses, for targets in pixels of the batch."""
        truth, positives, chosen, offsets = [], [], [], []
        count = len(proposed.anchors)
        foreground, background = self.anchor_iou
        for i, boxes in enumerate(targets):
            at, kind = matched(boxes, proposed.anchors, foreground, background, all_targets=True)
            ones, zeros = (part.sort().values for part in sampled(kind, self.anchors, self.anchor_positive))
            truth.append(kind[torch.cat([ones, zeros])])
            chosen.append(torch.cat([ones, zeros]) + i * count)
            positives.append(ones + i * count)
            if len(boxes):
                offsets.append(encode_boxes(boxes[at[ones]], proposed.anchors[ones]))
        if not offsets:
            offsets.append(proposed.anchors.new_zeros((0, 4)))
        wanted = torch.cat(chosen)
        logits = widened(proposed.objectness.flatten()[wanted])
        objectness = F.binary_cross_entropy_with_logits(logits, torch.cat(truth).to(logits))
        moved = widened(proposed.offsets.flatten(0, 1)[torch.cat(positives)])
        distance = F.smooth_l1_loss(moved, torch.cat(offsets).to(moved), beta=BEYOND, reduction="sum")
        return objectness, distance / max(1, len(wanted))

    @torch.no_grad()
    def regions_of(
        self, candidates: Sequence[Tensor], targets: Sequence[Tensor], labels: Sequence[Tensor]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Sampled regions of each picture, and of all together what they are and the offsets to that."""
        regions, kinds, offsets = [], [], []
        for proposed, boxes, label in zip(candidates, targets, labels, strict=True):
            among = torch.cat([proposed.to(boxes), boxes])
            at, kind = matched(boxes, among, self.region_iou, self.region_iou)
            if len(boxes):
                kind = torch.where(kind > 0, label[at], kind)
            chosen = torch.cat(sampled(kind, self.regions, self.region_positive)).sort().values
            regions.append(among[chosen])
            kinds.append(kind[chosen])
            true = boxes[at[chosen]] if len(boxes) else among[chosen]
            offsets.append(encode_boxes(true, among[chosen], OFFSET_WEIGHTS))
        return regions, torch.cat(kinds), torch.cat(offsets)


def of_regions(logits: Tensor, moved: Tensor, kinds: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The second stage's losses: logits `(K, classes)`, offsets `(K, classes, 4)`, truth `(K,)`, `(K, 4)`."""
    classes = F.cross_entropy(widened(logits), kinds) if len(kinds) else logits.sum() * 0
    objects = (kinds > 0).nonzero()[:, 0]
    found = widened(moved[objects, kinds[objects]])
    distance = F.smooth_l1_loss(found, offsets[objects].to(found), beta=BEYOND, reduction="sum")
    return classes, distance / max(1, len(kinds))


def _check(
    images: Tensor | Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Tensor], classes: int
) -> None:
    if not len(images) == len(boxes) == len(labels):
        got = f"{len(boxes)} boxes and {len(labels)} labels"
        fail("DetectionObjective", "boxes and labels", f"lists of {len(images)}", got)
    for b, label in zip(boxes, labels, strict=True):
        if b.ndim != 2 or b.shape[1] != 4 or label.shape != b.shape[:1]:
            got = f"{shape(b)} and {shape(label)}"
            fail("DetectionObjective", "boxes and labels", "(G, 4) and (G,) for each picture", got)
        if not bool((b[:, 2:] > b[:, :2]).all()):
            fail("DetectionObjective", "boxes", "x1 < x2 and y1 < y2", "a box without area")
        if len(label) and not 1 <= int(label.min()) <= int(label.max()) < classes:
            fail("DetectionObjective", "labels", f"from 1 to {classes - 1}", label.unique().tolist())
