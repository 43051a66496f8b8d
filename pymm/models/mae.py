"""The masked autoencoder: a vision transformer that sees a quarter of the patches, and a small decoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pymm.layers import (
    Blocks,
    ClassToken,
    Linear,
    PatchEmbed,
    resample_position,
    sincos_position,
    transformer_blocks,
)
from pymm.models.vit import VisionTransformer
from pymm.ops._checks import fail, shape


class MAEDecoder(nn.Module):
    """From the tokens of the visible patches to the pixels of all (He et al. 2022, arXiv:2111.06377, sec. 3).

    Args:
        grid: side of the square grid of patches that `position` is made for.
        embed: the encoder's tokens to the decoder's width, C.
        blocks: the transformer.
        norm: after the blocks.
        head: to the p·p·3 numbers of a patch.
    """

    def __init__(self, grid: int, embed: Linear, blocks: Blocks, norm: nn.Module, head: Linear) -> None:
        super().__init__()
        width = embed.out_features
        self.embed, self.blocks, self.norm, self.head = embed, blocks, norm, head
        self.mask_token = nn.Parameter(torch.empty(width))
        self.position = nn.Parameter(sincos_position((grid, grid), width, prefix=1), requires_grad=False)

    def forward(self, x: Tensor, keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Reconstruct.

        Args:
            x: `(B, 1 + K, Cenc)`, the encoder's class token and visible patches.
            keep: `(B, K)` int64, where these patches are in the grid.
            grid: `(h, w)`; the positions are interpolated where it is not the decoder's own.

        Returns:
            `(B, N, p·p·3)` with N = h·w.
        """
        x = self.embed(x)
        b, _, c = x.shape
        patches = self.mask_token.to(x.dtype).expand(b, grid[0] * grid[1], c)
        patches = patches.scatter(1, keep[..., None].expand(-1, -1, c), x[:, 1:])
        x = torch.cat([x[:, :1], patches], 1) + resample_position(self.position, grid, prefix=1)
        return self.head(self.norm(self.blocks(x))[:, 1:])


class MAE(nn.Module):
    """A masked autoencoder (He et al. 2022, arXiv:2111.06377).

    Args:
        encoder: a vision transformer with one class token.
        decoder: of the same grid.
    """

    def __init__(self, encoder: VisionTransformer, decoder: MAEDecoder) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder

    @property
    def image_size(self) -> int:
        return self.encoder.image_size

    @property
    def patch_size(self) -> int:
        return self.encoder.embed.patch_size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.encoder.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.encoder.std

    @property
    def num_features(self) -> int:
        """C, the width of the encoder's tokens."""
        return self.encoder.num_features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self.encoder.set_grad_checkpointing(enable)
        self.decoder.blocks.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {f"encoder.{name}" for name in self.encoder.no_weight_decay()} | {"decoder.position"}

    def forward_features(self, pixels: Tensor, *, intermediates: dict[str, Tensor] | None = None) -> Tensor:
        """The encoder's tokens of all patches, `(B, 1 + N, C)`."""
        return self.encoder.forward_features(pixels, intermediates=intermediates)

    def forward(
        self, pixels: Tensor, keep: Tensor, *, intermediates: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Predict every patch from the visible ones.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`; H and W multiples of the
                patch size.
            keep: `(B, K)` int64, the visible patches, in any order.
            intermediates: receives what the encoder names, behind `"encoder."`.

        Returns:
            `(B, N, p·p·3)`, each patch with the channels of a pixel together, as `pymm.layers.to_patches` has
            it; what the numbers mean is the objective's to say.

        Raises:
            ValueError: when a shape does not fit.
        """
        if keep.ndim != 2 or keep.shape[0] != pixels.shape[0] or keep.dtype != torch.int64:
            fail("MAE", "keep", f"({pixels.shape[0]}, K) of type torch.int64", f"{shape(keep)}, {keep.dtype}")
        inner: dict[str, Tensor] | None = None if intermediates is None else {}
        x = self.encoder.forward_features(pixels, keep=keep, intermediates=inner)
        if intermediates is not None and inner is not None:
            intermediates |= {f"encoder.{key}": value for key, value in inner.items()}
        h, w = (size // self.patch_size for size in pixels.shape[2:])
        return self.decoder(x, keep, (h, w))


@dataclass(frozen=True)
class MAESpec:
    """A row: the encoder's and the decoder's sizes, and where they are written.

    `parameters` counts those of the row as it stands, the fixed positions of both halves included.
    """

    name: str
    patch_size: int
    width: int
    depth: int
    heads: int
    parameters: int
    source: str
    image_size: int = 224
    decoder_width: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    aliases: tuple[str, ...] = ()
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


_HE = "He et al. 2022, arXiv:2111.06377, sec. 4 and app. A.1"

ROWS = (
    MAESpec("mae_vit_base_patch16", 16, 768, 12, 12, 111_907_840, _HE),
    MAESpec("mae_vit_large_patch16", 16, 1024, 24, 16, 329_541_888, _HE),
    MAESpec("mae_vit_huge_patch14", 14, 1280, 32, 16, 657_074_508, _HE),
    # The encoder is vit_mini_patch8_64.
    MAESpec(
        "mae_vit_mini_patch8_64",
        8,
        192,
        6,
        3,
        3_174_016,
        "pymm",
        image_size=64,
        decoder_width=128,
        decoder_depth=2,
        decoder_heads=4,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    ),
)


def build(spec: MAESpec) -> MAE:
    """The MAE of a row, initialised as its authors do it.

    Xavier uniform for all linear layers, the patches' as well, zero biases, class and mask token normal with
    0.02, positions fixed sines and cosines.
    """
    embed = PatchEmbed(spec.image_size, spec.patch_size, spec.width, mean=spec.mean, std=spec.std)
    encoder = VisionTransformer(
        embed,
        nn.Identity(),
        transformer_blocks(spec.depth, spec.width, spec.heads, 4 * spec.width),
        nn.LayerNorm(spec.width, eps=1e-6),
        ClassToken(),
        nn.Identity(),
    )
    grid, width = spec.image_size // spec.patch_size, spec.decoder_width
    decoder = MAEDecoder(
        grid,
        Linear(spec.width, width),
        transformer_blocks(spec.decoder_depth, width, spec.decoder_heads, 4 * width),
        nn.LayerNorm(width, eps=1e-6),
        Linear(width, 3 * spec.patch_size**2),
    )
    model = MAE(encoder, decoder)
    for layer in model.modules():
        if isinstance(layer, Linear):
            nn.init.xavier_uniform_(layer.weight)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    nn.init.xavier_uniform_(embed.weight.view(spec.width, -1))
    assert embed.prefix is not None
    assert embed.position is not None
    nn.init.normal_(embed.prefix, std=0.02)
    nn.init.normal_(decoder.mask_token, std=0.02)
    with torch.no_grad():
        embed.position.copy_(sincos_position((grid, grid), spec.width, prefix=1))
    embed.position.requires_grad_(False)
    return model
