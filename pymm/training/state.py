"""Everything that a run is at one step, and how it becomes a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from pymm.training.checkpoint import Snapshot
from pymm.training.errors import CheckpointError
from pymm.training.optimizer import build_optimizer, load_optimizer_state, optimizer_state
from pymm.training.task_settings import TaskSettings
from pymm.training.weights import Average, Weights


@dataclass
class Position:
    """Where a run is.

    Attributes:
        step: optimizer steps done.
        epoch: the epoch that the next batch is of.
        batch: batches of this epoch that are used up.
        elapsed_s: wall-clock time since the run began, without the time between an interruption and its end.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    elapsed_s: float = 0.0


class State:
    """Weights, moments, average and position. There are no random states: see `accumulate.seed_step`.

    Args:
        model: float32.
        settings: of the run.
        rates: see `pymm.training.optimizer.parameter_groups`.
    """

    def __init__(
        self, model: nn.Module, settings: TaskSettings, rates: Mapping[str, float] | None = None
    ) -> None:
        self.weights = Weights(model, low_precision=settings.precision == "bf16")
        self.optimizer = build_optimizer(self.weights, settings.optimizer, rates)
        decay = settings.optimizer.ema
        self.average = Average(self.weights, decay) if decay is not None else None
        self.position = Position()

    def snapshot(self) -> Snapshot:
        """The contents of a checkpoint; its tensors are the live ones."""
        tensors = {
            "model": self.weights.state_dict(),
            "optimizer": optimizer_state(self.optimizer, self.weights.trainable),
        }
        state = {"position": asdict(self.position), "threads": torch.get_num_threads()}
        if self.average is not None:
            tensors["average"] = self.average.state
            state["average_updates"] = self.average.updates
        return Snapshot(tensors, state)

    def restore(self, snapshot: Snapshot) -> None:
        """Take back a snapshot.

        Raises:
            CheckpointError: when it is not one of this model and these settings.
        """
        tensors, state = snapshot.tensors, snapshot.state
        try:
            self.weights.load_state_dict(tensors["model"])
            load_optimizer_state(self.optimizer, self.weights.trainable, tensors["optimizer"])
            if self.average is not None:
                self.average.load_state_dict(tensors["average"], state["average_updates"])
            self.position = Position(**state["position"])
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"checkpoint: it lacks a part or has one too many: {error}") from error
