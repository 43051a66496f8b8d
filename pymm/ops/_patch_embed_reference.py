"""Patch embedding and its gradient in plain torch: the specification that every kernel is tested against.

Shapes: pixels `(B, Cin, gh·ph, gw·pw)`, weight `(C, Cin, ph, pw)`; the rest as in `pymm.ops.patch_embed`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def normalized(pixels: Tensor, weight: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    """The pixels that the weight multiplies, in its type."""
    if pixels.dtype != torch.uint8 and mean is None and std is None:
        return pixels
    x = pixels.to(torch.promote_types(weight.dtype, torch.float32))
    if pixels.dtype == torch.uint8:
        x = x / 255
    if mean is not None:
        x = x - mean[:, None, None]
    if std is not None:
        x = x / std[:, None, None]
    return x.to(weight.dtype)


def grid(pixels: Tensor, weight: Tensor) -> tuple[int, int]:
    return pixels.shape[2] // weight.shape[2], pixels.shape[3] // weight.shape[3]


def patches_of(pixels: Tensor, weight: Tensor) -> Tensor:
    """`(B, N, Cin ph pw)`, each patch laid out as a row of the weight."""
    b, cin = pixels.shape[:2]
    (gh, gw), (ph, pw) = grid(pixels, weight), weight.shape[2:]
    cut = pixels.reshape(b, cin, gh, ph, gw, pw).permute(0, 2, 4, 1, 3, 5)
    return cut.reshape(b, gh * gw, cin * ph * pw)


def along(keep: Tensor, width: int) -> Tensor:
    return keep[..., None].expand(*keep.shape, width)


def reference(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix: Tensor | None,
    position: Tensor | None,
    keep: Tensor | None,
    mask: Tensor | None,
    mask_token: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
) -> Tensor:
    patches = patches_of(normalized(pixels, weight, mean, std), weight)
    b, n = patches.shape[:2]
    if keep is not None:
        patches = patches.gather(1, along(keep, patches.shape[2]))
        mask = mask.gather(1, keep) if mask is not None else None
    tokens = F.linear(patches, weight.flatten(1), bias)
    if mask is not None:
        assert mask_token is not None
        tokens = torch.where(mask[..., None], mask_token, tokens)
    p = prefix.shape[0] if prefix is not None else 0
    if position is not None:
        own = position[position.shape[0] - n :]
        tokens = tokens + (own if keep is None else own[keep])
    if prefix is None:
        return tokens
    if position is not None and position.shape[0] > n:
        prefix = prefix + position[:p]
    return torch.cat([prefix.expand(b, *prefix.shape), tokens], 1)


def backward_reference(
    dout: Tensor,
    pixels: Tensor,
    weight: Tensor,
    keep: Tensor | None,
    mask: Tensor | None,
    mean: Tensor | None,
    std: Tensor | None,
    prefix_rows: int,
    position_rows: int,
    need_pixels: bool,
    need_weight: bool,
    need_bias: bool,
    need_prefix: bool,
    need_position: bool,
    need_mask_token: bool,
) -> tuple[Tensor, ...]:
    none = weight.new_empty((0,))
    dpixels = dweight = dbias = dprefix = dposition = dmask_token = none
    b, cin = pixels.shape[:2]
    (gh, gw), (c, _, ph, pw) = grid(pixels, weight), weight.shape
    n = gh * gw
    acc = torch.promote_types(weight.dtype, torch.float32)
    dtokens = dout[:, prefix_rows:]  # (B, N or K, C)
    if need_prefix:
        dprefix = dout[:, :prefix_rows].sum(0)
    if need_position:
        if keep is None:
            own = dtokens.sum(0)
        else:
            flat = dtokens.reshape(-1, c).to(acc)
            own = flat.new_zeros((n, c)).index_add(0, keep.flatten(), flat).to(weight.dtype)
        dposition = torch.cat([dout[:, :prefix_rows].sum(0), own]) if position_rows > n else own
    if mask is not None:
        hidden = (mask if keep is None else mask.gather(1, keep))[..., None]
        if need_mask_token:
            dmask_token = torch.where(hidden, dtokens, 0).sum((0, 1))
        dtokens = torch.where(hidden, 0, dtokens)
    if need_bias:
        dbias = dtokens.sum((0, 1))
    rows = dtokens.reshape(-1, c)
    if need_weight:
        patches = patches_of(normalized(pixels, weight, mean, std), weight)
        if keep is not None:
            patches = patches.gather(1, along(keep, patches.shape[2]))
        dweight = (rows.mT @ patches.reshape(rows.shape[0], cin * ph * pw)).reshape(weight.shape)
    if need_pixels:
        dpatches = (rows @ weight.flatten(1)).reshape(b, dtokens.shape[1], cin * ph * pw)
        if keep is not None:
            full = dpatches.new_zeros((b, n, cin * ph * pw), dtype=acc)
            dpatches = full.scatter_add(1, along(keep, cin * ph * pw), dpatches.to(acc))
        apart = dpatches.reshape(b, gh, gw, cin, ph, pw).permute(0, 3, 1, 4, 2, 5)
        dpixels = apart.reshape(pixels.shape)
        if std is not None:
            dpixels = dpixels / std[:, None, None]
        dpixels = dpixels.to(weight.dtype)
    return dpixels, dweight, dbias, dprefix, dposition, dmask_token
