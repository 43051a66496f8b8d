"""The settings that every task has: typed, frozen, on the command line and in `settings.json`.

How a task is added: `pymm.training.tasks`. This file imports nothing heavy, so that `--help` is fast.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

import tyro

from pymm.training.errors import SettingsError

# A setting marked so may differ between a run and its continuation: it changes no weight.
FREE: dict[str, bool] = {"free": True}


def require(ok: bool, key: str, expected: str, got: object) -> None:
    """Raise the SettingsError that every wrong value ends in."""
    if not ok:
        raise SettingsError(f"settings: {key} must be {expected}, got {got!r}")


@dataclass(frozen=True)
class Section:
    """A section that a task fills, or leaves empty."""


@dataclass(frozen=True)
class BatchSettings(Section):
    """How many samples make a step; a task adds where they are from."""

    batch_size: int = 256
    """Samples per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Samples that pass through the model at once; fewer need less memory. By default the whole batch."""
    batches_per_epoch: int | None = None
    """Ends an epoch after so many batches; needed for streams in distributed runs."""
    workers: int = field(default=0, metadata=FREE)
    """Processes that decode pictures beside the training process."""

    @property
    def accumulation(self) -> Literal["cached", "plain"]:
        """How micro-batches become one step; see `pymm.training.accumulate`."""
        return "plain"

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "data.batch_size", "at least 1", self.batch_size)
        micro = self.micro_batch_size
        require(micro is None or micro >= 1, "data.micro_batch_size", "at least 1", micro)
        batches = self.batches_per_epoch
        require(batches is None or batches >= 1, "data.batches_per_epoch", "at least 1", batches)
        require(self.workers >= 0, "data.workers", "at least 0", self.workers)


@dataclass(frozen=True)
class AugmentSettings(Section):
    """Random changes of the training pictures; see `pymm.data.TrainTransform`."""

    crop_scale: tuple[float, float] = (0.9, 1.0)
    """Range of the crop's share of the area."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Range of the crop's width / height."""
    flip: float = 0.0
    """Probability of a left-right flip."""
    rotate: float = 0.0
    """Largest angle in degrees."""
    translate: float = 0.0
    """Largest shift as a share of the size."""
    zoom: tuple[float, float] = (1.0, 1.0)
    """Range of the scale."""
    jitter: float = 1.0
    """Probability of the four colour changes."""
    brightness: float = 0.0
    """Largest change of the factor 1."""
    contrast: float = 0.0
    """Likewise."""
    saturation: float = 0.0
    """Likewise."""
    hue: float = 0.0
    """Largest turn of the colour circle, in whole turns."""
    grayscale: float = 0.0
    """Probability of losing all colour."""
    background: tuple[int, int, int] = (255, 255, 255)
    """Colour under transparent pixels."""
    random_background: float = 0.0
    """Probability of another colour there, any one."""


@dataclass(frozen=True)
class AdamWSettings(Section):
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101)."""

    learning_rate: float = 1e-3
    """At the peak, after warm-up."""
    weight_decay: float = 0.05
    """Decoupled; biases, norms, scalars, class tokens and positions are left out."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Of the two moments."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_norm: float | None = 1.0
    """Largest global norm of the gradient; None leaves it alone."""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, in (0, 1); what is evaluated and saved at the
    end."""

    def __post_init__(self) -> None:
        require(self.learning_rate > 0, "optimizer.learning_rate", "positive", self.learning_rate)
        require(self.weight_decay >= 0, "optimizer.weight_decay", "at least 0", self.weight_decay)
        require(all(0 <= b < 1 for b in self.betas), "optimizer.betas", "in [0, 1)", self.betas)
        require(self.eps > 0, "optimizer.eps", "positive", self.eps)
        clip = self.clip_norm
        require(clip is None or clip > 0, "optimizer.clip_norm", "positive", clip)
        require(self.ema is None or 0 < self.ema < 1, "optimizer.ema", "in (0, 1)", self.ema)


@dataclass(frozen=True)
class ScheduleSettings(Section):
    """How long, and how the learning rate moves: up in a line, then down a half cosine."""

    steps: int | None = 1000
    """Optimizer steps; None leaves the end to `max_seconds`."""
    max_seconds: float | None = None
    """Wall-clock budget. Where the steps do not fit into it, or none are given, time drives the learning
    rate, which is down at the end all the same; such a run does not repeat bit for bit."""
    warmup: float = 0.05
    """Share of the run in which the learning rate rises."""
    floor: float = 0.0
    """The learning rate at the end, as a share of the peak."""

    def __post_init__(self) -> None:
        steps, seconds = self.steps, self.max_seconds
        require(
            steps is not None or seconds is not None,
            "schedule.steps",
            "given where max_seconds is not",
            steps,
        )
        require(steps is None or steps >= 1, "schedule.steps", "at least 1", steps)
        require(seconds is None or seconds > 0, "schedule.max_seconds", "positive", seconds)
        require(0 <= self.warmup < 1, "schedule.warmup", "in [0, 1)", self.warmup)
        require(0 <= self.floor <= 1, "schedule.floor", "in [0, 1]", self.floor)


@dataclass(frozen=True)
class RunSettings(Section):
    """Where and how a run lives."""

    out: Annotated[str, tyro.conf.arg(aliases=["--out"])] = field(default="", metadata=FREE)
    """Receives settings, checkpoints, logs and, at the end, model.safetensors. By default runs/TASK."""
    seed: Annotated[int, tyro.conf.arg(aliases=["--seed"])] = 0
    """Of the weights, the order of the data, augmentation and dropout."""
    resume: Annotated[Literal["auto", "never"], tyro.conf.arg(aliases=["--resume"])] = field(
        default="auto", metadata=FREE
    )
    """"auto": go on from the last complete checkpoint, where there is one. "never": refuse a directory that
    has checkpoints."""
    checkpoint_every: int = field(default=200, metadata=FREE)
    """Steps between checkpoints; the last step always makes one."""
    keep: int = field(default=2, metadata=FREE)
    """Checkpoints kept."""
    evaluate_every: int = field(default=0, metadata=FREE)
    """Steps between evaluations; 0 for none before the end."""
    log_every: int = field(default=10, metadata=FREE)
    """Steps between lines of log.jsonl."""
    tensorboard: bool = field(default=False, metadata=FREE)
    """Write TensorBoard logs; needs pymm[log]."""
    threads: int | None = field(default=None, metadata=FREE)
    """CPU threads; another number gives other last bits. By default torch's."""
    device: str = field(default="cpu", metadata=FREE)
    """Where the model is: "cpu", "cuda", "cuda:1"."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep", "log_every"):
            require(getattr(self, name) >= 1, f"run.{name}", "at least 1", getattr(self, name))
        require(0 <= self.seed < 2**63, "run.seed", "in [0, 2**63)", self.seed)
        require(self.evaluate_every >= 0, "run.evaluate_every", "at least 0", self.evaluate_every)
        require(self.threads is None or self.threads >= 1, "run.threads", "at least 1", self.threads)


@dataclass(frozen=True)
class TaskSettings:
    """Everything that `pymm train TASK` is told. A task's own class names it and fills the sections."""

    task: ClassVar[str] = ""
    """As the command line and `settings.json` name it."""
    unit: ClassVar[str] = "images"
    """What a sample is, in `log.jsonl` (`images_per_s`) and on the terminal."""

    model: Section = field(default_factory=Section)
    data: BatchSettings = field(default_factory=BatchSettings)
    objective: Section = field(default_factory=Section)
    optimizer: AdamWSettings = field(default_factory=AdamWSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    evaluation: Section = field(default_factory=Section)
    run: RunSettings = field(default_factory=RunSettings)
    precision: Literal["fp32", "bf16-autocast", "bf16"] = "fp32"
    """"bf16-autocast": float32 weights, products in bfloat16. "bf16": bfloat16 weights with float32 masters
    in the optimizer, so that small updates are not lost."""

    def __post_init__(self) -> None:
        if not self.run.out:
            object.__setattr__(self, "run", dataclasses.replace(self.run, out=f"runs/{self.task}"))


def changed(
    before: Any, after: Any, prefix: str = "", *, ignore_free: bool = True
) -> list[tuple[str, Any, Any]]:
    """The settings that differ, as `(dotted key, before, after)`; by default without those marked free."""
    found: list[tuple[str, Any, Any]] = []
    for f in dataclasses.fields(before):
        if ignore_free and f.metadata.get("free"):
            continue
        old, new = getattr(before, f.name), getattr(after, f.name)
        if dataclasses.is_dataclass(old):
            found += changed(old, new, f"{prefix}{f.name}.", ignore_free=ignore_free)
        elif old != new:
            found.append((f"{prefix}{f.name}", old, new))
    return found
