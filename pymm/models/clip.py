"""CLIP: two towers and a temperature."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.models import bert, resnet, siglip, text, vit
from pymm.models.bert import Bert, BertSpec
from pymm.models.resnet import ResNet, ResNetSpec, ResNetTower, SmallResNetTower
from pymm.models.siglip import SigLIPText, SigLIPTextTower
from pymm.models.text import TextTower, TextTransformer
from pymm.models.vit import VisionTransformer, ViTSpec, ViTTower
from pymm.ops._checks import fail
from pymm.ops.linear import Activation


class CLIP(nn.Module):
    r"""A dual encoder (Radford et al. 2021, arXiv:2103.00020, fig. 3) with open_clip's interface.

    Args:
        visual: pixels to `(B, E)`.
        text: tokens to `(B, E)`.
        logit_scale: initial value of the parameter, the logarithm of the inverse temperature.
        logit_bias: initial value of a bias on the logits (SigLIP: Zhai et al. 2023, arXiv:2303.15343,
            sec. 3.2); None means that there is no such parameter.

    Raises:
        ValueError: when the towers' E differ.
    """

    logit_bias: nn.Parameter | None

    def __init__(
        self,
        visual: VisionTransformer | ResNet,
        text: TextTransformer | Bert | SigLIPText,
        *,
        logit_scale: float = math.log(1 / 0.07),
        logit_bias: float | None = None,
    ) -> None:
        super().__init__()
        size = visual.num_classes or visual.num_features
        if size != text.num_classes:
            fail("CLIP", "text", f"of the image tower's size {size}", text.num_classes)
        self.visual, self.text = visual, text
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale))
        self.logit_bias = None if logit_bias is None else nn.Parameter(torch.tensor(logit_bias))

    @property
    def image_size(self) -> int:
        return self.visual.image_size

    @property
    def mean(self) -> tuple[float, ...]:
        return self.visual.mean

    @property
    def std(self) -> tuple[float, ...]:
        return self.visual.std

    @property
    def context_length(self) -> int:
        return self.text.context_length

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def embed_dim(self) -> int:
        """E, of the shared embedding."""
        return self.text.num_classes

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether a block's activations are computed again in the backward pass instead of kept."""
        self.visual.set_grad_checkpointing(enable)
        self.text.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        towers = (("visual", self.visual), ("text", self.text))
        return {f"{name}.{parameter}" for name, tower in towers for parameter in tower.no_weight_decay()}

    def encode_image(
        self, pixels: Tensor, normalize: bool = False, *, intermediates: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Embed images.

        Args:
            pixels: `(B, 3, H, W)`, normalized with `mean` and `std`, or `uint8`.
            normalize: scale the rows to length 1.
            intermediates: receives what the tower names, behind `"visual."`.

        Returns:
            `(B, E)`.

        Raises:
            ValueError: when the shape does not fit the tower.
        """
        return _encode(self.visual, pixels, normalize, "visual", intermediates)

    def encode_text(
        self, tokens: Tensor, normalize: bool = False, *, intermediates: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Embed token ids.

        Args:
            tokens: `(B, L)` int64, L ≤ context_length, ids in [0, vocab_size), padded with zeros; for CLIP's
                own text tower the end token is the highest; for SigLIP's, L = context_length.
            normalize: scale the rows to length 1.
            intermediates: receives what the tower names, behind `"text."`.

        Returns:
            `(B, E)`.

        Raises:
            ValueError: when shape, type or an id does not fit.
        """
        return _encode(self.text, tokens, normalize, "text", intermediates)

    def forward(
        self, pixels: Tensor, tokens: Tensor, *, intermediates: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """Embed pairs.

        Args:
            pixels, tokens: as for `encode_image` and `encode_text`.
            intermediates: receives every named tensor of both towers.

        Returns:
            Image and text features `(B, E)`, rows of length 1; the inverse temperature, `exp(logit_scale)`;
            and the bias, where the model has one.
        """
        image = self.encode_image(pixels, normalize=True, intermediates=intermediates)
        caption = self.encode_text(tokens, normalize=True, intermediates=intermediates)
        scale = self.logit_scale.exp()
        return (
            (image, caption, scale) if self.logit_bias is None else (image, caption, scale, self.logit_bias)
        )


def _encode(
    tower: nn.Module, x: Tensor, normalize: bool, name: str, intermediates: dict[str, Tensor] | None
) -> Tensor:
    inner: dict[str, Tensor] | None = None if intermediates is None else {}
    features = tower(x, intermediates=inner)
    if normalize:
        features = F.normalize(features, dim=-1)
    if intermediates is not None and inner is not None:
        intermediates |= {f"{name}.{key}": value for key, value in inner.items()}
        intermediates[f"{name}.features"] = features
    return features


ImageTower = ViTTower | ResNetTower | SmallResNetTower | ViTSpec | ResNetSpec


@dataclass(frozen=True)
class CLIPSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands.

    A tower is CLIP's own, SigLIP's text tower, or a model of its own with a linear head: a ViT or ResNet as
    it classifies images, whose classifier is the projection, and a BERT. A ViT that pools by attention needs
    no projection. `activation` is for CLIP's own towers and SigLIP's text tower.
    """

    name: str
    image: ImageTower
    text: TextTower | BertSpec | SigLIPTextTower
    embed: int
    activation: Activation
    parameters: int
    source: str
    aliases: tuple[str, ...] = ()
    logit_scale: float = math.log(1 / 0.07)
    logit_bias: float | None = None
    # CLIP's own, which open_clip keeps.
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @property
    def image_size(self) -> int:
        return self.image.image_size


def build(spec: CLIPSpec) -> CLIP:
    """The CLIP of a row."""
    visual: VisionTransformer | ResNet
    if isinstance(spec.image, ViTTower):
        visual = vit.build_tower(spec.image, spec.embed, spec.activation, spec.mean, spec.std)
    elif isinstance(spec.image, SmallResNetTower):
        visual = resnet.build_small_tower(spec.image, spec.embed, spec.mean, spec.std)
    elif isinstance(spec.image, ResNetTower):
        visual = resnet.build_tower(spec.image, spec.embed, spec.mean, spec.std)
    elif isinstance(spec.image, ViTSpec):
        classes = 0 if spec.image.pool == "attention" else spec.embed
        visual = vit.build(replace(spec.image, num_classes=classes, mean=spec.mean, std=spec.std))
    else:
        visual = resnet.build(replace(spec.image, num_classes=spec.embed, mean=spec.mean, std=spec.std))
    reading: TextTransformer | Bert | SigLIPText
    if isinstance(spec.text, BertSpec):
        reading = bert.build(spec.text, spec.embed)
    elif isinstance(spec.text, SigLIPTextTower):
        reading = siglip.build_text(spec.text, spec.embed, spec.activation)
    else:
        reading = text.build_tower(spec.text, spec.embed, spec.activation)
    return CLIP(
        visual,
        reading,
        logit_scale=spec.logit_scale,
        logit_bias=spec.logit_bias,
    )
