"""The sizes of CLIP.

Names follow open_clip: without a suffix the activation is GELU, with `_quickgelu` it is `x·sigmoid(1.702 x)`.
The weights that OpenAI published need `_quickgelu`; the other activation gives wrong features.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pymm.models.clip import CLIPSpec
from pymm.models.resnet import ResNetTower, SmallResNetTower
from pymm.models.text import TextTower
from pymm.models.vit import ViTTower

_RADFORD_VIT = "Radford et al. 2021, arXiv:2103.00020, table 20"
_RADFORD_RN = "Radford et al. 2021, arXiv:2103.00020, table 19"
_CHERTI = "Cherti et al. 2023, arXiv:2212.07143, with open_clip"
_DATACOMP = "Gadre et al. 2023, arXiv:2304.14108, with open_clip"
_DFN = "Fang et al. 2023, arXiv:2309.17425, with open_clip"
_SIGLIP = "Zhai et al. 2023, arXiv:2303.15343, sec. 3.2, with CLIP's towers"

_BASE_32 = ViTTower(224, 32, 768, 12, 12, 3072)
_BASE_16 = ViTTower(224, 16, 768, 12, 12, 3072)
_LARGE = ViTTower(224, 14, 1024, 24, 16, 4096)
_HUGE = ViTTower(224, 14, 1280, 32, 16, 5120)
_GIANT = ViTTower(224, 14, 1408, 40, 16, 6144)
_BIGG = ViTTower(224, 14, 1664, 48, 16, 8192)
_RN50 = ResNetTower(224, (3, 4, 6, 3), 64)
_RN101 = ResNetTower(224, (3, 4, 23, 3), 64)
_RN50X4 = ResNetTower(288, (4, 6, 10, 6), 80)
_RN50X16 = ResNetTower(384, (6, 8, 18, 8), 96)
_RN50X64 = ResNetTower(448, (3, 15, 36, 10), 128)
_TEXT_512 = TextTower(512, 12, 8)
_TEXT_640 = TextTower(640, 12, 10)
_TEXT_768 = TextTower(768, 12, 12)
_TEXT_1024 = TextTower(1024, 12, 16)
_TEXT_1024_24 = TextTower(1024, 24, 16)
_TEXT_1280 = TextTower(1280, 32, 20)


def _gelu(
    name: str,
    image: ViTTower | ResNetTower | SmallResNetTower,
    text: TextTower,
    embed: int,
    parameters: int,
    source: str,
    *aliases: str,
) -> CLIPSpec:
    return CLIPSpec(f"clip_{name}", image, text, embed, "gelu", parameters, source, aliases)


def _quick(row: CLIPSpec) -> CLIPSpec:
    aliases = tuple(f"{alias}-quickgelu" for alias in row.aliases)
    return replace(row, name=f"{row.name}_quickgelu", activation="quick_gelu", aliases=aliases)


def _sigmoid(row: CLIPSpec) -> CLIPSpec:
    """A row for the sigmoid loss: SigLIP's initial temperature and bias, and one parameter more."""
    return replace(
        row,
        name=f"{row.name}_sigmoid",
        source=_SIGLIP,
        aliases=(),
        parameters=row.parameters + 1,
        logit_scale=math.log(10),
        logit_bias=-10.0,
    )


def _at(tower: ViTTower, image_size: int) -> ViTTower:
    return replace(tower, image_size=image_size)


# These exist with both activations.
_BOTH = (
    _gelu("vit_base_patch32", _BASE_32, _TEXT_512, 512, 151_277_313, _RADFORD_VIT, "ViT-B-32"),
    _gelu("vit_base_patch16", _BASE_16, _TEXT_512, 512, 149_620_737, _RADFORD_VIT, "ViT-B-16"),
    _gelu("vit_large_patch14", _LARGE, _TEXT_768, 768, 427_616_513, _RADFORD_VIT, "ViT-L-14"),
    _gelu(
        "vit_large_patch14_336", _at(_LARGE, 336), _TEXT_768, 768, 427_944_193, _RADFORD_VIT, "ViT-L-14-336"
    ),
    _gelu("vit_huge_patch14", _HUGE, _TEXT_1024_24, 1024, 986_109_441, _CHERTI, "ViT-H-14"),
    _gelu("vit_huge_patch14_378", _at(_HUGE, 378), _TEXT_1024_24, 1024, 986_714_881, _DFN, "ViT-H-14-378"),
    _gelu("vit_bigg_patch14", _BIGG, _TEXT_1280, 1280, 2_539_567_105, "open_clip", "ViT-bigG-14"),
    _gelu("rn50", _RN50, _TEXT_512, 1024, 102_007_137, _RADFORD_RN, "RN50"),
    _gelu("rn101", _RN101, _TEXT_512, 512, 119_688_033, _RADFORD_RN, "RN101"),
    _gelu("rn50x4", _RN50X4, _TEXT_640, 640, 178_300_601, _RADFORD_RN, "RN50x4"),
    _gelu("rn50x16", _RN50X16, _TEXT_768, 768, 290_979_217, _RADFORD_RN, "RN50x16"),
    _gelu("rn50x64", _RN50X64, _TEXT_1024, 1024, 623_258_305, _RADFORD_RN, "RN50x64"),
)

# For tests.
_TINY = _gelu("tiny", ViTTower(48, 8, 128, 4, 4, 512), TextTower(128, 3, 4, 24, 2048), 128, 1_716_097, "pymm")
# For the demo: of its few thousand small pictures a residual network learns faster than a transformer.
_RN_TINY = _gelu(
    "rn_tiny", SmallResNetTower(40, (1, 1, 1, 1), 32), TextTower(128, 2, 2, 16, 2048), 192, 1_961_121, "pymm"
)

ROWS = (
    *_BOTH,
    *(_quick(row) for row in _BOTH),
    _gelu("vit_base_patch32_256", _at(_BASE_32, 256), _TEXT_512, 512, 151_288_833, _DATACOMP, "ViT-B-32-256"),
    _gelu("vit_giant_patch14", _GIANT, _TEXT_1024_24, 1024, 1_366_678_273, _CHERTI, "ViT-g-14"),
    _sigmoid(_BOTH[1]),
    _TINY,
    _sigmoid(_TINY),
    _RN_TINY,
)
