"""Models by name: `create_model`, `list_models`, `describe`.

An architecture is a file with a `build(spec)`; a model is a row of that file's table. The names of
open_clip ("ViT-B-32", "ViT-B-32-quickgelu", "RN50") are aliases of the rows.
"""

from __future__ import annotations

import difflib
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from pymm.models import (
    beit,
    bert,
    clip,
    clip_rows,
    convnet,
    deit,
    image_tokenizer,
    lenet,
    mae,
    rcnn,
    rcnn_c4,
    resnet,
    siglip_rows,
    vit,
    vit_rows,
)
from pymm.models.beit import BEiT, BEiTSpec
from pymm.models.bert import Bert, BertSpec
from pymm.models.clip import CLIP, CLIPSpec
from pymm.models.convnet import ConvNet, ConvNetSpec
from pymm.models.deit import DeiT, DeiTSpec
from pymm.models.image_tokenizer import ImageTokenizer, ImageTokenizerSpec
from pymm.models.lenet import LeNetSpec
from pymm.models.mae import MAE, MAESpec
from pymm.models.rcnn import RCNN, Detections, RCNNSpec
from pymm.models.rcnn_c4 import RCNNC4Spec
from pymm.models.regions import GridFeatures, RegionExtractor, Regions
from pymm.models.resnet import ResNet, ResNetSpec
from pymm.models.siglip import SigLIPText
from pymm.models.text import TextTransformer
from pymm.models.vit import VisionTransformer, ViTSpec
from pymm.ops._checks import fail

Spec = (
    BEiTSpec
    | BertSpec
    | CLIPSpec
    | ConvNetSpec
    | DeiTSpec
    | ImageTokenizerSpec
    | LeNetSpec
    | MAESpec
    | RCNNC4Spec
    | RCNNSpec
    | ResNetSpec
    | ViTSpec
)

_TABLES: tuple[tuple[Spec, ...], ...] = (
    vit_rows.ROWS,
    deit.ROWS,
    mae.ROWS,
    beit.ROWS,
    image_tokenizer.ROWS,
    resnet.ROWS,
    convnet.ROWS,
    lenet.ROWS,
    clip_rows.ROWS,
    siglip_rows.ROWS,
    bert.ROWS,
    rcnn.ROWS,
    rcnn_c4.ROWS,
)
_ROWS: dict[str, Spec] = {row.name: row for table in _TABLES for row in table}
_BUILD: dict[type, Any] = {
    BEiTSpec: beit.build,
    BertSpec: bert.build,
    CLIPSpec: clip.build,
    ConvNetSpec: convnet.build,
    DeiTSpec: deit.build,
    ImageTokenizerSpec: image_tokenizer.build,
    LeNetSpec: lenet.build,
    MAESpec: mae.build,
    RCNNC4Spec: rcnn_c4.build,
    RCNNSpec: rcnn.build,
    ResNetSpec: resnet.build,
    ViTSpec: vit.build,
}
_ALIASES: dict[str, str] = {alias: row.name for row in _ROWS.values() for alias in row.aliases}


def list_models(pattern: str | None = None) -> list[str]:
    """Names of the models, in order; only those that a shell pattern such as `"clip_*"` fits, if given."""
    return sorted(name for name in _ROWS if pattern is None or fnmatchcase(name, pattern))


def describe(name: str) -> Spec:
    """The row of a model: `name`, `aliases`, `parameters`, `source` and its sizes, such as `image_size`.

    Args:
        name: of `list_models()`, or open_clip's name for it.

    Raises:
        ValueError: when there is no such model.
    """
    row = _ROWS.get(_ALIASES.get(name, name))
    if row is None:
        near = difflib.get_close_matches(name, [*_ROWS, *_ALIASES], n=3)
        expected = f"one of list_models(), such as {', '.join(near)}" if near else "one of list_models()"
        fail("create_model", "name", expected, repr(name))
    return row


def create_model(name: str, *, num_classes: int | None = None, image_size: int | None = None) -> nn.Module:
    """Build a model with random weights, drawn from torch's global generator.

    Args:
        name: of `list_models()`, or open_clip's name for it.
        num_classes: size of the classifier instead of the row's; 0 means no classifier. Not for CLIP,
            MAE and BERT, which have none.
        image_size: side of the images instead of the row's; not for BERT.

    Returns:
        The model, in training mode; on the device and in the type that `torch.device` and
        `torch.set_default_dtype` say.

    Raises:
        ValueError: when there is no such model, or a size does not fit it.
    """
    row = describe(name)
    if image_size is not None and image_size < 1:
        fail("create_model", "image_size", "positive", image_size)
    if num_classes is not None and num_classes < 0:
        fail("create_model", "num_classes", "at least 0", num_classes)
    sizes: dict[str, Any] = {}
    if num_classes is not None:
        if not hasattr(row, "num_classes"):
            fail("create_model", "num_classes", f"None for {row.name}, which has no classifier", num_classes)
        sizes["num_classes"] = num_classes
    if image_size is not None:
        sizes |= _resized(row, image_size)
    model: nn.Module = _BUILD[type(row)](replace(row, **sizes))
    return model


def _resized(row: Spec, image_size: int) -> dict[str, Any]:
    if isinstance(row, CLIPSpec):
        return {"image": replace(row.image, image_size=image_size)}
    if isinstance(row, BertSpec):
        fail("create_model", "image_size", f"None for {row.name}, which reads text", image_size)
    return {"image_size": image_size}


__all__ = [
    "CLIP",
    "MAE",
    "RCNN",
    "BEiT",
    "BEiTSpec",
    "Bert",
    "BertSpec",
    "CLIPSpec",
    "ConvNet",
    "ConvNetSpec",
    "DeiT",
    "DeiTSpec",
    "Detections",
    "GridFeatures",
    "ImageTokenizer",
    "ImageTokenizerSpec",
    "LeNetSpec",
    "MAESpec",
    "RCNNC4Spec",
    "RCNNSpec",
    "RegionExtractor",
    "Regions",
    "ResNet",
    "ResNetSpec",
    "SigLIPText",
    "Spec",
    "TextTransformer",
    "ViTSpec",
    "VisionTransformer",
    "create_model",
    "describe",
    "list_models",
]
