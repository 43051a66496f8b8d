"""Pictures as a grid of discrete tokens and back: a VQ-VAE whose codes are directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import Normalize
from pymm.ops import cosine_topk
from pymm.ops._checks import fail, shape


class Tokenized(NamedTuple):
    """What a tokenizer makes of a batch: pixels `(B, 3, H, W)`, tokens `(B, N)`, distances `(B,)`."""

    pixels: Tensor
    tokens: Tensor
    commitment: Tensor


class Codebook(nn.Module):
    r"""Vectors become the nearest of V directions (van den Oord et al. 2017, arXiv:1711.00937, sec. 3.1).

    Vectors and codes have length 1 (Yu et al. 2022, arXiv:2110.04627, sec. 3.2), so the nearest code has the
    largest cosine, and `pymm.ops.cosine_topk` finds it without the matrix of all of them. In training mode a
    forward pass moves the codes: each is the direction of a moving average of the vectors that chose it (van
    den Oord et al., app. A.1). They start at vectors of the first batch, and one that is hardly chosen starts
    anew, drawn with torch's generator (Dhariwal et al. 2020, arXiv:2005.00341, sec. 3.1). Gradients pass
    straight through. Codes are float32 whatever the type of the model.

    Args:
        codes: V.
        width: D, of a code.
        decay: of the moving averages, in [0, 1).
        revive_below: a code that is chosen less often than that share of the mean starts anew.
    """

    stays_float32 = True

    weight: Tensor
    count: Tensor
    total: Tensor

    def __init__(self, codes: int, width: int, *, decay: float = 0.99, revive_below: float = 0.1) -> None:
        super().__init__()
        self.decay, self.revive_below = decay, revive_below
        weight = F.normalize(torch.randn(codes, width), dim=1)
        self.register_buffer("weight", weight)
        self.register_buffer("count", torch.zeros(codes))
        self.register_buffer("total", weight.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors to codes.

        Args:
            z: `(..., D)`, of any length.

        Returns:
            The codes `(..., D)`, their numbers `(...)`, and the squared distances from them `(...)`.
        """
        z = F.normalize(z.float(), dim=-1)
        rows = z.reshape(-1, z.shape[-1])
        if self.training and not self.count.any():
            self._restart(torch.ones_like(self.count, dtype=torch.bool), rows.detach())
        chosen = self.nearest(rows)
        code = self.weight[chosen].reshape(z.shape)
        distance = (z - code).square().sum(-1)
        if self.training:
            self._move(rows.detach(), chosen)
        return z + (code - z).detach(), chosen.reshape(z.shape[:-1]), distance

    @torch.no_grad()
    def nearest(self, rows: Tensor) -> Tensor:
        """Numbers `(n,)` of the codes nearest to `rows (n, D)`."""
        return cosine_topk(rows, self.weight, 1)[1][:, 0]

    @torch.no_grad()
    def _move(self, rows: Tensor, chosen: Tensor) -> None:
        counts = torch.bincount(chosen, minlength=len(self.count)).to(self.count)
        sums = torch.zeros_like(self.total).index_add_(0, chosen, rows)
        self.count.lerp_(counts, 1 - self.decay)
        self.total.lerp_(sums, 1 - self.decay)
        dead = self.count < self.revive_below * self.count.mean()
        if dead.any():
            self._restart(dead, rows)
        self.weight.copy_(F.normalize(self.total, dim=1))

    @torch.no_grad()
    def _restart(self, which: Tensor, rows: Tensor) -> None:
        """Codes become vectors of the batch, with the weight that a code has on average."""
        drawn = rows[torch.randint(len(rows), (int(which.sum()),), device=rows.device)]
        mean = len(rows) / len(which)
        self.total[which], self.weight[which], self.count[which] = drawn * mean, drawn, mean

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Codebook:
        """Codes move to another device and stay float32: half precision would lose what a step adds."""
        for name, buffer in self._buffers.items():
            assert buffer is not None
            moved = fn(buffer)
            self._buffers[name] = moved.float() if buffer.is_meta else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"codes={self.weight.shape[0]}, width={self.weight.shape[1]}"


class Residual(nn.Module):
    """Two convolutions and a shortcut: `(B, C, h, w)` -> the same."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, width), nn.GroupNorm(8, width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))


class ImageTokenizer(nn.Module):
    """A VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937).

    Args:
        normalize: pixels to what the encoder takes.
        encoder: `(B, 3, H, W)` -> `(B, D, H/stride, W/stride)`.
        codebook: of codes of width D.
        decoder: back to `(B, 3, H, W)`.
        image_size: side of the square images that it is made for; others do as well.
        stride: pixels per side of a token.
    """

    def __init__(
        self,
        normalize: Normalize,
        encoder: nn.Module,
        codebook: Codebook,
        decoder: nn.Module,
        *,
        image_size: int,
        stride: int,
    ) -> None:
        super().__init__()
        self.normalize, self.encoder, self.codebook, self.decoder = normalize, encoder, codebook, decoder
        self.image_size, self.stride = image_size, stride

    @property
    def mean(self) -> tuple[float, ...]:
        return self.normalize.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.normalize.std

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return self.codebook.weight.shape[0]

    def encode(self, pixels: Tensor) -> Tensor:
        """`pixels (B, 3, H, W)`, normalized or `uint8` -> vectors `(B, H/stride, W/stride, D)`.

        Raises:
            ValueError: when `stride` does not divide H and W.
        """
        if pixels.ndim != 4 or pixels.shape[2] % self.stride or pixels.shape[3] % self.stride:
            multiples = f"(B, 3, H, W) with H and W multiples of {self.stride}"
            fail("ImageTokenizer", "pixels", multiples, shape(pixels))
        x = self.normalize(pixels, next(self.parameters()).dtype)
        z: Tensor = self.encoder(x.contiguous(memory_format=torch.channels_last))
        return z.permute(0, 2, 3, 1)

    @torch.no_grad()
    def tokenize(self, pixels: Tensor) -> Tensor:
        """`pixels (B, 3, H, W)` -> tokens `(B, N)` int64, row by row; the codes stay as they are."""
        z = self.encode(pixels).float()
        return self.codebook.nearest(z.reshape(-1, z.shape[-1])).reshape(len(pixels), -1)

    def decode(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens `(B, N)` of a grid `(h, w)` -> normalized pixels `(B, 3, h·stride, w·stride)`."""
        return self._decode(self.codebook.weight[tokens].reshape(len(tokens), *grid, -1))

    def _decode(self, codes: Tensor) -> Tensor:
        x: Tensor = self.decoder(codes.to(next(self.parameters()).dtype).permute(0, 3, 1, 2))
        return x

    def forward(self, pixels: Tensor) -> Tokenized:
        """Pixels to tokens and back; in training mode the codes move."""
        codes, tokens, distance = self.codebook(self.encode(pixels))
        return Tokenized(self._decode(codes), tokens.flatten(1), distance.flatten(1).mean(1))


@dataclass(frozen=True)
class ImageTokenizerSpec:
    """A row: sizes, and where they are written. `parameters` counts what is trained, without the codes.

    The encoder halves the map as often as it takes to come from a pixel to `stride`, and has `depth` residual
    blocks at the end; the decoder mirrors it.
    """

    name: str
    vocabulary: int
    code_width: int
    width: int
    depth: int
    parameters: int
    source: str
    image_size: int = 112
    stride: int = 8
    decay: float = 0.99
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)


ROWS = (
    ImageTokenizerSpec(
        "vq_tokenizer_8k",
        8192,
        32,
        256,
        4,
        10_598_051,
        "Bao et al. 2022, arXiv:2106.08254, sec. 2.1, for the grid",
    ),
    ImageTokenizerSpec("vq_tokenizer_mini", 512, 16, 96, 1, 499_651, "pymm", image_size=64, decay=0.95),
)


def build(spec: ImageTokenizerSpec) -> ImageTokenizer:
    """The tokenizer of a row, its convolutions as torch starts them.

    A batch norm in front of the codes keeps the vectors from all becoming one (Łańcucki et al. 2020,
    arXiv:2005.08520, sec. IV).
    """
    halvings = spec.stride.bit_length() - 1
    widths = [max(spec.width >> (halvings - 1 - i), 16) for i in range(halvings)]
    down: list[nn.Module] = []
    for cin, cout in zip([3, *widths], widths, strict=False):
        down += [nn.Conv2d(cin, cout, 4, 2, padding=1), nn.SiLU()]
    up: list[nn.Module] = []
    for cin, cout in zip(widths[::-1], [*widths[-2::-1], widths[0]], strict=True):
        up += [nn.Upsample(scale_factor=2), nn.Conv2d(cin, cout, 3, padding=1), nn.SiLU()]
    return ImageTokenizer(
        Normalize(spec.mean, spec.std),
        nn.Sequential(
            *down,
            *(Residual(spec.width) for _ in range(spec.depth)),
            nn.Conv2d(spec.width, spec.code_width, 1),
            nn.BatchNorm2d(spec.code_width, affine=False),
        ),
        Codebook(spec.vocabulary, spec.code_width, decay=spec.decay),
        nn.Sequential(
            nn.Conv2d(spec.code_width, spec.width, 3, padding=1),
            *(Residual(spec.width) for _ in range(spec.depth)),
            *up,
            nn.Conv2d(widths[0], 3, 3, padding=1),
        ),
        image_size=spec.image_size,
        stride=spec.stride,
    )
