"""Pictures to batches of pixels, for evaluation and, with random changes, for training.

A transform is a frozen dataclass: its fields are the settings, and calling it does the work on a whole batch.
It takes either a list of Pillow images of any size (read from a stream) or one uint8 tensor of images that
share a size (kept decoded in memory), where crop, rotation and flip become a single resampling of the batch.

Transparent images are carried with premultiplied alpha (Pillow's mode RGBa), so that resampling does not
bleed the colour of invisible pixels into the edges, and are put on the background at the end.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pymm.data._errors import fail
from pymm.data.colour import colour_matrices

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
WHITE = (255, 255, 255)
CHUNK = 64
# Settings of TrainTransform between 0 and 1.
SHARES = ("flip", "jitter", "brightness", "contrast", "saturation", "grayscale", "random_background")
RGB = tuple[float, float, float]
Range = tuple[float, float]


class Transform(Protocol):
    """What the loader needs of a transform."""

    def reduce(self, image: Image.Image) -> Image.Image:
        """What of an image to keep in memory: everything random calls may need, and no more."""
        ...

    def __call__(self, images: Tensor | Sequence[Image.Image], generator: torch.Generator) -> Tensor:
        """Pixels `(B, 3, S, S)` of what `decode_image` or `reduce` gives, or of a stack `(B, C, h, w)`."""
        ...


@dataclass(frozen=True)
class EvalTransform:
    """Resize and cut the middle out, as CLIP does (Radford et al. 2021, arXiv:2103.00020).

    Attributes:
        size: height and width of the result, > 0.
        crop: `"center"`: the short side becomes `size` and the middle is kept, with torchvision's rounding.
            `"squash"`: both sides become `size`.
        background: colour under transparent pixels, 0 to 255 each.
        mean, std: the result is `(x / 255 − mean) / std`.
        output: `"float32"`, or `"uint8"` for models that normalize in their patch embedding; then mean and
            std are not applied.
    """

    size: int = 224
    crop: Literal["center", "squash"] = "center"
    background: tuple[int, int, int] = WHITE
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    output: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        _check_common("EvalTransform", self.size, self.std, self.output)
        if self.crop not in ("center", "squash"):
            fail("EvalTransform", "crop", '"center" or "squash"', repr(self.crop))

    def reduce(self, image: Image.Image) -> Image.Image:
        image, width, height = premultiplied(image), self.size, self.size
        if self.crop == "center":
            width, height = (int(self.size * n / min(image.size)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = round((width - self.size) / 2), round((height - self.size) / 2)
        image = image.crop((left, top, left + self.size, top + self.size))
        if image.mode == "RGB":
            return image
        colours = _over(_to_tensor([image]).float(), torch.tensor([self.background], dtype=torch.float32))
        return Image.fromarray(_to_bytes(colours)[0].permute(1, 2, 0).contiguous().numpy())

    def __call__(self, images: Tensor | Sequence[Image.Image], generator: torch.Generator) -> Tensor:
        if not isinstance(images, Tensor):
            images = _to_tensor([self.reduce(image) for image in images])
        if tuple(images.shape[1:]) != (3, self.size, self.size) or images.dtype != torch.uint8:
            fail(
                "EvalTransform",
                "images",
                f"uint8 (B, 3, {self.size}, {self.size})",
                f"{images.dtype} {tuple(images.shape)}",
            )
        if self.output == "uint8":
            return images
        return _normalized(images.float(), self.mean, self.std)


@dataclass(frozen=True)
class TrainTransform:
    """Random crop, placement and colours.

    In this order: a crop of random area and shape is resized to `size`; it is flipped, rotated, zoomed and
    moved, with the background where nothing is left (a stack of images shows what surrounds the crop before
    it shows background); transparent parts get the background; then brightness, contrast, saturation and hue
    change, or all colour goes. Every choice of an image comes from one row of one table drawn from the
    generator, so it does not depend on what the other images are.

    Attributes:
        size: height and width of the result, > 0.
        crop_scale: range of the crop's share of the area, in (0, 1].
        crop_ratio: range of the crop's width / height; a crop that would not fit is cut to the image's side.
        flip: probability of a left-right flip.
        rotate: largest angle in degrees, either way.
        translate: largest shift as a share of `size`, either way.
        zoom: range of the scale; below 1 the picture shrinks.
        jitter: probability of the four colour changes.
        brightness, contrast, saturation: the factor is drawn from [1 − v, 1 + v], v in [0, 1].
        hue: largest turn of the colour circle either way, in whole turns, in [0, 0.5].
        grayscale: probability of losing all colour.
        background: colour under transparent pixels.
        random_background: probability of another colour there, any one. Short of 1, the background that
            evaluation uses stays among those trained on.
        mean, std, output: as in `EvalTransform`.
    """

    size: int = 224
    crop_scale: Range = (0.9, 1.0)
    crop_ratio: Range = (3 / 4, 4 / 3)
    flip: float = 0.0
    rotate: float = 0.0
    translate: float = 0.0
    zoom: Range = (1.0, 1.0)
    jitter: float = 1.0
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    background: tuple[int, int, int] = WHITE
    random_background: float = 0.0
    mean: RGB = CLIP_MEAN
    std: RGB = CLIP_STD
    output: Literal["float32", "uint8"] = "float32"

    def __post_init__(self) -> None:
        where = "TrainTransform"
        _check_common(where, self.size, self.std, self.output)
        for name, value in (
            ("crop_scale", self.crop_scale),
            ("crop_ratio", self.crop_ratio),
            ("zoom", self.zoom),
        ):
            if not 0 < value[0] <= value[1]:
                fail(where, name, "a rising range of positive numbers", value)
        if self.crop_scale[1] > 1:
            fail(where, "crop_scale", "at most 1", self.crop_scale)
        for name in SHARES:
            if not 0 <= getattr(self, name) <= 1:
                fail(where, name, "in [0, 1]", getattr(self, name))
        if not 0 <= self.hue <= 0.5:
            fail(where, "hue", "in [0, 0.5]", self.hue)
        for name in ("rotate", "translate"):
            if getattr(self, name) < 0:
                fail(where, name, "at least 0", getattr(self, name))

    def reduce(self, image: Image.Image) -> Image.Image:
        """Shrink so far that the smallest crop still has `size` pixels across, and no further."""
        image = premultiplied(image)
        factor = self.size / math.sqrt(self.crop_scale[0]) / min(image.size)
        if factor >= 1:
            return image
        width, height = (max(1, round(n * factor)) for n in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC)

    def __call__(self, images: Tensor | Sequence[Image.Image], generator: torch.Generator) -> Tensor:
        table = torch.rand(len(images), 19, generator=generator)
        # A few images at a time: what is between the steps stays in the cache.
        parts = [
            self._some(images[i : i + CHUNK], table[i : i + CHUNK]) for i in range(0, len(images), CHUNK)
        ]
        return torch.cat(parts)

    def _some(self, images: Tensor | Sequence[Image.Image], table: Tensor) -> Tensor:
        if isinstance(images, Tensor):
            n, _, height, width = images.shape
            boxes = self._boxes(table, torch.tensor([[width, height]]).expand(n, 2))
            x = self._placed(images, table, _zooming(boxes, width, height))
        else:
            boxes = self._boxes(table, torch.tensor([image.size for image in images]).reshape(-1, 2))
            crops = [
                premultiplied(image).resize((self.size, self.size), Image.Resampling.BICUBIC, box=tuple(box))
                for image, box in zip(images, boxes.tolist(), strict=True)
            ]
            x = self._placed(_to_tensor(crops), table, None)
        under = torch.tensor([self.background], dtype=torch.float32)
        if self.random_background > 0:
            under = torch.where(table[:, 18:] < self.random_background, 255 * table[:, 15:18], under)
        x = self._coloured(_over(x, under), table)
        return _to_bytes(x) if self.output == "uint8" else _normalized(x, self.mean, self.std)

    def _boxes(self, table: Tensor, sizes: Tensor) -> Tensor:
        """Crops `(B, 4)` as left, top, right, bottom; sizes `(B, 2)` are width, height."""
        size = sizes.float()
        area = size.prod(1) * _between(table[:, 0], self.crop_scale)
        ratio = _between(table[:, 1], (math.log(self.crop_ratio[0]), math.log(self.crop_ratio[1]))).exp()
        side = torch.stack(((area * ratio).sqrt(), (area / ratio).sqrt()), 1).minimum(size)
        corner = (size - side) * table[:, 2:4]
        return torch.cat((corner, (corner + side).minimum(size)), 1)

    def _placed(self, images: Tensor, table: Tensor, crop: Tensor | None) -> Tensor:
        """uint8 `(B, C, h, w)` to float `(B, C, S, S)`: crop, flip, turn, zoom and shift in one sampling."""
        moves = self.rotate > 0 or self.translate > 0 or self.zoom != (1.0, 1.0)
        if crop is None and not moves:
            flips = (table[:, 4] < self.flip)[:, None, None, None]
            x = images.float()
            return torch.where(flips, x.flip(-1), x) if self.flip > 0 else x
        if images.shape[1] == 3 and moves:  # the corners that come from outside are transparent
            images = torch.cat((images, torch.full_like(images[:, :1], 255)), 1)
        theta = self._moves(table)
        if crop is not None:  # output -> moved back -> place in the source
            scale, shift = crop[:, :2, None], crop[:, 2:, None]
            theta = torch.cat((scale * theta[:, :, :2], scale * theta[:, :, 2:] + shift), 2)
        at = (2 * torch.arange(self.size) + 1) / self.size - 1
        across = theta[:, None, None, :, 0] * at[:, None]  # (B, 1, S, 2)
        down = theta[:, None, None, :, 1] * at[:, None, None] + theta[:, None, None, :, 2]  # (B, S, 1, 2)
        grid = across + down
        padding = "zeros" if moves else "border"
        return F.grid_sample(images.float(), grid, "bilinear", padding, align_corners=False)

    def _moves(self, table: Tensor) -> Tensor:
        """The inverse map `(B, 2, 3)` of flip, rotation, zoom and shift, in coordinates from -1 to 1."""
        angle = math.radians(self.rotate) * (2 * table[:, 5] - 1)
        factor = 1 / _between(table[:, 6], self.zoom)
        mirror = 1 - 2 * (table[:, 4] < self.flip).float()
        cos, sin = angle.cos() * factor, angle.sin() * factor
        turn = torch.stack((torch.stack((cos * mirror, sin * mirror), 1), torch.stack((-sin, cos), 1)), 1)
        shift = 2 * self.translate * (2 * table[:, 7:9] - 1)
        return torch.cat((turn, -turn @ shift[:, :, None]), 2)

    def _coloured(self, x: Tensor, table: Tensor) -> Tensor:
        changes = self.jitter and (self.brightness or self.contrast or self.saturation or self.hue)
        if not changes and not self.grayscale:
            return x
        jitter = (table[:, 9] < self.jitter).float()
        swing = jitter[:, None] * (2 * table[:, 10:14] - 1)
        matrix, offset = colour_matrices(
            1 + self.brightness * swing[:, 0],
            1 + self.contrast * swing[:, 1],
            1 + self.saturation * swing[:, 2],
            self.hue * swing[:, 3],
            table[:, 14] < self.grayscale,
            x.mean((2, 3)),
        )
        out = torch.baddbmm(offset[:, :, None], matrix, x.flatten(2))
        return out.clamp_(0, 255).view_as(x)


def premultiplied(image: Image.Image) -> Image.Image:
    """RGB as it is; RGBA as RGBa, the colours multiplied by alpha."""
    return image.convert("RGBa") if image.mode == "RGBA" else image


def _check_common(where: str, size: int, std: RGB, output: str) -> None:
    if size < 1:
        fail(where, "size", "positive", size)
    if min(std) <= 0:
        fail(where, "std", "positive", std)
    if output not in ("float32", "uint8"):
        fail(where, "output", '"float32" or "uint8"', repr(output))


def _between(u: Tensor, limits: Range) -> Tensor:
    return limits[0] + (limits[1] - limits[0]) * u


def _to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """uint8 `(B, C, h, w)`; opaque images get an alpha channel where another one has it."""
    if len({image.mode for image in images}) > 1:
        images = [
            image if image.mode == "RGBa" else image.convert("RGBA").convert("RGBa") for image in images
        ]
    return (
        torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()
    )


def _zooming(boxes: Tensor, width: int, height: int) -> Tensor:
    """Boxes as scale and shift `(B, 4)` of coordinates from -1 to 1."""
    size = torch.tensor([width, height], dtype=torch.float32)
    return torch.cat(((boxes[:, 2:] - boxes[:, :2]) / size, (boxes[:, 2:] + boxes[:, :2]) / size - 1), 1)


def _over(x: Tensor, under: Tensor) -> Tensor:
    """Premultiplied `(B, 4, h, w)` on a colour `(B or 1, 3)`; `(B, 3, h, w)` as it is."""
    if x.shape[1] == 3:
        return x
    return torch.addcmul(x[:, :3], 255 - x[:, 3:], under[:, :, None, None] / 255)


def _to_bytes(x: Tensor) -> Tensor:
    return x.round().clamp_(0, 255).to(torch.uint8)


def _normalized(x: Tensor, mean: RGB, std: RGB) -> Tensor:
    """Of a float tensor that nobody else holds: it is overwritten."""
    return x.sub_(255 * torch.tensor(mean).view(3, 1, 1)).div_(255 * torch.tensor(std).view(3, 1, 1))
