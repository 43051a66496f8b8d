"""Feature maps of several strides from a residual network, and batch norms that stay as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FrozenBatchNorm(nn.Module):
    """A batch norm as a fixed scale and shift: none of its numbers is trained and none is updated.

    Detectors train on too few pictures at once for statistics of a batch (Ren et al. 2015, arXiv:1506.01497).

    Args:
        width: channels.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((width,), value))

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, H, W)` -> the same shape."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def freeze_batch_norms(module: nn.Module, eps: float | None = None) -> None:
    """Replace every batch norm inside `module` by a frozen one with its numbers.

    Args:
        module: changed in place.
        eps: another one than the batch norms'.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm(child.num_features, child.eps if eps is None else eps)
            frozen.load_state_dict({k: v for k, v in child.state_dict().items() if k in frozen.state_dict()})
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child, eps)


class FeaturePyramid(nn.Module):
    """A map of `width` channels for every stage, and one more of twice the stride.

    Lin et al. 2017, arXiv:1612.03144, fig. 3: a 1×1 convolution of each stage's map, to which the coarser sum
    is added, enlarged by repetition, and a 3×3 convolution of each sum.

    Args:
        channels: of the stages' maps, finest first.
        width: of the pyramid's maps.
    """

    def __init__(self, channels: tuple[int, ...], width: int) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.output = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        """Maps `(B, Ci, Hi, Wi)`, finest first -> as many and one, `(B, width, Hi, Wi)`."""
        sums: list[Tensor] = []
        for lateral, x in zip(reversed(self.lateral), reversed(stages), strict=True):
            y = lateral(x)
            sums.append(y + F.interpolate(sums[-1], size=y.shape[-2:], mode="nearest") if sums else y)
        maps = [output(x) for output, x in zip(self.output, reversed(sums), strict=True)]
        return [*maps, maps[-1][:, :, ::2, ::2]]


class LastMap(nn.Module):
    """The map of the last of several stages alone, where there is no pyramid."""

    def forward(self, stages: list[Tensor]) -> list[Tensor]:
        """Maps `(B, Ci, Hi, Wi)`, finest first -> the last one."""
        return [stages[-1]]
