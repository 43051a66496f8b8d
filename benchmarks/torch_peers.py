"""The ops in other words of torch: SDPA's backends, what users write out, the losses that torch has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.benchmarks.peer import Function, Make, Unsuitable


def sdpa(backend: str) -> Make:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        eager = ops.REGISTRY["attention"].eager
        assert eager is not None
        chosen = SDPBackend.__members__[backend]

        def sdpa(*args: Any, **kwargs: Any) -> Any:
            with sdpa_kernel(chosen):
                return eager(*args, **kwargs)

        return sdpa

    return make


def sdpa_gpu(backend: str) -> Make:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        if not args[0].is_cuda:
            raise Unsuitable("on a GPU only")
        return sdpa(backend)(args, kwargs)

    return make


def explicit_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    def explicit(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        *,
        is_causal: bool = False,
        key_padding_mask: Tensor | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        heads, rows, groups = q.shape[1], q.shape[2], k.shape[1]
        if enable_gqa:  # the rows of a group's heads are rows of one product
            q = q.unflatten(1, (groups, heads // groups)).flatten(2, 3)
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        if is_causal:
            later = torch.ones(rows, k.shape[2], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if key_padding_mask is not None:
            scores = scores.masked_fill(~key_padding_mask[:, None, None], -torch.inf)
        if attn_mask is not None:
            scores = scores + attn_mask
        out = scores.softmax(-1) @ v
        return out.unflatten(2, (heads // groups, rows)).flatten(1, 2) if enable_gqa else out

    if kwargs.get("enable_gqa") and (kwargs.get("is_causal") or len(args) > 3):
        raise Unsuitable("grouped queries are written out without masks")
    return explicit


def padded_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    """SDPA over sequences padded to the longest."""
    starts_q, starts_k = args[3], args[4]
    if not torch.equal(starts_q, starts_k) or kwargs:
        raise Unsuitable("written out for self-attention without options")
    lengths = starts_q.diff()
    longest = int(lengths.max())
    valid = torch.arange(longest, device=lengths.device) < lengths[:, None]

    def padded(q: Tensor, k: Tensor, v: Tensor, *_: Tensor) -> Tensor:
        def pad(x: Tensor) -> Tensor:
            whole = x.new_zeros(*valid.shape, *x.shape[1:])
            return whole.masked_scatter(valid[..., None, None], x).transpose(1, 2)

        out = F.scaled_dot_product_attention(pad(q), pad(k), pad(v), valid[:, None, None])
        return out.transpose(1, 2)[valid]

    return padded


def reshaped_patches(gather_first: bool) -> Make:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        if kwargs.keys() - {"prefix", "position", "keep"} or len(kwargs) < 2:
            raise Unsuitable("written out for prefix, position and keep")
        if gather_first and "keep" not in kwargs:
            raise Unsuitable("there is nothing to gather")
        return patches

    def patches(
        pixels: Tensor,
        weight: Tensor,
        bias: Tensor,
        *,
        prefix: Tensor,
        position: Tensor,
        keep: Tensor | None = None,
    ) -> Tensor:
        ph, pw = weight.shape[2:]
        x = pixels.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))  # (B, Cin, rows, ph, columns, pw)
        x = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        ahead = prefix.shape[0]
        first, rest = position[:ahead], position[ahead:]
        if gather_first:
            assert keep is not None
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
            tokens = F.linear(x, weight.flatten(1), bias) + rest[keep]
        else:
            tokens = F.linear(x, weight.flatten(1), bias) + rest
            if keep is not None:
                tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[2]))
        return torch.cat([(prefix + first).expand(tokens.shape[0], -1, -1), tokens], 1)

    return make


def linear_cross_entropy(chunked: bool) -> Make:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        if not hasattr(F, "linear_cross_entropy"):
            raise Unsuitable("this torch has no linear_cross_entropy")
        options = {"options": torch.nn.LinearCrossEntropyOptions()} if chunked else {}
        cross_entropy: Function = getattr(F, "linear_cross_entropy")  # noqa: B009, newer than the oldest torch

        def loss(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
            x, y = F.normalize(x, dim=-1), F.normalize(y, dim=-1)
            targets = torch.arange(x.shape[0], device=x.device)
            scale = logit_scale.to(x.dtype)
            there = cross_entropy(scale * x, y, targets, **options)
            return (there + cross_entropy(scale * y, x, targets, **options)) / 2

        return loss

    return make


def margin_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    if kwargs.get("distance", "cosine") == "euclidean":
        return lambda a, p, n, **_: F.triplet_margin_loss(a, p, n, margin=0.2)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a, b)

    return lambda a, p, n, **_: F.triplet_margin_with_distance_loss(
        a, p, n, distance_function=distance, margin=0.2
    )
