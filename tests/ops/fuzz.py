"""Random calls of every op: shapes around the tile sizes, options, strides, offsets, types."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pymm.ops._record import Sample

# Below, at and above the widths of vectors and tiles, and what falls between.
SIZES = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 47, 48, 49, 63, 64, 65, 80, 96, 97)


class Draw:
    """Everything random of one call, from one seed."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def size(self, most: int = 97) -> int:
        if self.chance(0.03):
            return 0
        return self.rng.choice([n for n in SIZES if n <= most])

    def some(self, most: int = 97) -> int:
        return max(1, self.size(most))

    def width(self) -> int:
        """Of rows that are normalized: in one dimension every cosine is ±1 and every gradient cancels."""
        return self.some() + 2

    def pick(self, *of: Any) -> Any:
        return self.rng.choice(of)

    def floats(self, *shape: int, std: float = 1.0) -> Tensor:
        values = torch.randn(shape, generator=self.generator, dtype=torch.float64) * std
        return self.laid_out(values.to(self.dtype))

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=self.generator)

    def bools(self, p: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def laid_out(self, t: Tensor) -> Tensor:
        """The same values in another layout: dense, turned, with gaps, from an odd address."""
        how = self.rng.randrange(5)
        if how == 1 and t.ndim > 1:
            return t.transpose(-1, -2).contiguous().transpose(-1, -2)
        if how == 2 and t.ndim > 1:
            return t.transpose(0, -2).contiguous().transpose(0, -2)
        if how == 3 and t.ndim:
            gaps = t.new_full((*t.shape[:-1], t.shape[-1] + self.rng.randrange(1, 9)), float("nan"))
            gaps[..., : t.shape[-1]] = t
            return gaps[..., : t.shape[-1]]
        if how == 4:
            start = self.rng.randrange(1, 8)
            odd = t.new_full((start + t.numel(),), float("nan"))
            odd[start:] = t.flatten()
            return odd[start:].view(t.shape)
        return t


def attention(d: Draw) -> Sample:
    b, hkv, groups = d.some(3), d.some(3), d.pick(1, 1, 2, 3)
    h, t, s, width, value = hkv * groups, d.size(), d.size(), d.some(), d.some()
    args = (d.floats(b, h, t, width), d.floats(b, hkv, s, width), d.floats(b, hkv, s, value))
    kwargs: dict[str, Any] = {"enable_gqa": groups > 1, "is_causal": d.chance(0.3)}
    if d.chance(0.4):
        shape = (*(n if d.chance(0.6) else 1 for n in (b, h, t)), s)
        kwargs["attn_mask"] = d.bools(0.7, *shape) if d.chance(0.5) else d.floats(*shape)
    if d.chance(0.3):
        kwargs["key_padding_mask"] = d.bools(0.8, b, s)
    if d.chance(0.2):
        kwargs["dropout_p"] = d.pick(0.1, 0.5, 1.0)
    if d.chance(0.3):
        kwargs["scale"] = d.pick(0.05, 0.3, 1.0)
    if d.chance(0.4):
        kwargs["causal_alignment"] = "lower_right"
    if d.chance(0.3):
        kwargs["return_lse"] = True
    return Sample("fuzz", args, kwargs)


def attention_varlen(d: Draw) -> Sample:
    n, hkv, groups = d.some(5), d.some(3), d.pick(1, 1, 2)
    lengths = [[0 if d.chance(0.15) else d.some(49) for _ in range(n)] for _ in range(2)]
    ends = [torch.tensor([0, *row]).cumsum(0).to(d.pick(torch.int32, torch.int64)) for row in lengths]
    width, value = d.some(), d.some()
    args = (
        d.floats(sum(lengths[0]), hkv * groups, width),
        d.floats(sum(lengths[1]), hkv, width),
        d.floats(sum(lengths[1]), hkv, value),
        *ends,
    )
    kwargs = {
        "enable_gqa": groups > 1,
        "is_causal": d.chance(0.4),
        "causal_alignment": d.pick("upper_left", "lower_right"),
    }
    return Sample("fuzz", args, kwargs)


def cosine_similarity(d: Draw) -> Sample:
    lead = tuple(d.some(3) for _ in range(d.pick(0, 0, 1, 2)))
    n, m, width = d.size(), d.size(), d.width()
    shared = d.chance(0.3)
    y = d.floats(m, width) if shared else d.floats(*lead, m, width)
    kwargs = {"scale": d.pick(2.0, -0.5)} if d.chance(0.4) else {}
    return Sample("fuzz", (d.floats(*lead, n, width), y), kwargs)


def cosine_topk(d: Draw) -> Sample:
    m, width = d.some() + 8, d.width()
    return Sample("fuzz", (d.floats(d.size(), width), d.floats(m, width), d.rng.randrange(1, m + 1)))


def info_nce(d: Draw) -> Sample:
    n, width = d.some() + 1, d.width()  # a softmax over one candidate is nothing but rounding
    kwargs: dict[str, Any] = {
        "normalize": d.chance(0.8),
        "symmetric": d.chance(0.7),
        "reduction": d.pick("mean", "sum", "none"),
    }
    std = 1.0 if kwargs["normalize"] else width**-0.5
    if d.chance(0.4):
        kwargs["label_smoothing"] = d.pick(0.1, 0.5, 1.0)
    if d.chance(0.4):
        kwargs["ids"] = d.integers(0, max(1, n // 2), n)
    if d.chance(0.4):
        kwargs["negatives_y"] = d.floats(d.size(), width, std=std)
    if kwargs["symmetric"] and d.chance(0.4):
        kwargs["negatives_x"] = d.floats(d.size(), width, std=std)
    if d.chance(0.3):
        kwargs |= {"teacher_x": d.floats(n, width, std=std), "teacher_y": d.floats(n, width, std=std)}
        kwargs["alpha"] = d.pick(0.0, 0.4, 1.0)
    args = (d.floats(n, width, std=std), d.floats(n, width, std=std), d.pick(1.0, 10.0))
    return Sample("fuzz", args, kwargs)


def linear(d: Draw) -> Sample:
    lead = tuple(d.some(5) for _ in range(d.pick(0, 1, 2)))
    rows, k, n = d.size(), d.some(), d.some()
    # Near zero, relu's gradient is a matter of rounding; in float64 it is not.
    smooth = (None, "gelu", "gelu_tanh", "quick_gelu", "silu")
    kwargs: dict[str, Any] = {"activation": d.pick(*smooth, *(("relu",) * (d.dtype == torch.float64)))}
    if d.chance(0.5):
        kwargs["residual"] = d.floats(*lead, rows, n)
    bias = d.floats(n) if d.chance(0.6) else None
    return Sample("fuzz", (d.floats(*lead, rows, k), d.floats(n, k, std=k**-0.5), bias), kwargs)


def mined_triplet_loss(d: Draw) -> Sample:
    n, width = d.some(), d.width()
    args = (d.floats(n, width), d.integers(0, d.pick(1, 2, 5, 40), n))
    kwargs: dict[str, Any] = {"mining": d.pick("hard", "semi-hard", "all"), "margin": d.pick(0.05, 0.3, 1.0)}
    if d.chance(0.5):
        kwargs["y"] = d.floats(n, width)
    return Sample("fuzz", args, kwargs)


def nms(d: Draw) -> Sample:
    n = d.size()
    corner, size = d.floats(n, 2, std=4.0), d.floats(n, 2, std=d.pick(1.0, 4.0)).abs()
    boxes = d.laid_out(torch.cat([corner, corner + size], 1))
    scores = d.floats(n)
    return Sample("fuzz", (boxes, scores.round() if d.chance(0.3) else scores, d.pick(0.0, 0.3, 0.7, 1.0)))


def patch_embed(d: Draw) -> Sample:
    b, cin, c = d.some(3), d.pick(1, 2, 3, 4), d.some()
    (ph, pw), (gh, gw) = (d.pick(1, 2, 4, 7, 8), d.pick(1, 3, 4, 8)), (d.some(5), d.some(5))
    n = gh * gw
    if d.chance(0.3):
        pixels = d.integers(0, 256, b, cin, gh * ph, gw * pw).to(torch.uint8)
    else:
        pixels = d.floats(b, cin, gh * ph, gw * pw)
    if d.chance(0.3):
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    kwargs: dict[str, Any] = {}
    prefix = d.pick(0, 0, 1, 3)
    if prefix:
        kwargs["prefix"] = d.floats(prefix, c)
    if d.chance(0.6):
        kwargs["position"] = d.floats(n + (prefix if d.chance(0.5) else 0), c)
    if d.chance(0.4):
        kwargs["keep"] = d.integers(0, n, b, d.some(17))
    if d.chance(0.3):
        kwargs |= {"mask": d.bools(0.4, b, n), "mask_token": d.floats(c)}
    if d.chance(0.4):
        kwargs |= {"mean": [0.4] * cin, "std": [0.3] * cin}
    bias = d.floats(c) if d.chance(0.6) else None
    return Sample("fuzz", (pixels, d.floats(c, cin, ph, pw, std=(cin * ph * pw) ** -0.5), bias), kwargs)


def _regions(d: Draw) -> tuple[Tensor, Tensor, tuple[int, int], float]:
    """Features, boxes in and around them, bins and scale."""
    n, k, scale = d.some(3), d.size(31), d.pick(1.0, 0.5, 0.25)
    height, width = d.some(), d.some()
    corners = torch.rand(k, 4, generator=d.generator, dtype=torch.float64) * 1.4 - 0.2
    corners = corners * torch.tensor([width, height, width, height]) / scale
    low, high = corners[:, :2].minimum(corners[:, 2:]), corners[:, :2].maximum(corners[:, 2:])
    rows = torch.cat([d.integers(0, n, k, 1), low, high], 1)
    features = d.floats(n, d.size(9), height, width)
    if d.chance(0.3):
        features = features.contiguous(memory_format=torch.channels_last)
    bins = (d.pick(1, 2, 7, 8, 14, 17), d.pick(1, 2, 7, 9, 14, 33))
    return features, rows.to(d.dtype), bins, scale


def roi_align(d: Draw) -> Sample:
    return Sample("fuzz", (*_regions(d), d.pick(-1, -1, 1, 2, 3), d.chance(0.5)))


def roi_pool(d: Draw) -> Sample:
    return Sample("fuzz", _regions(d))


def sigmoid_contrastive(d: Draw) -> Sample:
    n, width = d.some(), d.width()
    scale, bias = torch.tensor(d.pick(1.0, 10.0)), torch.tensor(d.pick(0.0, -10.0))
    return Sample("fuzz", (d.floats(n, width), d.floats(n, width), scale.to(d.dtype), bias.to(d.dtype)))


def triplet_loss(d: Draw) -> Sample:
    shape = (*(d.some(5) for _ in range(d.pick(0, 1))), d.size(), d.width())
    kwargs = {"margin": d.pick(0.2, 1.0), "distance": d.pick("cosine", "euclidean")}
    return Sample("fuzz", (d.floats(*shape), d.floats(*shape), d.floats(*shape)), kwargs)


EVERY = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What is chosen among near ties, or which side of a hinge, is a matter of rounding below float64.
EXACT = (torch.float64,)
FUZZED: dict[str, tuple[Callable[[Draw], Sample], tuple[torch.dtype, ...]]] = {
    "attention": (attention, EVERY),
    "attention_varlen": (attention_varlen, EVERY),
    "cosine_similarity": (cosine_similarity, EVERY),
    "cosine_topk": (cosine_topk, EXACT),
    "info_nce": (info_nce, EVERY),
    "linear": (linear, EVERY),
    "mined_triplet_loss": (mined_triplet_loss, EXACT),
    "nms": (nms, EXACT),
    "patch_embed": (patch_embed, EVERY),
    "roi_align": (roi_align, EVERY),
    "roi_pool": (roi_pool, EVERY),
    "sigmoid_contrastive": (sigmoid_contrastive, EVERY),
    "triplet_loss": (triplet_loss, EXACT),
}
