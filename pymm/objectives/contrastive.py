"""The contrastive objectives over a CLIP model's outputs: softmax, sigmoid and triplets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops

Kind = Literal["infonce", "sigmoid", "triplet"]
Mining = Literal["hard", "semi-hard", "all"]


@dataclass(frozen=True)
class ContrastiveObjective:
    r"""Pairs find each other among a batch.

    `"infonce"` is the symmetric softmax loss (Radford et al. 2021, arXiv:2103.00020, fig. 3), `"sigmoid"`
    the loss of every pair on its own (Zhai et al. 2023, arXiv:2303.15343, eq. 2), `"triplet"` the hinge on
    mined triplets in both directions (Faghri et al. 2017, arXiv:1707.05612, eq. 6), which has no temperature.

    Args:
        kind: `"infonce"`, `"sigmoid"` or `"triplet"`.
        label_smoothing: in [0, 1], for `"infonce"`: the share of the target that is spread over all
            candidates.
        use_ids: take pairs with equal ids as each other's positives. Without it two pictures of one concept
            in a batch are told to be different.
        margin: of `"triplet"`, between the cosines of a pair and of the mined negative, > 0.
        mining: of `"triplet"`: `"hard"`, `"semi-hard"` or `"all"`, as `pymm.ops.mined_triplet_loss` has them.

    Raises:
        ValueError: for an unknown kind or mining, a margin that is not positive, or label smoothing that is
            out of range or asked of a kind without a softmax.
    """

    kind: Kind = "infonce"
    label_smoothing: float = 0.0
    use_ids: bool = True
    margin: float = 0.2
    mining: Mining = "semi-hard"

    def __post_init__(self) -> None:
        for name, value, known in (
            ("kind", self.kind, get_args(Kind)),
            ("mining", self.mining, get_args(Mining)),
        ):
            if value not in known:
                raise ValueError(
                    f"ContrastiveObjective: {name} must be one of {', '.join(known)}, got {value!r}"
                )
        if not self.margin > 0:
            raise ValueError(f"ContrastiveObjective: margin must be positive, got {self.margin}")
        if not 0 <= self.label_smoothing <= 1:
            raise ValueError(
                f"ContrastiveObjective: label_smoothing must be in [0, 1], got {self.label_smoothing}"
            )
        if self.kind != "infonce" and self.label_smoothing:
            raise ValueError(
                f"ContrastiveObjective: label_smoothing must be 0 for {self.kind!r}, which has no softmax to "
                f"smooth, got {self.label_smoothing}"
            )

    def __call__(self, outputs: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
        """The loss of a batch.

        Args:
            outputs: what a CLIP model returns: image features `(B, E)`, text features `(B, E)`, the logit
                scale (not its logarithm) and, for `"sigmoid"`, the logit bias. Features need not be
                normalized.
            ids: `(B,)` int64; used when `use_ids`.

        Returns:
            A scalar of float32 at least.

        Raises:
            ValueError: when an output is missing or the shapes do not fit.

        Numerics: those of `pymm.ops.info_nce`, `pymm.ops.sigmoid_contrastive` and
        `pymm.ops.mined_triplet_loss`.
        """
        if len(outputs) < 3:
            raise ValueError(
                "ContrastiveObjective: outputs must be (image features, text features, logit scale[, logit "
                f"bias]), got {len(outputs)} of them"
            )
        image, text, scale = outputs[:3]
        if not self.use_ids:
            ids = None
        if self.kind == "infonce":
            return ops.info_nce(image, text, scale, label_smoothing=self.label_smoothing, ids=ids)
        if self.kind == "triplet":
            labels = torch.arange(len(image), device=image.device) if ids is None else ids
            return ops.mined_triplet_loss(image, labels, text, self.margin, self.mining)
        if len(outputs) < 4:
            raise ValueError(
                "ContrastiveObjective: outputs must hold a logit bias for 'sigmoid', got three of them"
            )
        bias = outputs[3]
        loss = ops.sigmoid_contrastive(image, text, scale, bias)
        if ids is None:
            return loss
        return loss - _shared_concepts(image, text, scale, bias, ids)


def _shared_concepts(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, ids: Tensor) -> Tensor:
    r"""What the sigmoid loss says too much where two pairs share an id.

    Such a pair i ≠ j is counted as softplus(s_ij) and should be softplus(−s_ij), which is smaller by s_ij.
    The sum of s_ij over a group of equal ids is (Σ x̂_i)·(Σ ŷ_j) − Σ x̂_i·ŷ_i, so no B×B matrix is needed.
    """
    if ids.shape != (image.shape[0],):
        raise ValueError(f"ContrastiveObjective: ids must be ({image.shape[0]},), got {tuple(ids.shape)}")
    acc = torch.promote_types(image.dtype, torch.float32)
    x, y = F.normalize(image.to(acc), dim=-1), F.normalize(text.to(acc), dim=-1)
    _, group, size = torch.unique(ids, return_inverse=True, return_counts=True)
    groups = x.new_zeros(len(size), x.shape[1])
    dots = (groups.index_add(0, group, x) * groups.index_add(0, group, y)).sum() - (x * y).sum()
    pairs = (size * (size - 1)).sum()
    return (scale * dots + bias * pairs) / len(ids)
