"""Fused ops: a kernel where the device has one, the plain-torch reference everywhere else."""

from pymm.ops._dispatch import BACKENDS, Explanation, backend, explain
from pymm.ops._record import REGISTRY
from pymm.ops.attention import attention
from pymm.ops.attention_varlen import attention_varlen
from pymm.ops.cosine_similarity import cosine_similarity
from pymm.ops.cosine_topk import cosine_topk
from pymm.ops.info_nce import info_nce
from pymm.ops.linear import linear
from pymm.ops.mined_triplet_loss import mined_triplet_loss
from pymm.ops.nms import batched_nms, nms
from pymm.ops.patch_embed import patch_embed
from pymm.ops.roi_align import roi_align
from pymm.ops.roi_pool import roi_pool
from pymm.ops.sigmoid_contrastive import sigmoid_contrastive
from pymm.ops.triplet_loss import triplet_loss

__all__ = [
    "BACKENDS",
    "REGISTRY",
    "Explanation",
    "attention",
    "attention_varlen",
    "backend",
    "batched_nms",
    "cosine_similarity",
    "cosine_topk",
    "explain",
    "info_nce",
    "linear",
    "mined_triplet_loss",
    "nms",
    "patch_embed",
    "roi_align",
    "roi_pool",
    "sigmoid_contrastive",
    "triplet_loss",
]
