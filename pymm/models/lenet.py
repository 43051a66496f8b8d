"""LeNet-5 as its paper has it, with what later networks left out."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import Linear, Normalize
from pymm.models.convnet import LECUN, ConvNet, GridMap
from pymm.ops._checks import fail

# Maps of S2 that each of the 16 maps of C3 sees (table I).
CONNECTIONS = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


class ScaledTanh(nn.Module):
    """`1.7159 tanh(2x/3)`, which maps ±1 to ±1 (LeCun et al. 1998, eq. 6 and appendix A)."""

    def forward(self, x: Tensor) -> Tensor:
        return 1.7159 * torch.tanh(x * (2 / 3))


class Subsampling(nn.Module):
    r"""The sum of each 2×2 window times a coefficient plus a bias, one of each per map.

    `(B, C, h, w)` -> `(B, C, h/2, w/2)` (LeCun et al. 1998, sec. II.B, layer S2).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels))
        self.bias = nn.Parameter(torch.empty(channels))

    def forward(self, x: Tensor) -> Tensor:
        sums = F.avg_pool2d(x, 2, divisor_override=1)
        return sums * self.weight.view(-1, 1, 1) + self.bias.view(-1, 1, 1)


class PartialConv2d(nn.Module):
    """A convolution whose maps see only some maps of the input (LeCun et al. 1998, table I).

    Args:
        channels: maps of the input.
        connections: for each map of the result, those of the input that it sees.
        kernel: side of the kernels. `weight` is `(connections, kernel, kernel)`, in the order of the table.
    """

    index: Tensor

    def __init__(self, channels: int, connections: tuple[tuple[int, ...], ...], kernel: int) -> None:
        super().__init__()
        self.channels, self.connections, self.kernel = channels, connections, kernel
        places = [i * channels + j for i, seen in enumerate(connections) for j in seen]
        self.register_buffer("index", torch.tensor(places), persistent=False)
        self.weight = nn.Parameter(torch.empty(len(places), kernel, kernel))
        self.bias = nn.Parameter(torch.empty(len(connections)))

    def forward(self, x: Tensor) -> Tensor:
        """`x (B, channels, h, w)` -> `(B, len(connections), h - kernel + 1, w - kernel + 1)`."""
        maps, side = len(self.connections), self.kernel
        dense = self.weight.new_zeros(maps * self.channels, side, side).index_copy(0, self.index, self.weight)
        return F.conv2d(x, dense.view(maps, self.channels, side, side), self.bias)


class RadialBasis(nn.Module):
    r"""Minus the squared distance to a code per class: `(B, K)` -> `(B, num_classes)`.

    .. math:: y_i = -\sum_j (x_j - w_{ij})^2

    The negative of LeCun et al. 1998, eq. 7, so that the largest is the answer, and cross-entropy on it is
    their eq. 9 without its constant. The codes are fixed; here they are random signs, which the paper names
    as an alternative to its pictures of characters.
    """

    code: Tensor

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.register_buffer("code", torch.empty(out_features, in_features).bernoulli_(0.5) * 2 - 1)

    def forward(self, x: Tensor) -> Tensor:
        return -(x[:, None] - self.code).square().sum(2)


@dataclass(frozen=True)
class LeNetSpec:
    """The row; the sizes stand in `build`. `parameters` counts the trainable ones."""

    name: str
    parameters: int
    source: str
    image_size: int = 32
    num_classes: int = 10
    aliases: tuple[str, ...] = ()
    # White is -0.1 and black 1.175 (sec. II.B), where a byte says how black a pixel is.
    mean: tuple[float, ...] = (0.1 / 1.275,)
    std: tuple[float, ...] = (1 / 1.275,)


ROWS = (LeNetSpec("lenet5_1998", 60_000, LECUN),)


def build(spec: LeNetSpec) -> ConvNet:
    """LeNet-5 with its partial C3, trainable subsampling, scaled tanh and radial basis functions.

    Weights and biases begin uniform within ±2.4 over the inputs of a unit (LeCun et al. 1998, appendix A).

    Raises:
        ValueError: when nothing would be left of an image of the row's size.
    """
    if spec.image_size < 32:
        fail("ConvNet", "image_size", f"at least 32 for {spec.name}", spec.image_size)
    stages = nn.ModuleList(
        [
            _named(c1=nn.Conv2d(1, 6, 5), act1=ScaledTanh(), s2=Subsampling(6), act2=ScaledTanh()),
            _named(
                c3=PartialConv2d(6, CONNECTIONS, 5), act3=ScaledTanh(), s4=Subsampling(16), act4=ScaledTanh()
            ),
            _named(c5=nn.Conv2d(16, 120, 5), act5=ScaledTanh()),
        ]
    )
    model = ConvNet(
        Normalize(spec.mean, spec.std),
        stages,
        GridMap(1),
        _named(f6=Linear(120, 84), act6=ScaledTanh()),
        RadialBasis(84, spec.num_classes) if spec.num_classes else nn.Identity(),
        image_size=spec.image_size,
        smallest_size=32,
        num_features=120,
        head_hidden_size=84,
    )
    for module in [*model.stages.modules(), *model.mlp.modules()]:
        _start(module)
    return model


def _named(**modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(modules))


def _start(module: nn.Module) -> None:
    if isinstance(module, PartialConv2d):  # its units have different numbers of inputs
        bounds = [2.4 / (len(seen) * module.kernel**2) for seen in module.connections]
        weights = module.weight.split([len(seen) for seen in module.connections])
        for bound, weight, bias in zip(bounds, weights, module.bias, strict=True):
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)
    elif isinstance(module, (nn.Conv2d, Linear, Subsampling)):
        bound = 2.4 / (4 if isinstance(module, Subsampling) else module.weight[0].numel())
        for parameter in module.parameters(recurse=False):
            nn.init.uniform_(parameter, -bound, bound)
