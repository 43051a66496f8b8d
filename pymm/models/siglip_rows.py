"""The sizes of SigLIP (Zhai et al. 2023, arXiv:2303.15343).

The authors' weights are for GELU by its tanh formula, which transformers computes; open_clip and timm take
the same weights with the exact GELU. So there are rows for both: `_gelu` is open_clip's, and `_tanh` are the
image towers that timm has without it. The files for 384 pixels and patches of 14 leave the last 6 pixels out:
their row is that of 378.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from pymm.models.clip import CLIPSpec
from pymm.models.siglip import SigLIPTextTower
from pymm.models.vit import ViTSpec

_ZHAI = "Zhai et al. 2023, arXiv:2303.15343, with the sizes of its published weights"
_SO400M = "Alabdulmohsin et al. 2023, arXiv:2305.13035, with the sizes of SigLIP's published weights"
_HALF = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class _Size:
    """Width, depth, heads, width of the MLP: the same in both towers."""

    name: str
    sizes: tuple[int, int, int, int]
    patch_size: int
    image_size: int
    image_parameters: int
    parameters: int
    open_clip: str
    source: str = _ZHAI
    context_length: int = 64


_B, _L, _SO = (768, 12, 12, 3072), (1024, 24, 16, 4096), (1152, 27, 16, 4304)

_SIZES = (
    _Size("base_patch16", _B, 16, 224, 92_884_224, 203_155_970, "ViT-B-16-SigLIP"),
    _Size("base_patch16", _B, 16, 256, 92_930_304, 203_202_050, "ViT-B-16-SigLIP-256"),
    _Size("base_patch16", _B, 16, 384, 93_176_064, 203_447_810, "ViT-B-16-SigLIP-384"),
    _Size("base_patch16", _B, 16, 512, 93_520_128, 203_791_874, "ViT-B-16-SigLIP-512"),
    _Size("large_patch16", _L, 16, 256, 315_956_224, 652_150_786, "ViT-L-16-SigLIP-256"),
    _Size("large_patch16", _L, 16, 384, 316_283_904, 652_478_466, "ViT-L-16-SigLIP-384"),
    _Size("so400m_patch14", _SO, 14, 224, 427_680_704, 877_360_306, "ViT-SO400M-14-SigLIP", _SO400M, 16),
    _Size("so400m_patch14", _SO, 14, 378, 428_225_600, 877_960_498, "ViT-SO400M-14-SigLIP-378", _SO400M),
)


def _image(size: _Size) -> ViTSpec:
    family, patch = size.name.split("_")
    return ViTSpec(
        f"vit_{family}_{patch}_siglip_{size.image_size}",
        size.patch_size,
        *size.sizes,
        size.image_parameters,
        size.source,
        image_size=size.image_size,
        num_classes=0,
        prefix=0,
        position="patches",
        pool="attention",
    )


def _tanh(image: ViTSpec) -> ViTSpec:
    return replace(image, name=f"{image.name}_tanh", activation="gelu_tanh")


def _pair(name: str, image: ViTSpec, text: SigLIPTextTower, parameters: int, source: str) -> CLIPSpec:
    """The authors' model, with the temperature and the bias that training starts from (sec. 3.2)."""
    return CLIPSpec(
        name,
        image,
        text,
        image.width,
        "gelu_tanh",
        parameters,
        source,
        logit_scale=math.log(10),
        logit_bias=-10.0,
        mean=_HALF,
        std=_HALF,
    )


def _siglip(size: _Size) -> CLIPSpec:
    text = SigLIPTextTower(*size.sizes, size.context_length)
    name = f"siglip_{size.name}_{size.image_size}"
    return _pair(name, _tanh(_image(size)), text, size.parameters, size.source)


def _exact(row: CLIPSpec, *aliases: str) -> CLIPSpec:
    assert isinstance(row.image, ViTSpec)
    image = replace(row.image, activation="gelu")
    return replace(row, name=f"{row.name}_gelu", image=image, activation="gelu", aliases=aliases)


# For tests.
_TINY = _pair(
    "siglip_tiny",
    ViTSpec(
        "",
        8,
        *(128, 4, 4, 512),
        1_020_800,
        "pymm",
        image_size=48,
        prefix=0,
        position="patches",
        pool="attention",
        activation="gelu_tanh",
    ),
    SigLIPTextTower(128, 3, 4, 512, context_length=24, vocab_size=2048),
    1_897_602,
    "pymm",
)

ROWS: tuple[ViTSpec | CLIPSpec, ...] = (
    *(_image(size) for size in _SIZES),
    *(_tanh(_image(size)) for size in _SIZES),
    *(_siglip(size) for size in _SIZES),
    *(_exact(_siglip(size), size.open_clip) for size in _SIZES),
    _TINY,
    _exact(_TINY),
)
