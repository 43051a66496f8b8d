"""Who else computes the ops: libraries, imported only when asked for, and other ways to say it in torch.

A peer takes the op's own arguments and gives its result; whether it does is checked in every run. What is not
installed, or cannot do a workload, is named as absent with the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm import ops
from pymm.benchmarks.cases import Case

Function = Callable[..., Any]
# The classes that hold a number for every triplet or pair of pairs are kept from filling the memory.
MOST_NUMBERS = 1 << 28


class Unsuitable(Exception):
    """A peer has no such option, or would not fit; the message says which."""


@dataclass(frozen=True)
class Peer:
    """Another way to compute an op.

    Args:
        name: in the table.
        make: `(args, kwargs)` -> the function; it may prepare what a user prepares once, and may raise
            Unsuitable.
        module: what has to be installed.
        backward: whether it has gradients.
        compiled: measure torch.compile of it too.
    """

    name: str
    make: Callable[[tuple[Any, ...], dict[str, Any]], Function]
    module: str | None = None
    backward: bool = True
    compiled: bool = False


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


def _sdpa(backend: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Function]:
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


def _on_gpu(args: tuple[Any, ...]) -> bool:
    return any(isinstance(a, Tensor) and a.is_cuda for a in args)


def _sdpa_gpu(backend: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Function]:
    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        if not _on_gpu(args):
            raise Unsuitable("on a GPU only")
        return _sdpa(backend)(args, kwargs)

    return make


def _explicit_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
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


def _padded_attention(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
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


def _reshaped_patches(gather_first: bool) -> Callable[[tuple[Any, ...], dict[str, Any]], Function]:
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


def _torchmetrics_cosine(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    module = importlib.import_module("torchmetrics.functional")
    return lambda x, y: module.pairwise_cosine_similarity(x, y)


def _metric_learning_cosine(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    distance = importlib.import_module("pytorch_metric_learning.distances").CosineSimilarity()
    return lambda x, y: distance(x, y)


def _faiss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    """A flat index of the unit rows, made once; what is measured is the search."""
    x, y, _ = args
    if x.dtype != torch.float32:
        raise Unsuitable("the flat index is of float32")
    if x.is_cuda:
        raise Unsuitable("measured on a CPU only")
    faiss = importlib.import_module("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatIP(y.shape[1])
    index.add(F.normalize(y, dim=-1).numpy())

    def search(x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values, indices = index.search(F.normalize(x, dim=-1).numpy(), k)
        return torch.from_numpy(values), torch.from_numpy(indices)

    return search


def _cross_entropy(chunked: bool) -> Callable[[tuple[Any, ...], dict[str, Any]], Function]:
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


def _clip_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    loss = importlib.import_module("open_clip").ClipLoss()
    return lambda x, y, scale: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale)


def _siglip_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    loss = importlib.import_module("open_clip").SigLipLoss()
    return lambda x, y, scale, bias: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, bias)


def _metric_learning_nce(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    rows = args[0].shape[0]
    if rows**3 > MOST_NUMBERS:
        raise Unsuitable(
            f"would not fit: it compares {rows} positive with {rows * (rows - 1):,} negative pairs"
        )
    loss = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(
        temperature=1 / args[2].item()
    )
    labels = torch.arange(rows)

    def both(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        there = loss(x, labels, ref_emb=y, ref_labels=labels)
        return (there + loss(y, labels, ref_emb=x, ref_labels=labels)) / 2

    return both


def _margin_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    if kwargs.get("distance", "cosine") == "euclidean":
        return lambda a, p, n, **_: F.triplet_margin_loss(a, p, n, margin=0.2)

    def distance(a: Tensor, b: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(a, b)

    return lambda a, p, n, **_: F.triplet_margin_with_distance_loss(
        a, p, n, distance_function=distance, margin=0.2
    )


def _metric_learning_miner(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    x, labels, other = args
    mining = kwargs["mining"]
    if other is not None or mining == "semi-hard":
        raise Unsuitable("its miners select other triplets here")
    of_label = int(labels.bincount().max())
    if mining == "all" and len(x) * (of_label - 1) * len(x) > MOST_NUMBERS:
        raise Unsuitable("would not fit: it lists every triplet")
    parts = {
        name: importlib.import_module(f"pytorch_metric_learning.{name}")
        for name in ("distances", "losses", "miners", "reducers")
    }
    cosine = parts["distances"].CosineSimilarity()
    # The mean is over anchors when they are mined, and over triplets that cost something when all are taken.
    reducer = parts["reducers"].MeanReducer() if mining == "hard" else parts["reducers"].AvgNonZeroReducer()
    loss = parts["losses"].TripletMarginLoss(margin=0.2, distance=cosine, reducer=reducer)
    miner = parts["miners"].BatchHardMiner(distance=cosine) if mining == "hard" else None

    def mined(x: Tensor, labels: Tensor, y: None, mining: str) -> Tensor:
        return loss(x, labels, miner(x, labels) if miner is not None else None)

    return mined


# The names under which pip knows the modules.
PACKAGES = {
    "faiss": "faiss-cpu",
    "open_clip": "open_clip_torch",
    "pytorch_metric_learning": "pytorch-metric-learning",
    "torchmetrics": "torchmetrics",
}

PEERS: dict[str, Sequence[Peer]] = {
    "attention": (
        Peer("SDPA flash", _sdpa("FLASH_ATTENTION")),
        Peer("SDPA math", _sdpa("MATH")),
        Peer("SDPA efficient", _sdpa_gpu("EFFICIENT_ATTENTION")),
        Peer("SDPA cuDNN", _sdpa_gpu("CUDNN_ATTENTION")),
        Peer("explicit softmax", _explicit_attention, compiled=True),
    ),
    "attention_varlen": (Peer("padded SDPA", _padded_attention),),
    "patch_embed": (
        Peer("reshape + linear", _reshaped_patches(False), compiled=True),
        Peer("gather + linear", _reshaped_patches(True), compiled=True),
    ),
    "cosine_similarity": (
        Peer("torchmetrics", _torchmetrics_cosine, "torchmetrics"),
        Peer("pytorch-metric-learning", _metric_learning_cosine, "pytorch_metric_learning"),
    ),
    "cosine_topk": (Peer("faiss", _faiss, "faiss", backward=False),),
    "info_nce": (
        Peer("linear_cross_entropy", _cross_entropy(False)),
        Peer("linear_cross_entropy, chunked", _cross_entropy(True)),
        Peer("open_clip", _clip_loss, "open_clip", compiled=True),
        Peer("pytorch-metric-learning", _metric_learning_nce, "pytorch_metric_learning"),
    ),
    "sigmoid_contrastive": (Peer("open_clip", _siglip_loss, "open_clip", compiled=True),),
    "triplet_loss": (Peer("torch's own loss", _margin_loss),),
    "mined_triplet_loss": (
        Peer("pytorch-metric-learning", _metric_learning_miner, "pytorch_metric_learning"),
    ),
}
