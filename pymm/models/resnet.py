"""Residual networks: ResNet, and the image tower that CLIP makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import (
    AttentionPool2d,
    BasicBlock,
    Bottleneck,
    Linear,
    MeanMap,
    Normalize,
    antialiased_bottleneck,
    basic_block,
    bottleneck,
    checkpointed,
)
from pymm.models.mapped import MappedNetwork, linear_head
from pymm.ops._checks import fail, shape


class ResNet(MappedNetwork):
    """A residual network (He et al. 2016, arXiv:1512.03385) with timm's interface.

    Args:
        normalize: pixels to what the stem takes.
        stem: to the first feature map.
        stages: four sequences of blocks; all but the first halve the map.
        pool: the last map to `(B, C)`.
        head: the classifier, CLIP's projection, or `nn.Identity()`.
        image_size: side of the square images that the network is made for.
        num_features: C, channels of the last map.
    """

    def __init__(
        self,
        normalize: Normalize,
        stem: nn.Module,
        stages: nn.ModuleList,
        pool: nn.Module,
        head: nn.Module,
        *,
        image_size: int,
        num_features: int,
    ) -> None:
        super().__init__()
        self.normalize, self.stem, self.stages, self.pool, self.head = normalize, stem, stages, pool, head
        self.image_size, self.num_features, self.head_hidden_size = image_size, num_features, num_features

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"pool.position"} if isinstance(self.pool, AttentionPool2d) else set()

    def stage_names(self) -> list[tuple[str, ...]]:
        """Modules and parameters by stage, from the pixels to the head; see `pymm.models.stages`."""
        stages = [(f"stages.{i}",) for i in range(len(self.stages))]
        return [("stem",), *stages, ("pool", "head")]

    def forward_features(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """Pixels to the last feature map; `.flatten(2).mT` makes it tokens `(B, N, C)`.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`.
            intermediates: receives `"stem"`, `"stages.0"`, ..., `"stages.3"`.

        Returns:
            `(B, C, H/32, W/32)`.
        """
        x = self.normalize(pixels, next(self.parameters()).dtype)
        x = self.stem(x.contiguous(memory_format=torch.channels_last))  # what convolutions are fastest with
        if intermediates is not None:
            intermediates["stem"] = x
        for i, stage in enumerate(self.stages):
            assert isinstance(stage, nn.Sequential)
            for block in stage:
                again = self.grad_checkpointing and torch.is_grad_enabled()
                x = checkpointed(block, x) if again else block(x)
            if intermediates is not None:
                intermediates[f"stages.{i}"] = x
        return x

    def forward_head(self, x: Tensor, *, pre_logits: bool = False) -> Tensor:
        """A map `(B, C, h, w)` to `(B, num_classes)`, or to the pooled `(B, C)` with `pre_logits`."""
        x = self.pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """`pixels (B, 3, H, W)` -> `(B, num_classes)`; `intermediates` as in `forward_features`."""
        return self.forward_head(self.forward_features(pixels, intermediates=intermediates))


class Stem(nn.Module):
    """A 7×7 convolution and a max pooling: `(B, 3, H, W)` -> `(B, C, H/4, W/4)` (He et al. 2016, table 1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 7, 2, padding=3, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.relu(self.bn(self.conv(x)), inplace=True), 3, 2, padding=1)


class TripleStem(nn.Module):
    """Three 3×3 convolutions and an average pooling: `(B, 3, H, W)` -> `(B, C, H/4, W/4)`.

    ResNet-D's stem (He et al. 2019, arXiv:1812.01187, fig. 2b) with CLIP's pooling.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.conv1 = nn.Conv2d(3, half, 3, 2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = nn.Conv2d(half, half, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = nn.Conv2d(half, width, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) < 32:  # four average poolings follow, which round down
            fail("ResNet", "pixels", "(B, 3, H, W) with H and W at least 32", shape(x))
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.relu(self.bn2(self.conv2(x)), inplace=True)
        x = F.relu(self.bn3(self.conv3(x)), inplace=True)
        return F.avg_pool2d(x, 2)


class SmallStem(nn.Module):
    """A 3×3 convolution: `(B, 3, H, W)` -> `(B, C, H/2, W/2)`, for pictures of few pixels.

    The stem that He et al. 2016 use for CIFAR-10 (arXiv:1512.03385, sec. 4.2), with a stride of two.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


def _stages(
    block: Callable[[int, int, int], nn.Module], depths: tuple[int, ...], width: int, expansion: int
) -> nn.ModuleList:
    stages, cin = nn.ModuleList(), width
    for i, depth in enumerate(depths):
        inner = width * 2**i
        blocks = []
        for j in range(depth):
            blocks.append(block(cin, inner, 2 if i and j == 0 else 1))
            cin = inner * expansion
        stages.append(nn.Sequential(*blocks))
    return stages


def _start_as_identity(stages: nn.ModuleList) -> None:
    """Zero the last scale of each branch (Goyal et al. 2017, arXiv:1706.02677, sec. 5.1)."""
    for block in stages.modules():
        if isinstance(block, (BasicBlock, Bottleneck)):
            assert isinstance(block.last_norm.weight, Tensor)
            nn.init.zeros_(block.last_norm.weight)


@dataclass(frozen=True)
class ResNetSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands."""

    name: str
    depths: tuple[int, int, int, int]
    bottleneck: bool
    parameters: int
    source: str = "He et al. 2016, arXiv:1512.03385, table 1"
    width: int = 64
    image_size: int = 224
    num_classes: int = 1000
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


ROWS = (
    ResNetSpec("resnet18", (2, 2, 2, 2), False, 11_689_512),
    ResNetSpec("resnet34", (3, 4, 6, 3), False, 21_797_672),
    ResNetSpec("resnet50", (3, 4, 6, 3), True, 25_557_032),
    ResNetSpec("resnet101", (3, 4, 23, 3), True, 44_549_160),
    ResNetSpec("resnet152", (3, 8, 36, 3), True, 60_192_808),
)


def build(spec: ResNetSpec) -> ResNet:
    """The ResNet of a row, initialised as timm: Kaiming normal over the fan-out, blocks as identities."""
    block: Callable[[int, int, int], nn.Module] = bottleneck if spec.bottleneck else basic_block
    expansion = 4 if spec.bottleneck else 1
    features = spec.width * 8 * expansion
    model = ResNet(
        Normalize(spec.mean, spec.std),
        Stem(spec.width),
        _stages(block, spec.depths, spec.width, expansion),
        MeanMap(),
        linear_head(features, spec.num_classes),
        image_size=spec.image_size,
        num_features=features,
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    _start_as_identity(model.stages)
    return model


@dataclass(frozen=True)
class ResNetTower:
    """Sizes of the residual network inside a CLIP row."""

    image_size: int
    depths: tuple[int, int, int, int]
    width: int


@dataclass(frozen=True)
class SmallResNetTower:
    """Sizes of a residual network of basic blocks, for pictures of few pixels, inside a CLIP row."""

    image_size: int
    depths: tuple[int, int, int, int]
    width: int


def build_small_tower(
    tower: SmallResNetTower, embed: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> ResNet:
    """An image tower for small pictures: one convolution as stem, basic blocks, the mean, a projection."""
    features = tower.width * 8
    model = ResNet(
        Normalize(mean, std),
        SmallStem(tower.width),
        _stages(basic_block, tower.depths, tower.width, 1),
        MeanMap(),
        Linear(features, embed, bias=False),
        image_size=tower.image_size,
        num_features=features,
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def build_tower(tower: ResNetTower, embed: int, mean: tuple[float, ...], std: tuple[float, ...]) -> ResNet:
    """CLIP's image tower: three convolutions as stem, antialiased blocks, attention pooling.

    Radford et al. 2021, arXiv:2103.00020, sec. 2.4. Initialised as CLIP: convolutions as `nn.Conv2d`, blocks
    as identities, the pooling's projections normal with 1/√width. Heads are 64 wide.
    """
    if tower.image_size < 32:
        fail("ResNet", "image_size", "at least 32", tower.image_size)
    features = tower.width * 32
    head = Linear(features, embed)
    nn.init.normal_(head.weight, std=features**-0.5)
    model = ResNet(
        Normalize(mean, std),
        TripleStem(tower.width),
        _stages(antialiased_bottleneck, tower.depths, tower.width, 4),
        AttentionPool2d(tower.image_size // 32, features, features // 64),
        head,
        image_size=tower.image_size,
        num_features=features,
    )
    _start_as_identity(model.stages)
    return model
