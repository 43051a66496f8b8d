"""Where each donor keeps what a model of ours needs.

A rule goes from our name to the donor's, so that several donor tensors can make one of ours; a map is the
rules of one donor. A name may have several rules; the first whose tensors are all there counts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pymm.models.clip import CLIP
from pymm.models.convnet import ConvNet
from pymm.models.resnet import ResNet
from pymm.models.vit import VisionTransformer


def _same(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0]


def _transposed(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].mT


def _rows(tensors: Sequence[Tensor]) -> Tensor:
    """Tokens or positions with any leading dimensions, as a matrix."""
    return tensors[0].reshape(-1, tensors[0].shape[-1])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    """The kernels of a convolution as the rows of a matrix."""
    return tensors[0].flatten(1)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(tensors))


@dataclass(frozen=True)
class Rule:
    """Our names that fit `ours` come from the tensors that the templates `theirs` name, through `join`."""

    ours: str
    theirs: tuple[str, ...]
    join: Callable[[Sequence[Tensor]], Tensor] = _same

    def names(self, name: str) -> tuple[str, ...] | None:
        """The donor's names for our `name`, or None where the rule is not about it."""
        found = re.fullmatch(self.ours, name)
        return None if found is None else tuple(found.expand(template) for template in self.theirs)


@dataclass(frozen=True)
class KeyMap:
    """The rules of one donor for one class of ours."""

    donor: str
    model: type[nn.Module]
    rules: tuple[Rule, ...]


def _clip_blocks(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Transformer blocks of OpenAI's CLIP, behind the two prefixes."""
    a, b = rf"{re.escape(ours)}blocks\.(\d+)\.", rf"{theirs}transformer.resblocks.\1."
    return (
        Rule(a + r"norm([12])\.(.*)", (b + r"ln_\2.\3",)),
        Rule(a + r"attn\.qkv\.(weight|bias)", (b + r"attn.in_proj_\2",)),
        Rule(a + r"attn\.proj\.(.*)", (b + r"attn.out_proj.\2",)),
        Rule(a + r"mlp\.fc1\.(.*)", (b + r"mlp.c_fc.\2",)),
        Rule(a + r"mlp\.fc2\.(.*)", (b + r"mlp.c_proj.\2",)),
    )


def _residual_stages(ours: str, theirs: str) -> tuple[Rule, ...]:
    """Residual blocks with the names of torchvision, timm and OpenAI's CLIP, behind the two prefixes."""
    rules: list[Rule] = []
    for i in range(4):
        a, b = rf"{re.escape(ours)}stages\.{i}\.(\d+)\.", rf"{theirs}layer{i + 1}.\1."
        rules += [
            Rule(a + r"downsample\.conv\.(.*)", (b + r"downsample.0.\2",)),
            Rule(a + r"downsample\.bn\.(.*)", (b + r"downsample.1.\2",)),
            Rule(a + r"((?:conv|bn)\d\..*)", (b + r"\2",)),
        ]
    return tuple(rules)


_CLIP_VISUAL = (
    Rule(r"visual\.embed\.weight", ("visual.conv1.weight",)),
    Rule(r"visual\.embed\.prefix", ("visual.class_embedding",), _rows),
    Rule(r"visual\.embed\.position", ("visual.positional_embedding",)),
    Rule(r"visual\.norm_pre\.(.*)", (r"visual.ln_pre.\1",)),
    *_clip_blocks("visual.", "visual."),
    Rule(r"visual\.norm\.(.*)", (r"visual.ln_post.\1",)),
    Rule(r"visual\.head\.weight", ("visual.proj",), _transposed),
    Rule(r"visual\.stem\.(.*)", (r"visual.\1",)),
    *_residual_stages("visual.", "visual."),
    Rule(r"visual\.pool\.position", ("visual.attnpool.positional_embedding",)),
    Rule(r"visual\.pool\.q\.(.*)", (r"visual.attnpool.q_proj.\1",)),
    Rule(r"visual\.pool\.kv\.(.*)", (r"visual.attnpool.k_proj.\1", r"visual.attnpool.v_proj.\1"), _stacked),
    Rule(r"visual\.head\.(.*)", (r"visual.attnpool.c_proj.\1",)),
    Rule(r"(logit_scale|logit_bias)", (r"\1",)),
)


def _clip_text(prefix: str) -> tuple[Rule, ...]:
    return (
        Rule(r"text\.embed\.weight", (f"{prefix}token_embedding.weight",)),
        Rule(r"text\.embed\.position", (f"{prefix}positional_embedding",)),
        *_clip_blocks("text.", prefix),
        Rule(r"text\.norm\.(.*)", (rf"{prefix}ln_final.\1",)),
        Rule(r"text\.head\.weight", (f"{prefix}text_projection",), _transposed),
    )


_TIMM_VIT = (
    Rule(r"embed\.(weight|bias)", (r"patch_embed.proj.\1",)),
    Rule(r"embed\.prefix", ("cls_token",), _rows),
    Rule(r"embed\.position", ("pos_embed",), _rows),
    Rule(r"blocks\.(\d+)\.scale([12])", (r"blocks.\1.ls\2.gamma",)),
    Rule(r"((?:norm_pre|blocks|norm|head)\..*)", (r"\1",)),
)

_TORCHVISION_RESNET = (
    Rule(r"stem\.(conv|bn)\.(.*)", (r"\g<1>1.\2",)),
    *_residual_stages("", ""),
    Rule(r"head\.(.*)", (r"fc.\1",)),
)

# AlexNet's and VGG's fully connected layers have other numbers in torchvision and are convolutions in timm.
_TORCHVISION_CONVNET = (
    Rule(r"stages\.\d+\.(.*)", (r"features.\1",)),
    Rule(r"mlp\.fc1\.(.*)", (r"classifier.0.\1",)),
    Rule(r"mlp\.fc1\.(.*)", (r"classifier.1.\1",)),
    Rule(r"mlp\.fc2\.(.*)", (r"classifier.3.\1",)),
    Rule(r"mlp\.fc2\.(.*)", (r"classifier.4.\1",)),
    Rule(r"head\.(.*)", (r"classifier.6.\1",)),
    Rule(r"mlp\.(fc\d)\.weight", (r"pre_logits.\1.weight",), _flat),
    Rule(r"mlp\.(fc\d)\.bias", (r"pre_logits.\1.bias",)),
    Rule(r"head\.(.*)", (r"head.fc.\1",)),
)

KEY_MAPS = (
    KeyMap("OpenAI's CLIP or open_clip", CLIP, (*_CLIP_VISUAL, *_clip_text(""))),
    KeyMap("open_clip with a text tower of its own", CLIP, (*_CLIP_VISUAL, *_clip_text("text."))),
    KeyMap("timm", VisionTransformer, _TIMM_VIT),
    KeyMap("torchvision or timm", ResNet, _TORCHVISION_RESNET),
    KeyMap("torchvision or timm", ConvNet, _TORCHVISION_CONVNET),
)


def own(model: type[nn.Module]) -> KeyMap:
    """The map of our own checkpoints."""
    return KeyMap("pymm", model, (Rule(r"(.*)", (r"\1",)),))
