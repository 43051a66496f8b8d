"""Region proposals: anchors, the network that scores and moves them, and the best of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.models.boxes import at_least, clip_boxes, decode_boxes, widened
from pymm.ops import batched_nms
from pymm.ops._checks import fail

RATIOS = (0.5, 1.0, 2.0)  # height / width
SMALLEST = 1e-3  # side of a proposal, in pixels


@dataclass(frozen=True)
class Proposals:
    """What the network says of every anchor, and what is made of it.

    Attributes:
        anchors: `(A, 4)` in pixels of the batch, the same for every picture.
        objectness: `(B, A)` logits.
        offsets: `(B, A, 4)` from the anchors.
        boxes: for each picture `(L, 4)`, best first; no gradient passes through them.
        scores: for each picture `(L,)` in [0, 1].
    """

    anchors: Tensor
    objectness: Tensor
    offsets: Tensor
    boxes: list[Tensor]
    scores: list[Tensor]


class ProposalNetwork(nn.Module):
    """Scores anchors at every place of every map (Ren et al. 2015, arXiv:1506.01497, sec. 3.1).

    Args:
        width: channels of the maps.
        sizes: for each map the sides of its anchors, which have that area and the ratios 1/2, 1 and 2;
            as many for every map.
        best: boxes of each map before suppression, in training and otherwise.
        kept: boxes of a picture after suppression, in training and otherwise.
        overlap: the IoU above which the lower of two scores is suppressed, within a map.
    """

    def __init__(
        self,
        width: int,
        sizes: tuple[tuple[float, ...], ...],
        *,
        best: tuple[int, int] = (2000, 1000),
        kept: tuple[int, int] = (2000, 1000),
        overlap: float = 0.7,
    ) -> None:
        super().__init__()
        if len({len(sides) for sides in sizes}) != 1:
            fail("ProposalNetwork", "sizes", "as many anchors for every map", sizes)
        self.anchors_of_place = len(RATIOS) * len(sizes[0])
        self.sizes, self.best, self.kept, self.overlap = sizes, best, kept, overlap
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.objectness = nn.Conv2d(width, self.anchors_of_place, 1)
        self.offsets = nn.Conv2d(width, 4 * self.anchors_of_place, 1)
        for conv in (self.conv, self.objectness, self.offsets):
            nn.init.normal_(conv.weight, std=0.01)
            assert conv.bias is not None
            nn.init.zeros_(conv.bias)

    def anchors(self, maps: list[Tensor], batch_size: tuple[int, int]) -> list[Tensor]:
        """For each map `(H·W·A, 4)`: place by place, at each the three ratios, of each the sides."""
        found = []
        for sides, x in zip(self.sizes, maps, strict=True):
            root = torch.tensor(RATIOS, device=x.device).sqrt()[:, None]
            size = torch.tensor(sides, device=x.device, dtype=root.dtype)
            half = (torch.stack([size * (1 / root), size * root], -1).flatten(0, 1) / 2).repeat(1, 2)
            half = (half * torch.tensor([-1.0, -1, 1, 1], device=x.device)).round()
            height, width = x.shape[-2:]
            y = torch.arange(height, device=x.device) * (batch_size[0] // height)
            z = torch.arange(width, device=x.device) * (batch_size[1] // width)
            y, z = torch.meshgrid(y, z, indexing="ij")
            places = torch.stack([z, y, z, y], -1).view(-1, 1, 4)
            found.append((places + half).view(-1, 4).to(torch.promote_types(x.dtype, half.dtype)))
        return found

    def forward(
        self, maps: list[Tensor], batch_size: tuple[int, int], sizes: list[tuple[int, int]]
    ) -> Proposals:
        """Propose.

        Args:
            maps: `(B, width, Hi, Wi)`, as many as `sizes` of the constructor.
            batch_size: height and width of the padded pictures.
            sizes: height and width of each picture in it.
        """
        objectness, offsets = [], []
        for x in maps:
            y = F.relu(self.conv(x))
            objectness.append(self.objectness(y).permute(0, 2, 3, 1).flatten(1))
            moved = self.offsets(y).unflatten(1, (self.anchors_of_place, 4))
            offsets.append(moved.permute(0, 3, 4, 1, 2).flatten(1, 3))
        anchors = self.anchors(maps, batch_size)
        boxes, scores = self._chosen(anchors, objectness, offsets, sizes)
        return Proposals(torch.cat(anchors), torch.cat(objectness, 1), torch.cat(offsets, 1), boxes, scores)

    @torch.no_grad()
    def _chosen(
        self,
        anchors: list[Tensor],
        objectness: list[Tensor],
        offsets: list[Tensor],
        sizes: list[tuple[int, int]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        best, kept = (pair[0 if self.training else 1] for pair in (self.best, self.kept))
        all_boxes, all_scores = [], []
        for i, size in enumerate(sizes):
            boxes, scores, levels = [], [], []
            for level, (a, o, t) in enumerate(zip(anchors, objectness, offsets, strict=True)):
                logits, at = widened(o[i]).topk(min(best, o.shape[1]))
                boxes.append(decode_boxes(widened(t[i, at]), a[at]))
                scores.append(logits.sigmoid())
                levels.append(torch.full_like(at, level))
            b, s, groups = clip_boxes(torch.cat(boxes), size), torch.cat(scores), torch.cat(levels)
            large = at_least(b, SMALLEST)
            b, s, groups = b[large], s[large], groups[large]
            chosen = batched_nms(b, s, groups, self.overlap)[:kept]
            all_boxes.append(b[chosen])
            all_scores.append(s[chosen])
        return all_boxes, all_scores
