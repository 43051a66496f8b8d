"""Where each donor keeps what a model of ours needs; `pymm.interop.rules` says how a map is added."""

from __future__ import annotations

from torch import nn

from pymm.interop import (
    beit_maps,
    bert_maps,
    clip_maps,
    mae_maps,
    rcnn_maps,
    siglip_maps,
    transformers_maps,
    vit_maps,
)
from pymm.interop.clip_maps import OPENAI_FACTS
from pymm.interop.residual_maps import residual_stages
from pymm.interop.rules import KeyMap, Rule, convolution, own
from pymm.models.convnet import ConvNet, GridMap
from pymm.models.resnet import ResNet
from pymm.models.vit import VisionTransformer

_TORCHVISION_RESNET = (
    Rule(r"stem\.(conv|bn)\.(.*)", (r"\g<1>1.\2",)),
    *residual_stages("", ""),
    Rule(r"head\.(.*)", (r"fc.\1",)),
)

# AlexNet's and VGG's fully connected layers have other numbers in torchvision and are convolutions in timm.
_STAGES = Rule(r"stages\.\d+\.(.*)", (r"features.\1",))
_TORCHVISION_HEAD = Rule(r"head\.(.*)", (r"classifier.6.\1",))
_ALEXNET = (
    _STAGES,
    Rule(r"mlp\.fc1\.(.*)", (r"classifier.1.\1",)),
    Rule(r"mlp\.fc2\.(.*)", (r"classifier.4.\1",)),
    _TORCHVISION_HEAD,
)
_VGG = (
    _STAGES,
    Rule(r"mlp\.fc1\.(.*)", (r"classifier.0.\1",)),
    Rule(r"mlp\.fc2\.(.*)", (r"classifier.3.\1",)),
    _TORCHVISION_HEAD,
)
_TIMM_VGG = (
    _STAGES,
    Rule(r"mlp\.fc1\.weight", ("pre_logits.fc1.weight",), convolution(7)),
    Rule(r"mlp\.fc2\.weight", ("pre_logits.fc2.weight",), convolution(1)),
    Rule(r"mlp\.(fc\d)\.bias", (r"pre_logits.\1.bias",)),
    Rule(r"head\.(.*)", (r"head.fc.\1",)),
)


def _is_alexnet(model: nn.Module) -> bool:
    assert isinstance(model, ConvNet)
    return isinstance(model.pool, GridMap) and isinstance(model.mlp, nn.Sequential) and model.pool.side == 6


def _is_vgg(model: nn.Module) -> bool:
    return not _is_alexnet(model)


KEY_MAPS = (
    *clip_maps.MAPS,
    *siglip_maps.MAPS,
    *vit_maps.MAPS,
    *mae_maps.MAPS,
    *beit_maps.MAPS,
    KeyMap(("transformers",), VisionTransformer, transformers_maps.VIT_RULES),
    KeyMap(
        ("transformers",),
        VisionTransformer,
        transformers_maps.VIT_MODEL_RULES,
        variant="as its models have it",
    ),
    KeyMap(
        ("transformers",), VisionTransformer, transformers_maps.VIT_HEADLESS_RULES, variant="without a head"
    ),
    KeyMap(("torchvision", "timm"), ResNet, _TORCHVISION_RESNET),
    KeyMap(("transformers",), ResNet, transformers_maps.RESNET_RULES),
    KeyMap(("torchvision",), ConvNet, _ALEXNET, variant="AlexNet", fits=_is_alexnet),
    KeyMap(("torchvision",), ConvNet, _VGG, variant="VGG", fits=_is_vgg),
    KeyMap(("timm",), ConvNet, _TIMM_VGG, fits=_is_vgg),
    *bert_maps.MAPS,
    *rcnn_maps.MAPS,
)

__all__ = ["KEY_MAPS", "OPENAI_FACTS", "own"]
