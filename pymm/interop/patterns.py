"""The parts of other libraries' modules that pymm's ops can run: how they look, and what runs instead.

A pattern knows modules by their attributes and by the arguments of their forward, not by their names. Where
this leaves doubt, the swap is tried on a copy with random weights, and made only if the results agree.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from pymm import ops
from pymm.ops.linear import Activation

# Where a swap keeps what its forward needs; no part of a state dict.
FACTS = "_pymm_facts"


@dataclass(frozen=True)
class Pattern:
    """One kind of part.

    Args:
        part: what it is, in words.
        fits: whether a module looks like it; None where it has nothing to do with it, else the reason why it
            is left, or "" where it fits.
        forward: in the place of the module's.
        example: arguments in float32 for the trial on a copy; None where the fit leaves no doubt.
    """

    part: str
    fits: Callable[[nn.Module], str | None]
    forward: Callable[..., Any]
    example: Callable[[nn.Module], tuple[Any, ...]] | None = None


def parameters_of(function: Callable[..., Any]) -> list[str]:
    """Names of a forward's arguments behind `self`."""
    return list(inspect.signature(function).parameters)[1:]


def original(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """The forward of the module's class."""
    return type(module).forward(module, *args, **kwargs)


def _plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Whether a module is of a class of torch itself, with parameters as it made them."""
    if type(module) is not kind:
        return f"a subclass of {kind.__name__}" if isinstance(module, kind) else None
    names = ("weight", "bias")
    if any(type(module._parameters.get(n, 0)) not in (nn.Parameter, type(None)) for n in names):
        return "its weight is computed, or of another kind than a parameter"
    return ""


def _is_patches(module: nn.Module) -> str | None:
    reason = _plain(module, nn.Conv2d)
    if reason is None or not isinstance(module, nn.Conv2d):
        return None
    if module.kernel_size != module.stride or module.kernel_size[0] < 4 or module.in_channels > 4:
        return None
    if module.padding not in ((0, 0), 0, "valid") or module.dilation != (1, 1) or module.groups != 1:
        return "a convolution of patches with padding, dilation or groups"
    return reason


def _patches(self: Any, input: Tensor) -> Tensor:
    h, w = input.shape[-2] // self.stride[0], input.shape[-1] // self.stride[1]
    if input.ndim != 4 or not h or not w:
        return original(self, input)
    pixels = input[
        ..., : h * self.stride[0], : w * self.stride[1]
    ]  # what a convolution leaves out at the edges
    tokens = ops.patch_embed(pixels, self.weight, self.bias)
    return tokens.transpose(1, 2).unflatten(2, (h, w))  # a view, which `.flatten(2).transpose(1, 2)` undoes


def _is_linear(module: nn.Module) -> str | None:
    return _plain(module, nn.Linear)


def _linear(self: Any, input: Tensor) -> Tensor:
    return ops.linear(input, self.weight, self.bias, getattr(self, FACTS).get("activation"))


def _as_it_is(self: Any, input: Tensor) -> Tensor:
    return input


def _is_multihead(module: nn.Module) -> str | None:
    if not isinstance(module, nn.MultiheadAttention):
        return None
    if type(module) is not nn.MultiheadAttention:
        return "a subclass of MultiheadAttention"
    if module.in_proj_weight is None or module.bias_k is not None or module.add_zero_attn:
        return "keys and values of other widths, or more of them than tokens"
    if type(module.in_proj_weight) is not nn.Parameter or type(module.out_proj.weight) is not nn.Parameter:
        return "its weight is computed, or of another kind than a parameter"
    return ""


def _multihead(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    padded = key_padding_mask is not None
    if need_weights or query.ndim != 3 or (padded and (is_causal or key_padding_mask.dtype != torch.bool)):  # type: ignore[union-attr]
        return original(
            self,
            query,
            key,
            value,
            key_padding_mask,
            need_weights,
            attn_mask,
            average_attn_weights,
            is_causal,
        )
    alike = query is key and key is value
    if not self.batch_first:
        query = query.transpose(0, 1)
        key, value = (query, query) if alike else (key.transpose(0, 1), value.transpose(0, 1))
    (b, t, c), s = query.shape, key.shape[1]
    heads, d = self.num_heads, c // self.num_heads
    weight, bias = self.in_proj_weight, self.in_proj_bias
    if alike:
        q, k, v = ops.linear(query, weight, bias).view(b, t, 3, heads, d).unbind(2)
    else:
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        q, k, v = (
            ops.linear(x, w, y).view(b, n, heads, d)
            for x, w, y, n in zip((query, key, value), weight.chunk(3), biases, (t, s, s), strict=True)
        )
    if is_causal:  # attn_mask says the same again
        attn_mask = None
    elif attn_mask is not None:
        attn_mask = ~attn_mask if attn_mask.dtype == torch.bool else attn_mask
        attn_mask = attn_mask.view(b, heads, t, s) if attn_mask.ndim == 3 else attn_mask
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    valid = None if key_padding_mask is None else ~key_padding_mask
    dropout_p = self.dropout if self.training else 0.0
    y = ops.attention(q, k, v, attn_mask, dropout_p, is_causal, key_padding_mask=valid)
    y = ops.linear(y.transpose(1, 2).reshape(b, t, c), self.out_proj.weight, self.out_proj.bias)
    return (y if self.batch_first else y.transpose(0, 1)), None


_FUSED_ARGUMENTS = {"x", "attn_mask", "is_causal"}
_RELATIVE_ARGUMENTS = ["x", "shared_rel_pos_bias"]


def _is_fused(module: nn.Module) -> str | None:
    """Attention with one projection for queries, keys and values, as timm writes it."""
    reason = _has_thirds(module)
    if reason == "" and not set(parameters_of(type(module).forward)) <= _FUSED_ARGUMENTS:
        return "its forward takes more than tokens and a mask"
    return reason


def _is_relative(module: nn.Module) -> str | None:
    """The same with a bias for each relative position, as BEiT has it in timm."""
    names = ("q_bias", "k_bias", "v_bias", "relative_position_bias_table", "_get_rel_pos_bias")
    if not all(hasattr(module, name) for name in names):
        return None
    return _has_thirds(module) if parameters_of(type(module).forward) == _RELATIVE_ARGUMENTS else None


def _has_thirds(module: nn.Module) -> str | None:
    qkv, proj = getattr(module, "qkv", None), getattr(module, "proj", None)
    if not isinstance(qkv, nn.Linear) or not isinstance(proj, nn.Linear):
        return None
    if not isinstance(getattr(module, "num_heads", None), int) or qkv.out_features != 3 * proj.in_features:
        return "its heads are not thirds of one projection"
    return ""


def _fused(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    return _attend(self, self.qkv(x), attn_mask, is_causal)


def _relative(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
    if self.q_bias is None:
        qkv = self.qkv(x)
    else:
        qkv = ops.linear(x, self.qkv.weight, torch.cat((self.q_bias, self.k_bias, self.v_bias)))
    bias = None if self.relative_position_bias_table is None else self._get_rel_pos_bias()
    if shared_rel_pos_bias is not None:
        bias = shared_rel_pos_bias if bias is None else bias + shared_rel_pos_bias
    return _attend(self, qkv, bias)


def _attend(self: Any, qkv: Tensor, attn_mask: Tensor | None, is_causal: bool = False) -> Tensor:
    """From the heads of one projection to the result."""
    b, t, _ = qkv.shape
    q, k, v = (
        part.transpose(1, 2)
        for part in qkv.view(b, t, 3, self.num_heads, qkv.shape[2] // (3 * self.num_heads)).unbind(2)
    )
    q, k = (getattr(self, name, _as_it_is_alone)(part) for name, part in (("q_norm", q), ("k_norm", k)))
    drop = getattr(self, "attn_drop", None)
    dropout_p = drop.p if isinstance(drop, nn.Dropout) and self.training else 0.0
    y = ops.attention(q, k, v, attn_mask, dropout_p, is_causal, getattr(self, "scale", None))
    y = getattr(self, "norm", _as_it_is_alone)(y.transpose(1, 2).reshape(b, t, -1))
    return getattr(self, "proj_drop", _as_it_is_alone)(self.proj(y))


def _as_it_is_alone(x: Tensor) -> Tensor:
    return x


def _fused_example(module: nn.Module) -> tuple[Any, ...]:
    assert isinstance(module.qkv, nn.Linear)
    return (torch.randn(2, 7, module.qkv.in_features),)


def _relative_example(module: nn.Module) -> tuple[Any, ...]:
    assert isinstance(module.qkv, nn.Linear)
    index = getattr(module, "relative_position_index", None)
    return (torch.randn(2, 7 if index is None else index.shape[0], module.qkv.in_features),)


_LOSS_ARGUMENTS = ["image_features", "text_features", "logit_scale", "logit_bias", "output_dict"]


def _is_loss(module: nn.Module) -> str | None:
    """open_clip's softmax loss, which may have a bias."""
    return None if _needs_bias(module) else _one_process(module)


def _is_sigmoid_loss(module: nn.Module) -> str | None:
    """open_clip's sigmoid loss, which must have one."""
    return _one_process(module) if _needs_bias(module) else None


def _needs_bias(module: nn.Module) -> bool:
    bias = inspect.signature(type(module).forward).parameters.get("logit_bias")
    return bias is not None and bias.default is inspect.Parameter.empty


def _one_process(module: nn.Module) -> str | None:
    if parameters_of(type(module).forward) != _LOSS_ARGUMENTS or any(True for _ in module.parameters()):
        return None
    return "" if getattr(module, "world_size", 1) == 1 else "it gathers from several processes"


def _info_nce(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None = None,
    output_dict: bool = False,
) -> Any:
    if logit_bias is not None or getattr(self, "world_size", 1) != 1:
        return original(self, image_features, text_features, logit_scale, logit_bias, output_dict)
    loss = ops.info_nce(image_features, text_features, logit_scale, normalize=False).to(image_features.dtype)
    return {"contrastive_loss": loss} if output_dict else loss


def _loss_example(module: nn.Module) -> tuple[Any, ...]:
    x, y = nn.functional.normalize(torch.randn(2, 6, 16), dim=-1)
    return x, y, torch.tensor(10.0)


def _sigmoid(
    self: Any,
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor | None,
    output_dict: bool = False,
) -> Any:
    if logit_bias is None or getattr(self, "world_size", 1) != 1 or not len(image_features):
        return original(self, image_features, text_features, logit_scale, logit_bias, output_dict)
    x, length = _of_one_length(image_features, 0)
    y, other = _of_one_length(text_features, 1)
    loss = ops.sigmoid_contrastive(x, y, logit_scale * length * other, logit_bias).to(image_features.dtype)
    return {"contrastive_loss": loss} if output_dict else loss


def _of_one_length(x: Tensor, place: int) -> tuple[Tensor, Tensor]:
    """Rows brought to one length, and that length; the op normalizes its rows, and this loss does not.

    Each row gets two coordinates, one of them zero in x and the other in y, so that no product changes, and
    neither does a gradient: moving a row moves it on the sphere. The sphere is a little larger than the
    longest row, so that the root has a slope everywhere.
    """
    acc = x.to(torch.promote_types(x.dtype, torch.float32))
    squares = acc.square().sum(1, keepdim=True)
    radius = squares.detach().amax().clamp_min(1e-12) * (1 + 2**-4)
    rest = (radius - squares).sqrt()
    columns = [rest, torch.zeros_like(rest)] if place == 0 else [torch.zeros_like(rest), rest]
    return torch.cat([x, *(c.to(x.dtype) for c in columns)], 1), radius.sqrt()


def _sigmoid_example(module: nn.Module) -> tuple[Any, ...]:
    return torch.randn(6, 16), torch.randn(6, 16), torch.tensor(3.0), torch.tensor(-2.0)


PATTERNS = (
    Pattern("patch embedding", _is_patches, _patches),
    Pattern("attention", _is_multihead, _multihead),
    Pattern("attention", _is_relative, _relative, _relative_example),
    Pattern("attention", _is_fused, _fused, _fused_example),
    Pattern("contrastive loss", _is_loss, _info_nce, _loss_example),
    Pattern("sigmoid loss", _is_sigmoid_loss, _sigmoid, _sigmoid_example),
    Pattern("linear", _is_linear, _linear),
)
ACTIVATION = Pattern("activation", lambda module: None, _as_it_is)
LINEAR = PATTERNS[-1]

for _pattern in (*PATTERNS, ACTIVATION):
    # A pickled or copied method is found again by this name; a pickle has the class's own.
    _pattern.forward.__name__ = "forward"


def activation_of(module: nn.Module) -> Activation | None:
    """The activation that a module without parameters computes, known by its values."""
    if any(True for _ in module.children()) or any(True for _ in module.parameters()) or module._buffers:
        return None
    x = torch.linspace(-9, 9, 541, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = type(module).forward(module, x.clone())
    except Exception:  # whatever it is, it is no function of single numbers
        return None
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    one = torch.ones(1, 1, dtype=x.dtype)
    for name in get_args(Activation):
        if (ops.linear(x[:, None], one, activation=name)[:, 0] - y).abs().max() < 1e-9:
            return name
    return None


def pairs(parent: nn.Module) -> Iterator[tuple[nn.Linear, nn.Module, Activation]]:
    """A linear child and the activation child that its result seems to go to; only a trial can tell."""
    children = list(parent.children())
    acts = [(i, name) for i, m in enumerate(children) if (name := activation_of(m)) is not None]
    if isinstance(parent, nn.Sequential):
        for i, name in acts:
            if i and type(children[i - 1]) is nn.Linear:
                yield children[i - 1], children[i], name  # type: ignore[misc]
        return
    linears = [m for m in children if isinstance(m, nn.Linear)]
    if len(acts) == 1 and 1 <= len(linears) <= 2 and type(linears[0]) is nn.Linear:
        yield linears[0], children[acts[0][0]], acts[0][1]
