"""The sizes of CLIP.

Names follow open_clip: without a suffix the activation is GELU, with `_quickgelu` it is `x·sigmoid(1.702 x)`.
The weights that OpenAI published need `_quickgelu`; the other activation gives wrong features.
"""

from __future__ import annotations

import math
from dataclasses import replace

from pymm.models import resnet, vit_rows
from pymm.models.bert import BertSpec, describe_bert
from pymm.models.clip import CLIPSpec, ImageTower
from pymm.models.resnet import ResNetSpec, ResNetTower, SmallResNetTower
from pymm.models.text import TextTower
from pymm.models.vit import ViTSpec, ViTTower

_RADFORD_VIT = "Radford et al. 2021, arXiv:2103.00020, table 20"
_RADFORD_RN = "Radford et al. 2021, arXiv:2103.00020, table 19"
_CHERTI = "Cherti et al. 2023, arXiv:2212.07143, with open_clip"
_DATACOMP = "Gadre et al. 2023, arXiv:2304.14108, with open_clip"
_DFN = "Fang et al. 2023, arXiv:2309.17425, with open_clip"
_LIT = "Zhai et al. 2022, arXiv:2111.07991; E is the width of the text tower"
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
_ENORMOUS = ViTTower(224, 14, 1792, 56, 16, 15360)
_SMALL_16 = ViTTower(224, 16, 384, 12, 6, 1536)
_MEDIUM_16 = ViTTower(224, 16, 512, 12, 8, 2048)
_LARGE_16 = ViTTower(224, 16, 1024, 24, 16, 4096)
_PLUS_16 = ViTTower(224, 16, 896, 12, 14, 3584)
_TEXT_256_10 = TextTower(256, 10, 4)
_TEXT_384 = TextTower(384, 12, 6)
_TEXT_512 = TextTower(512, 12, 8)
_TEXT_640 = TextTower(640, 12, 10)
_TEXT_768 = TextTower(768, 12, 12)
_TEXT_1024 = TextTower(1024, 12, 16)
_TEXT_1024_24 = TextTower(1024, 24, 16)
_TEXT_1280 = TextTower(1280, 32, 20)
_TEXT_1280_36 = TextTower(1280, 36, 20)


def _gelu(
    name: str,
    image: ImageTower,
    text: TextTower | BertSpec,
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


def _by_32(tower: ViTTower) -> ViTTower:
    return replace(tower, patch_size=32)


def _locked(image: ViTSpec | ResNetSpec, text: str, name: str, parameters: int) -> CLIPSpec:
    """An image model as it stands and a BERT that reads its first token, of whose width the embedding is."""
    tower = replace(describe_bert(text), pooling="class")
    row = _gelu(name, image, tower, tower.width, parameters, _LIT)
    return replace(row, mean=image.mean, std=image.std)


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

_VITS = {row.name: row for row in vit_rows.ROWS}
_RESNETS = {row.name: row for row in resnet.ROWS}
_TINY_BERT = BertSpec("bert", 128, 3, 4, 512, 0, "pymm", pooling="mean", vocab_size=2048, context_length=24)

ROWS = (
    *_BOTH,
    *(_quick(row) for row in _BOTH),
    _gelu("vit_base_patch32_256", _at(_BASE_32, 256), _TEXT_512, 512, 151_288_833, _DATACOMP, "ViT-B-32-256"),
    _gelu("vit_small_patch32", _by_32(_SMALL_16), _TEXT_384, 384, 63_085_825, "open_clip", "ViT-S-32"),
    _gelu(
        "vit_small_patch32_alt", _by_32(_SMALL_16), _TEXT_256_10, 256, 43_224_449, "open_clip", "ViT-S-32-alt"
    ),
    _gelu("vit_small_patch16", _SMALL_16, _TEXT_384, 384, 62_257_537, "open_clip", "ViT-S-16"),
    _gelu("vit_small_patch16_alt", _SMALL_16, _TEXT_256_10, 256, 42_396_161, "open_clip", "ViT-S-16-alt"),
    _gelu("vit_medium_patch32", _by_32(_MEDIUM_16), _TEXT_512, 512, 103_119_873, "open_clip", "ViT-M-32"),
    _gelu(
        "vit_medium_patch32_alt", _by_32(_MEDIUM_16), _TEXT_384, 384, 80_070_273, "open_clip", "ViT-M-32-alt"
    ),
    _gelu("vit_medium_patch16", _MEDIUM_16, _TEXT_512, 512, 102_015_489, "open_clip", "ViT-M-16"),
    _gelu(
        "vit_base_plus_patch32_256",
        _at(_by_32(_PLUS_16), 256),
        _TEXT_640,
        640,
        210_297_473,
        "open_clip",
        "ViT-B-32-plus-256",
    ),
    _gelu("vit_base_plus_patch16", _PLUS_16, _TEXT_640, 640, 208_351_361, "open_clip", "ViT-B-16-plus"),
    _gelu(
        "vit_base_plus_patch16_240",
        _at(_PLUS_16, 240),
        _TEXT_640,
        640,
        208_377_345,
        _CHERTI,
        "ViT-B-16-plus-240",
    ),
    _gelu("vit_large_patch16", _LARGE_16, _TEXT_768, 768, 427_739_393, "open_clip", "ViT-L-16"),
    _gelu(
        "vit_large_patch16_320", _at(_LARGE_16, 320), _TEXT_768, 768, 427_948_289, "open_clip", "ViT-L-16-320"
    ),
    _gelu(
        "vit_large_patch14_280", _at(_LARGE, 280), _TEXT_768, 768, 427_763_969, "open_clip", "ViT-L-14-280"
    ),
    _gelu(
        "vit_huge_patch16",
        replace(_HUGE, patch_size=16),
        _TEXT_1024_24,
        1024,
        986_263_041,
        "open_clip",
        "ViT-H-16",
    ),
    _gelu("vit_enormous_patch14", _ENORMOUS, _TEXT_1280_36, 1280, 4_581_086_465, "open_clip", "ViT-e-14"),
    _gelu("vit_giant_patch14", _GIANT, _TEXT_1024_24, 1024, 1_366_678_273, _CHERTI, "ViT-g-14"),
    _sigmoid(_BOTH[1]),
    _TINY,
    _sigmoid(_TINY),
    _RN_TINY,
    _sigmoid(_RN_TINY),
    _locked(_VITS["vit_base_patch16_224"], "bert_base", "lit_vit_base_patch16", 195_870_721),
    _locked(_VITS["vit_large_patch16_224"], "bert_large", "lit_vit_large_patch16", 639_492_097),
    _locked(_RESNETS["resnet50"], "bert_base", "lit_resnet50", 134_563_137),
    _gelu("tiny_bert", _TINY.image, _TINY_BERT, 128, 1_716_353, "pymm"),
    _gelu("rn_tiny_minilm", _RN_TINY.image, describe_bert("minilm_l6"), 384, 24_037_537, "pymm"),
)
