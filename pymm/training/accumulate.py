"""One optimizer step's gradient, in as many micro-batches as fit into memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from pymm.training.distributed import current_world, gather

# (model, micro-batch) -> what the objective takes: features, one row per sample, and scalars.
Forward = Callable[[nn.Module, Any], Sequence[Tensor]]
Objective = Callable[[Sequence[Tensor], Tensor | None], Tensor]


def seed_step(seed: int, step: int, micro: int, rank: int) -> None:
    """Let torch's random numbers depend on the run's seed and the place in the run, and on nothing before.

    So a continued run draws what the uninterrupted one drew, and a micro-batch that runs twice drops the
    same units.
    """
    drawn = np.random.SeedSequence([seed, step, micro, rank]).generate_state(1, np.uint64)
    torch.manual_seed(int(drawn[0]) >> 1)


def mean_loss(outputs: Sequence[Tensor], ids: Tensor | None = None) -> Tensor:
    """The objective of a `forward` that gives losses: the mean of its first output, `(B,)` or a scalar."""
    return outputs[0].mean()


@dataclass
class Accumulator:
    """Gradients of an objective over a batch.

    `"plain"` averages the losses of the micro-batches, which is right where a loss is the mean over its
    samples; of a contrastive objective, each micro-batch has its own pairs as the only candidates.
    `"cached"` is gradient caching (Gao et al. 2021, arXiv:2101.06983): all features are computed without a
    graph, the loss of the whole batch gives the gradient of each feature, and each micro-batch runs again
    with a graph that this gradient flows into. The result is that of the whole batch at once, dropout
    included; batch norms see micro-batches.

    Args:
        model: in training mode.
        objective: `(outputs, ids)` -> the mean loss of a batch.
        forward: `(model, micro-batch)` -> outputs. A tensor of at least one dimension is a feature and
            holds one row per sample, a tensor of none is shared by all samples.
        mode: `"cached"` or `"plain"`.
        seed: of the run.
        autocast: entered around forward passes and the loss.
        collect: called after each backward pass; takes the gradients out of low-precision parameters.
    """

    model: nn.Module
    objective: Objective
    forward: Forward
    mode: Literal["cached", "plain"] = "cached"
    seed: int = 0
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    collect: Callable[[], None] = lambda: None

    def __call__(self, micro_batches: Sequence[Any], step: int) -> Tensor:
        """Add the gradient of one step to the parameters' `.grad`.

        Across processes it is the gradient whose mean over the processes is that of the whole batch.

        Args:
            micro_batches: each with `ids (B,)`; at least one.
            step: the number of the step, which seeds it.

        Returns:
            The loss of the whole batch, over all processes; a detached scalar.
        """
        if len(micro_batches) == 1 or self.mode == "plain":
            return self._plain(micro_batches, step)
        return self._cached(micro_batches, step)

    def _run(self, batch: Any, step: int, micro: int) -> tuple[Tensor, ...]:
        seed_step(self.seed, step, micro, current_world().rank)
        return tuple(self.forward(self.model, batch))

    def _loss(self, outputs: Sequence[Tensor], ids: Tensor) -> Tensor:
        return self.objective([gather(t) if t.ndim else t for t in outputs], gather(ids))

    def _plain(self, micro_batches: Sequence[Any], step: int) -> Tensor:
        samples = sum(len(b.ids) for b in micro_batches)
        losses = []
        for micro, batch in enumerate(micro_batches):
            with self.autocast():
                loss = self._loss(self._run(batch, step, micro), batch.ids) * (len(batch.ids) / samples)
            loss.backward()
            self.collect()
            losses.append(loss.detach())
        return torch.stack(losses).sum()

    def _cached(self, micro_batches: Sequence[Any], step: int) -> Tensor:
        buffers = [(b, b.clone()) for b in self.model.buffers()]
        cached = []
        with torch.no_grad(), self.autocast():
            cached = [self._run(batch, step, micro) for micro, batch in enumerate(micro_batches)]
        with torch.no_grad():
            for b, before in buffers:  # running statistics must see every micro-batch once, not twice
                b.copy_(before)
        sizes = [len(batch.ids) for batch in micro_batches]
        leaves = [
            (torch.cat(parts) if parts[0].ndim else parts[0]).detach().requires_grad_()
            for parts in zip(*cached, strict=True)
        ]
        with self.autocast():
            loss = self._loss(leaves, torch.cat([batch.ids for batch in micro_batches]))
        loss.backward()
        gradients = [
            leaf.grad.split(sizes) if leaf.ndim and leaf.grad is not None else leaf.grad for leaf in leaves
        ]
        for micro, batch in enumerate(micro_batches):
            with self.autocast():
                outputs = self._run(batch, step, micro)
            torch.autograd.backward(*_pairs(outputs, gradients, micro))
            self.collect()
        return loss.detach()


def _pairs(
    outputs: Sequence[Tensor], gradients: Sequence[Any], micro: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of a micro-batch beside their gradients; shared scalars count once, with the first one."""
    tensors, found = [], []
    for t, g in zip(outputs, gradients, strict=True):
        if g is None or not t.requires_grad or (t.ndim == 0 and micro > 0):
            continue
        tensors.append(t)
        found.append(g[micro] if t.ndim else g)
    return tensors, found


def split(batch: Any, size: int | None) -> list[Any]:
    """Cut a batch into micro-batches of `size` samples; the last one may be smaller.

    Args:
        batch: a dataclass whose fields all hold one row per sample, `ids` among them.
        size: None leaves it whole.
    """
    n = len(batch.ids)
    if size is None or size >= n:
        return [batch]
    rows = [slice(start, start + size) for start in range(0, n, size)]
    names = [f.name for f in dataclasses.fields(batch)]
    return [dataclasses.replace(batch, **{name: getattr(batch, name)[r] for name in names}) for r in rows]
