"""Data-parallel training over `torch.distributed`, with the contrastive batch of all processes.

A loss over the features of all processes is not a mean of losses per process, so gradients of the gathered
rows have to travel back to the process that owns them. `gather` does that; with it, the mean of the
parameters' gradients over the processes, which is what DistributedDataParallel takes, is the gradient of
one process on the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pymm import ops

BUCKET_BYTES = 32 << 20


@dataclass(frozen=True)
class World:
    """The processes of a run: this one's rank, and how many there are."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def rows(self, n: int) -> slice:
        """This process's share of a batch of `n`.

        Raises:
            ValueError: when the processes cannot share it evenly.
        """
        if n % self.size:
            raise ValueError(
                f"distributed: batch_size must be a multiple of the {self.size} processes, got {n}"
            )
        share = n // self.size
        return slice(self.rank * share, (self.rank + 1) * share)


def current_world() -> World:
    """The process group that is there, or a world of one."""
    if dist.is_available() and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size())
    return World()


def local_device(device: str) -> torch.device:
    """The device of this process: "cuda" is the GPU of torchrun's LOCAL_RANK."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return torch.device(device)


@contextmanager
def process_group(device: str = "cpu", timeout_s: float = 1800.0) -> Iterator[World]:
    """Join the group that torchrun describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), then leave it.

    A group that exists already is used and left alone. Without torchrun's variables the world is this
    process.

    Args:
        device: "cpu" uses gloo, "cuda" NCCL.
        timeout_s: how long a collective waits for the others.
    """
    if dist.is_initialized() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield current_world()
        return
    backend = "nccl" if device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


def _all_gather(x: Tensor) -> Tensor:
    x = x.contiguous()
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return torch.cat(parts)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = x.shape[0]
        return _all_gather(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (dout,) = grads
        total = dout.to(torch.promote_types(dout.dtype, torch.float32), copy=True).contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * ctx.rows
        return total[start : start + ctx.rows].to(dout.dtype)


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks, with a gradient.

    Args:
        x: `(B, ...)`, of the same shape in every process.

    Returns:
        `(world size · B, ...)`. The gradient of `x` is the sum of what the losses of all processes say
        about it; the mean of the parameters' gradients over the processes is then that of the mean of the
        losses.
    """
    if current_world().size == 1:
        return x
    if x.is_floating_point():
        return _Gather.apply(x)
    return _all_gather(x)


def info_nce(
    x: Tensor, y: Tensor, logit_scale: Tensor | float, *, ids: Tensor | None = None, **options: Any
) -> Tensor:
    """`pymm.ops.info_nce` over the pairs of all processes.

    Every process gathers all features and computes the whole loss in tiles: with W processes of B pairs
    this is (W·B)² products in each, against (W·B)²/W where each computes its own rows only, but it holds
    for `ids` across processes and takes one gather and one reduction of the features. The loss is the same
    in all processes.

    Args:
        x, y: `(B, E)`, this process's pairs; B is the same in all processes.
        logit_scale, options: as for `pymm.ops.info_nce`, with `reduction="mean"`.
        ids: `(B,)`, this process's; equal ids are positives across processes too.

    Returns:
        The loss of the batch of all processes. Use it with gradients that are averaged over the processes, as
        DistributedDataParallel does.

    Raises:
        ValueError: as `pymm.ops.info_nce`.
    """
    return ops.info_nce(
        gather(x), gather(y), logit_scale, ids=None if ids is None else gather(ids), **options
    )


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in few large messages.

    A parameter that has a gradient in some processes only counts as zero in the others; one that has none in
    any is left without.
    """
    world = current_world()
    if world.size == 1:
        return
    parameters = list(parameters)
    used = torch.tensor(
        [p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device
    )
    dist.all_reduce(used, op=dist.ReduceOp.MAX)
    for bucket in _buckets(p for p, there in zip(parameters, used.tolist(), strict=True) if there):
        for p in bucket:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        flat = torch.cat([p.grad.flatten() for p in bucket if p.grad is not None])
        dist.all_reduce(flat)
        flat /= world.size
        for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
            p.grad = part.view_as(p).clone()


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    used = 0
    for p in parameters:
        size = p.numel() * p.element_size()
        if bucket and (used + size > BUCKET_BYTES or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, used = [], 0
        bucket.append(p)
        used += size
    if bucket:
        yield bucket


def agree(values: Sequence[float], device: torch.device) -> list[float]:
    """The largest of each value over the processes."""
    if current_world().size == 1:
        return list(values)
    t = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(t, op=dist.ReduceOp.MAX)
    return [float(v) for v in t]


def share(value: Any) -> Any:
    """The main process's value, in every process."""
    if current_world().size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def synchronize(tensors: Iterable[Tensor]) -> None:
    """Give every process the main process's tensors, in place."""
    if current_world().size == 1:
        return
    for t in tensors:
        dist.broadcast(t, src=0)


def barrier() -> None:
    if current_world().size > 1:
        dist.barrier()
