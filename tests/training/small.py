"""A small model with dropout and a loader of random pairs: everything that the loop needs, in
milliseconds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pymm.objectives import ContrastiveObjective
from pymm.training import distributed
from pymm.training.clip import bound_logit_scale
from pymm.training.loop import RunResult, Trainer
from pymm.training.settings import (
    ClipSettings,
    DataSettings,
    OptimizerSettings,
    RunSettings,
    ScheduleSettings,
)


@dataclass
class Pairs:
    pixels: Tensor
    tokens: Tensor
    ids: Tensor
    keys: list[str]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Pairs:
        return replace(
            self, pixels=self.pixels.to(device), tokens=self.tokens.to(device), ids=self.ids.to(device)
        )


class SmallClip(nn.Module):
    """Two towers of one layer, with dropout, a layer norm, an embedding and a temperature."""

    def __init__(self, dropout: float = 0.1, batch_norm: bool = False, bias: bool = False) -> None:
        super().__init__()
        self.visual = nn.Sequential(
            nn.Flatten(),
            nn.Linear(3 * 8 * 8, 32),
            nn.BatchNorm1d(32) if batch_norm else nn.LayerNorm(32),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(32, 16, bias=False),
        )
        self.embed = nn.Embedding(50, 32)
        self.positional_embedding = nn.Parameter(torch.randn(6, 32) * 0.02)
        self.text = nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, 16))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if bias else None

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        words = self.embed(tokens) + self.positional_embedding
        outputs = (self.visual(pixels), self.text(words.mean(1)), self.logit_scale.exp())
        return outputs if self.logit_bias is None else (*outputs, self.logit_bias)


class PairLoader:
    """Batches that are a function of epoch and number; `rank` gets its share of each."""

    def __init__(
        self, batch_size: int = 8, batches: int = 5, concepts: int = 6, rank: int = 0, size: int = 1
    ):
        self.batch_size, self.batches, self.concepts = batch_size, batches, concepts
        self.rank, self.size = rank, size
        self.drawn = 0

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Pairs]:
        for number in range(skip, self.batches):
            self.drawn += 1
            yield self.batch(epoch, number)

    def batch(self, epoch: int, number: int) -> Pairs:
        g = torch.Generator().manual_seed(1000 * epoch + number)
        n = self.batch_size
        ids = torch.randint(self.concepts, (n,), generator=g)
        pixels = torch.randn(n, 3, 8, 8, generator=g) + ids[:, None, None, None] / 3
        tokens = (ids[:, None] * 7 + torch.randint(5, (n, 6), generator=g)) % 50
        share = distributed.World(self.rank, self.size).rows(n)
        return Pairs(pixels[share], tokens[share], ids[share], [str(i) for i in ids[share].tolist()])


def settings(directory: Path, **sections: Any) -> ClipSettings:
    """Settings of a run of 12 steps; `run`, `data` and so on update a section."""
    base = ClipSettings(
        data=DataSettings(batch_size=8),
        optimizer=OptimizerSettings(learning_rate=3e-3, ema=0.9),
        schedule=ScheduleSettings(steps=12),
        run=RunSettings(out=str(directory), checkpoint_every=5, log_every=1, threads=1),
    )
    changes = {
        name: replace(getattr(base, name), **value) if isinstance(value, dict) else value
        for name, value in sections.items()
    }
    return replace(base, **changes)


def model(**options: Any) -> SmallClip:
    torch.manual_seed(0)
    return SmallClip(**options)


def fit(given: ClipSettings, loader: Any = None, small: nn.Module | None = None, **options: Any) -> RunResult:
    objective = options.pop("objective", ContrastiveObjective())
    options.setdefault("after_step", bound_logit_scale(given.optimizer.max_logit_scale))
    trainer = Trainer(small if small is not None else model(), objective, given, **options)
    return trainer.fit(loader if loader is not None else PairLoader())
