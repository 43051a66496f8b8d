"""Zero-shot detection: regions of a picture, named by the prompts that lie nearest to them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.data import Tokenizer
from pymm.evaluation.average_precision import average_precision
from pymm.evaluation.encoding import Template, check_finite, class_embeddings, evaluating, features_of
from pymm.models.boxes import scale_boxes
from pymm.models.rcnn import RCNN, Detections
from pymm.ops import batched_nms, roi_align

WHERE = "ZeroShotDetector"


@dataclass(frozen=True)
class Windows:
    """Boxes on a grid at several sizes and shapes, for pictures of which no regions are known.

    Attributes:
        scales: square roots of a window's area as shares of the picture's short side, in (0, 1].
        ratios: width / height.
        step: distance of neighbours as a share of the window's side, in (0, 1].
    """

    scales: tuple[float, ...] = (0.2, 0.28, 0.4)
    ratios: tuple[float, ...] = (1.0,)
    step: float = 0.2

    def __post_init__(self) -> None:
        for name, ok in (
            ("scales", len(self.scales) > 0 and all(0 < scale <= 1 for scale in self.scales)),
            ("ratios", len(self.ratios) > 0 and all(ratio > 0 for ratio in self.ratios)),
            ("step", 0 < self.step <= 1),
        ):
            if not ok:
                expected = "positive" if name == "ratios" else "in (0, 1]"
                raise ValueError(f"Windows: {name} must be {expected}, got {getattr(self, name)}")

    def __call__(self, pixels: Tensor) -> Tensor:
        """Of `pixels (..., H, W)`, `(R, 4)` float32: windows that lie in the picture and cover it."""
        height, width = pixels.shape[-2:]
        boxes = []
        for scale in self.scales:
            for ratio in self.ratios:
                side = scale * min(height, width)
                w, h = min(width, side * math.sqrt(ratio)), min(height, side / math.sqrt(ratio))
                y, x = _starts(height, h, self.step), _starts(width, w, self.step)
                top, left = (t.flatten() for t in torch.meshgrid(y, x, indexing="ij"))
                boxes.append(torch.stack([left, top, left + w, top + h], 1))
        return torch.cat(boxes)


def _starts(length: int, side: float, step: float) -> Tensor:
    free = length - side
    return torch.linspace(0, free, max(1, math.ceil(free / (step * side)) + 1))


@dataclass(frozen=True)
class ProposedRegions:
    """Boxes of a region proposal network, which knows what an object is but no names.

    Attributes:
        detector: Faster R-CNN.
        most: boxes per picture, the best ones.
    """

    detector: RCNN
    most: int = 100

    def __call__(self, pixels: Tensor) -> Tensor:
        """Of `pixels (3, H, W)` as the detector takes them, at most `most` boxes `(R, 4)`, best first."""
        with evaluating(self.detector):
            pictures = self.detector.prepare(pixels[None])
            proposed = self.detector.propose(self.detector.maps(pictures.pixels), pictures)
        return scale_boxes(proposed.boxes[0][: self.most], pictures.sizes[0], pictures.originals[0])


def region_pixels(pixels: Tensor, boxes: Tensor, size: int, context: float = 1.0) -> Tensor:
    """Regions as pictures of their own, in one shape and one size.

    Each box becomes a square around its middle, `context` times its longer side but no larger than the
    picture, moved inside where it sticks out, and is resampled by `roi_align`, which averages where it
    shrinks.

    Args:
        pixels: uint8 `(3, H, W)`.
        boxes: `(R, 4)`, left, top, right, bottom in pixels.
        size: side of the results.
        context: more than 1 shows what lies around.

    Returns:
        uint8 `(R, 3, size, size)`.
    """
    height, width = pixels.shape[1:]
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    side = (boxes[:, 2:] - boxes[:, :2]).amax(1) * context
    side = side.clamp(1, min(height, width))[:, None]
    room = torch.tensor([width, height], dtype=boxes.dtype, device=boxes.device)
    corner = (middle - side / 2).clamp_min(0).minimum(room - side)
    squares = torch.cat([corner, corner + side], 1)
    crops = roi_align(pixels[None].float(), [squares.float()], size, 1.0, 0, True)
    return crops.round().clamp(0, 255).to(torch.uint8)


class ZeroShotDetector:
    r"""Names regions of a picture by a CLIP model, without having seen a box.

    The score of class c in region r is its softmax over the classes and what counts as background,

    .. math:: p(c \mid r) = \frac{\exp(s \cos(f_r, t_c))}{\sum_{k} \exp(s \cos(f_r, t_k))},

    with the model's scale s, the region's image feature f and the mean t of the class's prompts (Radford et
    al. 2021, arXiv:2103.00020, sec. 3.1.4; of regions Zhong et al. 2022, arXiv:2112.09106, sec. 3.1). Scores
    above the threshold are kept, and of boxes of one class that overlap, the best.

    Args:
        model: has `encode_image`, `encode_text`, `image_size` and `logit_scale`, and takes uint8 pixels.
        tokenizer: the one that the model was trained with.
        names: the classes, C of them.
        templates: see `pymm.evaluation.class_embeddings`.
        background: names of what is no object; a region nearest to one of them is dropped.
        proposals: makes boxes of a picture that comes without; `Windows()` by default.
        threshold: scores at most so large are dropped, in [0, 1).
        iou_threshold: of the suppression, in [0, 1].
        context: see `region_pixels`, at least 1.
        most: detections per picture.
        batch_size: regions at a time.

    Raises:
        ValueError: for a wrong argument.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Tokenizer,
        names: Sequence[str],
        templates: Template | Sequence[Template] = "A photo of a {object}",
        *,
        background: Sequence[str] = (),
        proposals: Callable[[Tensor], Tensor] | None = None,
        threshold: float = 0.1,
        iou_threshold: float = 0.3,
        context: float = 1.1,
        most: int = 100,
        batch_size: int = 256,
    ) -> None:
        for name, value, expected, ok in (
            ("threshold", threshold, "in [0, 1)", 0 <= threshold < 1),
            ("iou_threshold", iou_threshold, "in [0, 1]", 0 <= iou_threshold <= 1),
            ("context", context, "at least 1", context >= 1),
            ("most", most, "at least 1", most >= 1),
            ("batch_size", batch_size, "at least 1", batch_size >= 1),
        ):
            if not ok:
                raise ValueError(f"{WHERE}: {name} must be {expected}, got {value}")
        self.model, self.names, self.proposals = model, tuple(names), proposals or Windows()
        self.threshold, self.iou_threshold = threshold, iou_threshold
        self.context, self.most, self.batch_size = context, most, batch_size
        self.classes = class_embeddings(model, tokenizer, self.names, templates)
        self.background = (
            class_embeddings(model, tokenizer, background, "{object}")
            if background
            else self.classes.new_zeros(0, self.classes.shape[1])
        )

    def __call__(self, pixels: Tensor, boxes: Tensor | None = None) -> Detections:
        """Detect the classes in one picture.

        Args:
            pixels: uint8 `(3, H, W)`.
            boxes: `(R, 4)`, the regions to look at, such as those of a region proposal network; by default
                `proposals`.

        Returns:
            At most `most` detections; `labels` are indices into `names`.

        Raises:
            ValueError: when shape or type does not fit, or a feature is not finite.
        """
        if pixels.ndim != 3 or pixels.shape[0] != 3 or pixels.dtype != torch.uint8:
            got = f"{pixels.dtype} {tuple(pixels.shape)}"
            raise ValueError(f"{WHERE}: pixels must be uint8 (3, H, W), got {got}")
        if boxes is None:
            boxes = self.proposals(pixels)
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{WHERE}: boxes must be (R, 4), got {tuple(boxes.shape)}")
        boxes = boxes.float().cpu()
        every = self.scores(pixels, boxes)
        chosen, label = (every > self.threshold).nonzero(as_tuple=True)
        scores = every[chosen, label]
        kept = batched_nms(boxes[chosen], scores, label, self.iou_threshold)[: self.most]
        return Detections(boxes[chosen][kept], scores[kept], label[kept])

    def scores(self, pixels: Tensor, boxes: Tensor) -> Tensor:
        """`(R, C)` float32: the softmax of every region over classes and background, without the
        background's columns."""
        scale = self.model.logit_scale.detach().float().exp().cpu()  # type: ignore[operator]
        bank = torch.cat([self.classes, self.background])
        found = []
        with evaluating(self.model):
            for part in boxes.split(self.batch_size):
                crops = region_pixels(pixels, part, int(self.model.image_size), self.context)  # type: ignore[arg-type]
                features = features_of(self.model, "encode_image", crops)
                check_finite(WHERE, "image features", features)
                found.append((scale * F.normalize(features, dim=-1) @ bank.T).softmax(1))
        return torch.cat(found)[:, : len(self.names)] if found else self.classes.new_zeros(0, len(self.names))


def evaluate_detection(
    detector: ZeroShotDetector, samples: Iterable[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, dict[str, float]]:
    """Average precision on pictures whose objects are known.

    Args:
        detector: of at least two classes.
        samples: pixels, boxes `(R, 4)` and labels `(R,)`, indices into `detector.names`.

    Returns:
        What `average_precision` returns for `proposals`; for `true_boxes`, which the detector only has to
        name; and for `chance`, the same boxes and scores as `proposals`, each named as the next class.

    Raises:
        ImportError: when pycocotools is not installed.
        ValueError: when there is no picture or only one class.
    """
    classes = len(detector.names)
    if classes < 2:
        raise ValueError(f"evaluate_detection: detector must have at least 2 classes, got {classes}")
    truth, found, named = [], [], []
    for pixels, boxes, labels in samples:
        truth.append((boxes, labels))
        found.append(detector(pixels))
        named.append(detector(pixels, boxes))
    if not truth:
        raise ValueError("evaluate_detection: samples must hold at least one picture, got none")
    wrong = [one._replace(labels=(one.labels + 1) % classes) for one in found]
    return {
        "proposals": average_precision(found, truth, detector.most),
        "true_boxes": average_precision(named, truth, detector.most),
        "chance": average_precision(wrong, truth, detector.most),
    }
