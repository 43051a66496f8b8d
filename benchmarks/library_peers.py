"""The ops in other libraries, which are imported when a workload asks for them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pymm.benchmarks.peer import Function, Unsuitable

# The classes that hold a number for every triplet, or pair of pairs, are kept from filling the memory.
MOST_NUMBERS = 1 << 28


def torchmetrics_cosine(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    module = importlib.import_module("torchmetrics.functional")
    return lambda x, y: module.pairwise_cosine_similarity(x, y)


def metric_learning_cosine(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    distance = importlib.import_module("pytorch_metric_learning.distances").CosineSimilarity()
    return lambda x, y: distance(x, y)


def faiss_index(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
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


def clip_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    loss = importlib.import_module("open_clip").ClipLoss()
    return lambda x, y, scale: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale)


def siglip_loss(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    loss = importlib.import_module("open_clip").SigLipLoss()
    return lambda x, y, scale, bias: loss(F.normalize(x, dim=-1), F.normalize(y, dim=-1), scale, bias)


def metric_learning_nce(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
    rows = args[0].shape[0]
    if rows**3 > MOST_NUMBERS:
        raise Unsuitable(
            f"would not fit: it compares {rows} positive with {rows * (rows - 1):,} negative pairs"
        )
    loss = importlib.import_module("pytorch_metric_learning.losses").NTXentLoss(
        temperature=1 / args[2].item()
    )
    # Were they one tensor, the library would take both sides for one batch and drop the diagonal.
    labels, others = torch.arange(rows), torch.arange(rows)

    def both(x: Tensor, y: Tensor, logit_scale: Tensor) -> Tensor:
        there = loss(x, labels, ref_emb=y, ref_labels=others)
        return (there + loss(y, labels, ref_emb=x, ref_labels=others)) / 2

    return both


def metric_learning_miner(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
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


def _torchvision_ops() -> Any:
    """torchvision's operators; beside a CPU build of torch, the wheel for CUDA has none."""
    try:
        module = importlib.import_module("torchvision.ops")
        has_operators = importlib.import_module("torchvision.extension")._has_ops()
    except RuntimeError as error:
        raise Unsuitable(f"torchvision does not load: {error}") from error
    if not has_operators:
        raise Unsuitable("torchvision's operators do not load beside this torch")
    return module


def torchvision_operator(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], Function]:
    """An operator that takes what ours takes."""

    def make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Function:
        function: Function = getattr(_torchvision_ops(), name)
        return function

    return make
