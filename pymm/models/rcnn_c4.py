"""Faster R-CNN on the map of a residual network's third stage; its fourth is what each region passes."""

from __future__ import annotations

from dataclasses import dataclass

from pymm.models.proposals import ProposalNetwork
from pymm.models.pyramid import LastMap
from pymm.models.rcnn import RCNN, residual_network
from pymm.models.region_heads import StageHead
from pymm.models.region_pool import RegionPool
from pymm.ops import roi_align

STRIDE = 16


@dataclass(frozen=True)
class RCNNC4Spec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands.

    `num_classes` counts the background, `image_size` and `max_size` are the sides that pictures are resized
    to, `anchors` are sides of anchors, all on the one map, and `bins` those of a region along each axis.
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
    anchors: tuple[float, ...] = (32, 64, 128, 256, 512)
    bins: int = 14
    norm_eps: float | None = 1e-5
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


_HE = "He et al. 2016, arXiv:1512.03385, app. A, with anchors of Lin et al. 2017, arXiv:1612.03144, sec. 5.1"
_ANDERSON = (
    "Anderson et al. 2018, arXiv:1707.07998, sec. 3.1: 1600 classes of Visual Genome; without attributes, and"
    " with the anchors and pictures of the other rows"
)
ROWS = (
    RCNNC4Spec("fasterrcnn_resnet50_c4", (3, 4, 6, 3), True, 33_902_290, _HE),
    RCNNC4Spec("fasterrcnn_resnet101_c4", (3, 4, 23, 3), True, 68_312_144, _ANDERSON, num_classes=1601),
    RCNNC4Spec(
        "fasterrcnn_tiny_c4",
        (1, 1, 1, 1),
        False,
        1_414_484,
        "sizes of our own, for pictures of few pixels",
        width=32,
        image_size=128,
        max_size=256,
        num_classes=21,
        anchors=(16, 28, 40, 56, 80),
        bins=8,
        norm_eps=None,
    ),
)


def build(spec: RCNNC4Spec) -> RCNN:
    """The detector of a row."""
    network = residual_network(spec)
    last = network.stages[3]
    network.stages = network.stages[:3]
    vector = network.num_features
    network.num_features = network.head_hidden_size = vector // 2
    return RCNN(
        network,
        LastMap(),
        ProposalNetwork(network.num_features, (spec.anchors,)),
        RegionPool(roi_align, spec.bins, (STRIDE,)),
        StageHead(last, vector, spec.num_classes),
        image_size=spec.image_size,
        max_size=spec.max_size,
    )
