"""The sizes of the vision transformer.

Names, sizes and normalization are timm's. The rows `vit_*` without a suffix are those of the AugReg weights
(Steiner et al. 2022), whose tables go from Ti to L; `deit_*` differ from them in mean and standard deviation
and in how they are trained, `deit3_*` also in LayerScale and in a class token without a position.
"""

from __future__ import annotations

from dataclasses import replace

from pymm.models.vit import ViTSpec

_VIT = "Dosovitskiy et al. 2021, arXiv:2010.11929, table 1"
_STEINER = "Steiner et al. 2022, arXiv:2106.10270, sec. 3.2"
_DEIT = "Touvron et al. 2021, arXiv:2012.12877, table 1"
_DEIT3 = "Touvron et al. 2022, arXiv:2204.07118, with the sizes of timm"
_REGISTERS = "Darcet et al. 2024, arXiv:2309.16588, sec. 2, with the sizes of timm"
_DINOV2 = "Oquab et al. 2024, arXiv:2304.07193"
_DINOV2_REGISTERS = f"{_DINOV2}, with four registers (arXiv:2309.16588)"
_DINO = "Caron et al. 2021, arXiv:2104.14294, with the sizes of timm"
_ZHAI = "Zhai et al. 2022, arXiv:2106.04560, table 2"

_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _augreg(
    name: str, patch: int, size: tuple[int, int, int, int], parameters: int, source: str, image_size: int
) -> ViTSpec:
    return ViTSpec(name, patch, *size, parameters, source, image_size=image_size)


def _deit(row: ViTSpec) -> ViTSpec:
    name = row.name.replace("vit_", "deit_")
    return replace(row, name=name, source=_DEIT, mean=_IMAGENET_MEAN, std=_IMAGENET_STD)


def _deit3(
    name: str, patch: int, size: tuple[int, int, int, int], parameters: int, image_size: int = 224
) -> ViTSpec:
    return ViTSpec(
        name,
        patch,
        *size,
        parameters,
        _DEIT3,
        image_size=image_size,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        position="patches",
        layer_scale=1e-6,
    )


def _registers(
    name: str, size: tuple[int, int, int, int], parameters: int, layer_scale: float | None
) -> ViTSpec:
    """Four registers and no class token; the mean of the patches is classified."""
    return ViTSpec(
        name,
        16,
        *size,
        parameters,
        _REGISTERS,
        image_size=256,
        prefix=4,
        position="patches",
        pool="mean",
        layer_scale=layer_scale,
    )


def _dinov2(name: str, size: tuple[int, int, int, int], parameters: int) -> ViTSpec:
    """A class token with a position, or with four registers and without one; no classifier."""
    registers = "reg4" in name
    return ViTSpec(
        name,
        14,
        *size,
        parameters,
        _DINOV2_REGISTERS if registers else _DINOV2,
        image_size=518,
        num_classes=0,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
        prefix=5 if registers else 1,
        position="patches" if registers else "all",
        layer_scale=1e-5,
    )


# Width, depth, heads, width of the MLP.
_TI, _S, _B = (192, 12, 3, 768), (384, 12, 6, 1536), (768, 12, 12, 3072)
_L, _H, _M = (1024, 24, 16, 4096), (1280, 32, 16, 5120), (512, 12, 8, 2048)
_SMALL_G, _G = (1408, 40, 16, 6144), (1664, 48, 16, 8192)

_AUGREG = (
    _augreg("vit_tiny_patch16_224", 16, _TI, 5_717_416, _STEINER, 224),
    _augreg("vit_tiny_patch16_384", 16, _TI, 5_790_376, _STEINER, 384),
    _augreg("vit_small_patch32_224", 32, _S, 22_878_952, _STEINER, 224),
    _augreg("vit_small_patch32_384", 32, _S, 22_915_432, _STEINER, 384),
    _augreg("vit_small_patch16_224", 16, _S, 22_050_664, _STEINER, 224),
    _augreg("vit_small_patch16_384", 16, _S, 22_196_584, _STEINER, 384),
    _augreg("vit_base_patch32_224", 32, _B, 88_224_232, _VIT, 224),
    _augreg("vit_base_patch32_384", 32, _B, 88_297_192, _VIT, 384),
    _augreg("vit_base_patch16_224", 16, _B, 86_567_656, _VIT, 224),
    _augreg("vit_base_patch16_384", 16, _B, 86_859_496, _VIT, 384),
    _augreg("vit_base_patch8_224", 8, _B, 86_576_872, _STEINER, 224),
    _augreg("vit_large_patch32_224", 32, _L, 306_535_400, _VIT, 224),
    _augreg("vit_large_patch32_384", 32, _L, 306_632_680, _VIT, 384),
    _augreg("vit_large_patch16_224", 16, _L, 304_326_632, _VIT, 224),
    _augreg("vit_large_patch16_384", 16, _L, 304_715_752, _VIT, 384),
    _augreg("vit_large_patch14_224", 14, _L, 304_203_752, _VIT, 224),
    _augreg("vit_huge_patch14_224", 14, _H, 632_045_800, _VIT, 224),
    _augreg("vit_giant_patch14_224", 14, _SMALL_G, 1_012_611_432, _ZHAI, 224),
    _augreg("vit_gigantic_patch14_224", 14, _G, 1_844_440_680, _ZHAI, 224),
)
_BY_NAME = {row.name: row for row in _AUGREG}

# For pictures of few pixels, which a transformer of a few minutes can learn.
_MINI = ViTSpec(
    "vit_mini_patch8_64",
    8,
    *(192, 6, 3, 768),
    2_721_226,
    "pymm",
    image_size=64,
    num_classes=10,
)

ROWS = (
    *_AUGREG,
    *(
        _deit(_BY_NAME[name])
        for name in (
            "vit_tiny_patch16_224",
            "vit_small_patch16_224",
            "vit_base_patch16_224",
            "vit_base_patch16_384",
        )
    ),
    _deit3("deit3_small_patch16_224", 16, _S, 22_059_496),
    _deit3("deit3_small_patch16_384", 16, _S, 22_205_416, 384),
    _deit3("deit3_medium_patch16_224", 16, _M, 38_849_512),
    _deit3("deit3_base_patch16_224", 16, _B, 86_585_320),
    _deit3("deit3_base_patch16_384", 16, _B, 86_877_160, 384),
    _deit3("deit3_large_patch16_224", 16, _L, 304_374_760),
    _deit3("deit3_large_patch16_384", 16, _L, 304_763_880, 384),
    _deit3("deit3_huge_patch14_224", 14, _H, 632_126_440),
    _registers("vit_little_patch16_reg4_gap_256", (320, 14, 5, 1792), 22_516_008, 1e-5),
    _registers("vit_medium_patch16_reg4_gap_256", _M, 38_881_768, 1e-5),
    _registers("vit_betwixt_patch16_reg4_gap_256", (640, 12, 10, 2560), 60_398_440, 1e-5),
    _registers("vit_base_patch16_reg4_gap_256", _B, 86_615_272, None),
    ViTSpec(
        "vit_small_patch8_224",
        8,
        *_S,
        21_670_272,
        _DINO,
        num_classes=0,
        mean=_IMAGENET_MEAN,
        std=_IMAGENET_STD,
    ),
    _dinov2("vit_small_patch14_dinov2", _S, 22_056_192),
    _dinov2("vit_base_patch14_dinov2", _B, 86_579_712),
    _dinov2("vit_large_patch14_dinov2", _L, 304_367_616),
    _dinov2("vit_small_patch14_reg4_dinov2", _S, 22_057_344),
    _dinov2("vit_base_patch14_reg4_dinov2", _B, 86_582_016),
    _dinov2("vit_large_patch14_reg4_dinov2", _L, 304_370_688),
    _MINI,
)
