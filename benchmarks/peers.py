"""Who else computes the ops.

A peer takes the op's own arguments and gives its result; whether it does is checked in every run. What is not
installed, or cannot do a workload, is named as absent with the reason.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from pymm.benchmarks import library_peers, torch_peers
from pymm.benchmarks.cases import Case
from pymm.benchmarks.peer import Function, Peer, Unsuitable

# The names under which pip knows the modules.
PACKAGES = {
    "faiss": "faiss-cpu",
    "open_clip": "open_clip_torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "torchmetrics": "torchmetrics",
    "torchvision": "torchvision",
}

PEERS: dict[str, Sequence[Peer]] = {
    "attention": (
        Peer("SDPA flash", torch_peers.sdpa("FLASH_ATTENTION")),
        Peer("SDPA math", torch_peers.sdpa("MATH")),
        Peer("SDPA efficient", torch_peers.sdpa_gpu("EFFICIENT_ATTENTION")),
        Peer("SDPA cuDNN", torch_peers.sdpa_gpu("CUDNN_ATTENTION")),
        Peer("explicit softmax", torch_peers.explicit_attention, compiled=True),
    ),
    "attention_varlen": (Peer("padded SDPA", torch_peers.padded_attention),),
    "nms": (Peer("torchvision", library_peers.torchvision_operator("nms"), "torchvision", backward=False),),
    "roi_align": (Peer("torchvision", library_peers.torchvision_operator("roi_align"), "torchvision"),),
    "roi_pool": (Peer("torchvision", library_peers.torchvision_operator("roi_pool"), "torchvision"),),
    "patch_embed": (
        Peer("reshape + linear", torch_peers.reshaped_patches(False), compiled=True),
        Peer("gather + linear", torch_peers.reshaped_patches(True), compiled=True),
    ),
    "cosine_similarity": (
        Peer("torchmetrics", library_peers.torchmetrics_cosine, "torchmetrics"),
        Peer("pytorch-metric-learning", library_peers.metric_learning_cosine, "pytorch_metric_learning"),
    ),
    "cosine_topk": (Peer("faiss", library_peers.faiss_index, "faiss", backward=False),),
    "info_nce": (
        Peer("linear_cross_entropy", torch_peers.linear_cross_entropy(False)),
        Peer("linear_cross_entropy, chunked", torch_peers.linear_cross_entropy(True)),
        Peer("open_clip", library_peers.clip_loss, "open_clip", compiled=True),
        Peer("pytorch-metric-learning", library_peers.metric_learning_nce, "pytorch_metric_learning"),
    ),
    "sigmoid_contrastive": (Peer("open_clip", library_peers.siglip_loss, "open_clip", compiled=True),),
    "triplet_loss": (Peer("torch's own loss", torch_peers.margin_loss),),
    "mined_triplet_loss": (
        Peer("pytorch-metric-learning", library_peers.metric_learning_miner, "pytorch_metric_learning"),
    ),
}


def peers(
    case: Case, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool
) -> tuple[dict[str, tuple[Function, bool]], dict[str, str]]:
    """The contestants beside pymm, and those absent.

    Returns:
        Name -> the function and whether it has gradients; name -> why it is absent.
    """
    found: dict[str, tuple[Function, bool]] = {}
    absent: dict[str, str] = {}
    if case.alone:
        return found, {"eager": "would not fit: it holds the whole matrix"}
    if case.eager is not None:
        found["eager"] = case.eager, True
        if compiled and case.kind != "call":
            found["compiled"] = torch.compile(case.eager), True
    for peer in PEERS.get(case.op, ()) if case.kind != "call" else ():
        if peer.module is not None and importlib.util.find_spec(peer.module) is None:
            absent[peer.name] = f"not installed: pip install {PACKAGES[peer.module]}"
            continue
        try:
            function = peer.make(args, kwargs)
        except Unsuitable as reason:
            absent[peer.name] = str(reason)
            continue
        except Exception as error:
            absent[peer.name] = reason_of(error)
            continue
        found[peer.name] = function, peer.backward
        if peer.compiled and compiled:
            found[f"{peer.name}, compiled"] = torch.compile(function), peer.backward
    return found, absent


def reason_of(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
