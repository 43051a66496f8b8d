"""Convolutional networks without shortcuts: LeNet-5, AlexNet and VGG."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import Linear, Normalize, checkpointed
from pymm.models.mapped import MappedNetwork, linear_head
from pymm.ops._checks import fail, shape


class ConvNet(MappedNetwork):
    """Stages of convolutions, then fully connected layers, with timm's interface.

    Args:
        normalize: pixels to what the first convolution takes.
        stages: sequences of layers; all but the last of LeNet-5 end in a pooling.
        pool: the last map to `(B, K)`.
        mlp: `(B, K)` to `(B, F)`.
        head: the classifier, or `nn.Identity()`.
        image_size: side of the square images that the network is made for.
        smallest_size: side of the smallest images that leave something of the last map.
        num_features: C, channels of the last map.
        head_hidden_size: F, what the classifier takes.
    """

    def __init__(
        self,
        normalize: Normalize,
        stages: nn.ModuleList,
        pool: nn.Module,
        mlp: nn.Module,
        head: nn.Module,
        *,
        image_size: int,
        smallest_size: int,
        num_features: int,
        head_hidden_size: int,
    ) -> None:
        super().__init__()
        self.normalize, self.stages, self.pool, self.mlp, self.head = normalize, stages, pool, mlp, head
        self.image_size, self.smallest_size = image_size, smallest_size
        self.num_features, self.head_hidden_size = num_features, head_hidden_size

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay: none."""
        return set()

    def stage_names(self) -> list[tuple[str, ...]]:
        """Modules and parameters by stage, from the pixels to the head; see `pymm.models.stages`."""
        stages = [(f"stages.{i}",) for i in range(len(self.stages))]
        return [*stages, ("mlp",), ("head",)]

    def forward_features(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """Pixels to the last feature map; `.flatten(2).mT` makes it tokens `(B, N, C)`.

        Args:
            pixels: `(B, Cin, H, W)`, normalized with `mean` and `std`, or `uint8`; Cin is 3, for LeNet-5 1.
            intermediates: receives `"stages.0"`, `"stages.1"`, ...

        Returns:
            `(B, C, h, w)`; for 224×224 pixels h and w are 6 in AlexNet and 7 in VGG, for 32×32 pixels they
            are 1 in LeNet-5.

        Raises:
            ValueError: when the pixels are of another number of channels, or fewer than the smallest size.
        """
        x = self.normalize(pixels, next(self.parameters()).dtype)
        if min(x.shape[2:]) < self.smallest_size:
            channels, least = x.shape[1], self.smallest_size
            fail("ConvNet", "pixels", f"(B, {channels}, H, W) with H and W at least {least}", shape(x))
        x = x.contiguous(memory_format=torch.channels_last)  # what convolutions are fastest with
        for i, stage in enumerate(self.stages):
            again = self.grad_checkpointing and torch.is_grad_enabled()
            x = checkpointed(stage, x) if again else stage(x)
            if intermediates is not None:
                intermediates[f"stages.{i}"] = x
        return x

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """A map `(B, C, h, w)` to `(B, num_classes)`, or with `pre_logits` to the head's input `(B, F)`."""
        x = self.mlp(self.pool(x))
        return x if pre_logits else self.head(x)

    def forward(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """`pixels (B, Cin, H, W)` -> `(B, num_classes)`; `intermediates` as in `forward_features`."""
        return self.forward_head(self.forward_features(pixels, intermediates=intermediates))


class GridMap(nn.Module):
    """A feature map of any size as the vector of a square one: `(B, C, h, w)` -> `(B, C·side²)`.

    Where the map is not `side` by `side`, the means over its cells take its place.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (self.side, self.side):
            x = F.adaptive_avg_pool2d(x, self.side)
        return x.flatten(1)

    def extra_repr(self) -> str:
        return f"side={self.side}"


@dataclass(frozen=True)
class Conv:
    """A convolution to `width` channels and the row's activation."""

    width: int
    kernel: int
    stride: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Pool:
    """The largest or the mean of each window."""

    kernel: int
    stride: int
    of: Literal["max", "mean"] = "max"


@dataclass(frozen=True)
class ConvNetSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands.

    `grid` is the side of the map that the fully connected layers of the widths `mlp` see. `batch_norm` stands
    between each convolution and its activation. `start` is how the weights begin: as `torch.nn` does it, or
    as torchvision's VGG.
    """

    name: str
    stages: tuple[tuple[Conv | Pool, ...], ...]
    grid: int
    mlp: tuple[int, ...]
    parameters: int
    source: str
    batch_norm: bool = False
    activation: Literal["relu", "tanh"] = "relu"
    dropout: float = 0.5
    start: Literal["torch", "kaiming"] = "torch"
    image_size: int = 224
    num_classes: int = 1000
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)

    @property
    def smallest_size(self) -> int:
        """Side of the smallest image whose last map has one element."""
        side = 1
        for layer in reversed([layer for stage in self.stages for layer in stage]):
            padding = layer.padding if isinstance(layer, Conv) else 0
            side = (side - 1) * layer.stride + layer.kernel - 2 * padding
        return side


def _vgg(depths: tuple[int, ...], width: int = 64) -> tuple[tuple[Conv | Pool, ...], ...]:
    """As many 3×3 convolutions per stage; widths double up to the eightfold."""
    stages: list[tuple[Conv | Pool, ...]] = []
    for i, depth in enumerate(depths):
        conv = Conv(width * min(2**i, 8), 3, padding=1)
        stages.append((*(conv for _ in range(depth)), Pool(2, 2)))
    return tuple(stages)


LECUN = "LeCun et al. 1998, Gradient-based learning applied to document recognition, sec. II.B"
_KRIZHEVSKY = "Krizhevsky 2014, arXiv:1404.5997, with the sizes of torchvision"
_SIMONYAN = "Simonyan and Zisserman 2015, arXiv:1409.1556, table 1"
_IOFFE = "with Ioffe and Szegedy 2015, arXiv:1502.03167"

_LENET5 = (
    (Conv(6, 5), Pool(2, 2, "mean")),
    (Conv(16, 5), Pool(2, 2, "mean")),
    (Conv(120, 5),),
)
_ALEXNET = (
    (Conv(64, 11, 4, padding=2), Pool(3, 2)),
    (Conv(192, 5, padding=2), Pool(3, 2)),
    (Conv(384, 3, padding=1), Conv(256, 3, padding=1), Conv(256, 3, padding=1), Pool(3, 2)),
)
_ALEXNET_TINY = (
    (Conv(16, 11, 4, padding=2), Pool(3, 2)),
    (Conv(32, 5, padding=2), Pool(3, 2)),
    (Conv(64, 3, padding=1), Conv(48, 3, padding=1), Conv(48, 3, padding=1), Pool(3, 2)),
)


def _vgg_row(name: str, depths: tuple[int, ...], column: str, plain: int, normed: int) -> list[ConvNetSpec]:
    """A column of the paper's table, without and with batch norm."""
    source = f"{_SIMONYAN}, column {column}"
    stages, mlp = _vgg(depths), (4096, 4096)
    return [
        ConvNetSpec(name, stages, 7, mlp, plain, source, start="kaiming"),
        ConvNetSpec(
            f"{name}_bn", stages, 7, mlp, normed, f"{source}, {_IOFFE}", batch_norm=True, start="kaiming"
        ),
    ]


ROWS = (
    # The dense variant: every map of C3 sees all of S2, subsampling is a plain mean, the output is linear.
    # White is -0.1 and black 1.175 (sec. II.B), where a byte says how black a pixel is.
    ConvNetSpec(
        "lenet5", _LENET5, 1, (84,), 61_706, LECUN,
        activation="tanh", dropout=0.0, image_size=32, num_classes=10, mean=(0.1 / 1.275,), std=(1 / 1.275,),
    ),
    ConvNetSpec("alexnet", _ALEXNET, 6, (4096, 4096), 61_100_840, _KRIZHEVSKY),
    ConvNetSpec("alexnet_tiny", _ALEXNET_TINY, 1, (64, 64), 93_578, "pymm", image_size=64, num_classes=10),
    *_vgg_row("vgg11", (1, 1, 2, 2, 2), "A", 132_863_336, 132_868_840),
    *_vgg_row("vgg13", (2, 2, 2, 2, 2), "B", 133_047_848, 133_053_736),
    *_vgg_row("vgg16", (2, 2, 3, 3, 3), "D", 138_357_544, 138_365_992),
    *_vgg_row("vgg19", (2, 2, 4, 4, 4), "E", 143_667_240, 143_678_248),
    ConvNetSpec(
        "vgg_tiny", _vgg((1, 1, 1, 1), 16), 2, (64, 64), 135_562, "pymm",
        batch_norm=True, start="kaiming", image_size=32, num_classes=10,
    ),
)  # fmt: skip


def build(spec: ConvNetSpec) -> ConvNet:
    """The network of a row.

    Dropout stands behind each hidden fully connected layer (Krizhevsky et al. 2012, sec. 4.2). With
    `start="kaiming"` convolutions are Kaiming normal over the fan-out, the other weights normal with 0.01,
    biases zero.

    Raises:
        ValueError: when nothing would be left of an image of the row's size.
    """
    if spec.image_size < spec.smallest_size:
        fail("ConvNet", "image_size", f"at least {spec.smallest_size} for {spec.name}", spec.image_size)
    stages, features = _stages(spec)
    mlp, hidden = _mlp(spec, features * spec.grid**2)
    model = ConvNet(
        Normalize(spec.mean, spec.std),
        stages,
        GridMap(spec.grid),
        mlp,
        linear_head(hidden, spec.num_classes),
        image_size=spec.image_size,
        smallest_size=spec.smallest_size,
        num_features=features,
        head_hidden_size=hidden,
    )
    if spec.start == "kaiming":
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, Linear):
                nn.init.normal_(module.weight, std=0.01)
            if isinstance(module, (nn.Conv2d, Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def _stages(spec: ConvNetSpec) -> tuple[nn.ModuleList, int]:
    """The stages and the channels of the last. Layers are numbered through all stages, as torchvision's."""
    stages, channels, number = nn.ModuleList(), len(spec.mean), 0
    for layers in spec.stages:
        stage: OrderedDict[str, nn.Module] = OrderedDict()
        for layer in layers:
            for module in _modules(layer, channels, spec):
                stage[str(number)] = module
                number += 1
            if isinstance(layer, Conv):
                channels = layer.width
        stages.append(nn.Sequential(stage))
    return stages, channels


def _modules(layer: Conv | Pool, channels: int, spec: ConvNetSpec) -> list[nn.Module]:
    if isinstance(layer, Pool):
        kind = nn.MaxPool2d if layer.of == "max" else nn.AvgPool2d
        return [kind(layer.kernel, layer.stride)]
    conv = nn.Conv2d(channels, layer.width, layer.kernel, layer.stride, layer.padding)
    norm = [nn.BatchNorm2d(layer.width)] if spec.batch_norm else []
    return [conv, *norm, nn.ReLU(inplace=True) if spec.activation == "relu" else nn.Tanh()]


def _mlp(spec: ConvNetSpec, width: int) -> tuple[nn.Module, int]:
    """The hidden fully connected layers `fc1`, `fc2`, ... and the width of the last."""
    mlp: OrderedDict[str, nn.Module] = OrderedDict()
    for i, hidden in enumerate(spec.mlp, 1):
        if spec.activation == "relu":
            mlp[f"fc{i}"] = Linear(width, hidden, activation="relu")
        else:
            mlp[f"fc{i}"], mlp[f"act{i}"] = Linear(width, hidden), nn.Tanh()
        if spec.dropout:
            mlp[f"drop{i}"] = nn.Dropout(spec.dropout)
        width = hidden
    return nn.Sequential(mlp), width
