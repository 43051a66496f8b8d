"""Fused ops: a kernel where the device has one, the plain-torch reference everywhere else."""

from pymm.ops._dispatch import BACKENDS, Explanation, backend, explain
from pymm.ops._record import REGISTRY
from pymm.ops.cosine_similarity import cosine_similarity
from pymm.ops.linear import linear
from pymm.ops.patch_embed import patch_embed

__all__ = [
    "BACKENDS",
    "REGISTRY",
    "Explanation",
    "backend",
    "cosine_similarity",
    "explain",
    "linear",
    "patch_embed",
]
