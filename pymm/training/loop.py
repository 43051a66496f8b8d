"""The training loop: steps, checkpoints, logs, evaluation, and every way to stop."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from pymm.training import distributed
from pymm.training.accumulate import Accumulator, Forward, Objective, split
from pymm.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, set_aside, step_of
from pymm.training.display import Display, Rate, display, headline
from pymm.training.environment import Stop, catch_signals, reproducible
from pymm.training.errors import NonFiniteError, TrainingError
from pymm.training.log import LOG, Log, read_log
from pymm.training.optimizer import gradient_norm, progress, rate_factor, share_done
from pymm.training.rundir import WEIGHTS, checkpoints_of, export_weights, open_run
from pymm.training.state import State
from pymm.training.task_settings import TaskSettings
from pymm.training.weights import evaluating, set_training_mode

Evaluate = Callable[[nn.Module, int], dict[str, Any]]
# The parameters after a step -> what the log says of them; it may change them in place.
AfterStep = Callable[[Mapping[str, nn.Parameter]], dict[str, float]]


class Loader(Protocol):
    """What the loop needs of a loader: the same batches for the same epoch, `skip` of them left out."""

    def epoch(self, epoch: int, skip: int = 0) -> Iterator[Any]: ...


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
        directory: the run's.
        status: "completed", or "interrupted" by a signal; then the same call goes on.
        step: optimizer steps done, in all.
        loss: of the last step; None when this call had none to do.
        elapsed_s: wall-clock time, in all.
        checkpoint: the last one.
        weights: `model.safetensors` of a completed run, the averaged weights where there is an average.
        evaluation: the last evaluation, where there was one.
        signal: the number of the signal that interrupted.
    """

    directory: Path
    status: Literal["completed", "interrupted"]
    step: int
    loss: float | None
    elapsed_s: float
    checkpoint: Path | None
    weights: Path | None
    evaluation: dict[str, Any] | None
    signal: int | None


def call_model(model: nn.Module, batch: Any) -> Any:
    """The forward of a model that takes pixels and tokens."""
    return model(batch.pixels, batch.tokens)


class Trainer:
    """Trains a model on batches, from the last checkpoint where there is one.

    The steps depend on settings, seed, thread count and the loader's batches only: a run that is killed at
    any moment and started again ends in the same bits as one that is not, unless `schedule.max_seconds`
    drives it.

    Args:
        model: float32, on any device; it is moved to `settings.run.device`. Parameters that need no gradient
            stay as they are, and modules that have no others stay in eval mode.
        objective: `(outputs, ids)` -> the mean loss of a batch; `pymm.training.accumulate.mean_loss` where
            `forward` gives losses.
        settings: of the run.
        forward: `(model, batch)` -> outputs; see `Accumulator`.
        evaluate: `(model, step)` -> scores, called in the main process every `run.evaluate_every` steps and
            at the end, with the model as it would be saved: float32, averaged where there is an average, in
            eval mode.
        after_step: called with the parameters after each step, in every process; it may bound them in place,
            and what it returns is logged.
        rates: name -> the parameter's share of the learning rate, 1 by default.
        on_step: called in the main process after each step with the line that the log would hold.
    """

    def __init__(
        self,
        model: nn.Module,
        objective: Objective,
        settings: TaskSettings,
        *,
        forward: Forward = call_model,
        evaluate: Evaluate | None = None,
        after_step: AfterStep | None = None,
        rates: Mapping[str, float] | None = None,
        on_step: Callable[[dict[str, Any]], None] | None = None,
    ) -> None:
        self.settings, self.evaluate, self.on_step = settings, evaluate, on_step
        self.after_step = after_step
        self.device = distributed.local_device(settings.run.device)
        self.directory = Path(settings.run.out)
        self.world = distributed.current_world()
        self.model = model.to(self.device)
        set_training_mode(self.model)
        self.state = State(self.model, settings, rates)
        self.accumulate = Accumulator(
            self.model,
            objective,
            forward,
            settings.data.accumulation,
            settings.run.seed,
            self._autocast,
            self.state.weights.collect_gradients,
        )
        # The signal that all processes know of; `Stop` may hold one that arrived since they last agreed.
        self.signal = 0
        self.checkpoint: Path | None = None
        self.loss: float | None = None
        self.scores: dict[str, Any] | None = None
        self.scores_step = -1

    def fit(self, loader: Loader) -> RunResult:
        """Train to the end, or until SIGINT or SIGTERM, which save a checkpoint first.

        Args:
            loader: this process's batches; in a distributed run they are of one size in all processes.

        Raises:
            SettingsError: when the directory's run began with other settings.
            CheckpointError: when all its checkpoints are damaged, or one cannot be written.
            NonFiniteError: when a loss or a gradient is not finite; the last checkpoint stays as it is.
            TrainingError: when the loader has no batch, or another process trains in the directory.
        """
        run = self.settings.run
        main = self.world.is_main
        with contextlib.ExitStack() as stack:
            stack.enter_context(reproducible(self.device, run.threads))
            if main:
                stack.enter_context(open_run(self.directory, self.settings))
            show = stack.enter_context(display(main))
            self._resume(show)
            log = None
            if main:
                log = Log(self.directory, self.state.position.step, run.tensorboard)
                stack.callback(log.close)
            stop = stack.enter_context(catch_signals())
            self._train(loader, stop, show, log)
            return self._finish(show, log)

    def _train(self, loader: Loader, stop: Stop, show: Display, log: Log | None) -> None:
        position = self.state.position
        began = time.monotonic() - position.elapsed_s
        rate = Rate(position.elapsed_s)
        while not self._over and not self.signal:
            batches = 0
            with contextlib.closing(_closable(loader.epoch(position.epoch, position.batch))) as epoch:
                for batch in epoch:
                    batches += 1
                    line = self._step(batch)
                    elapsed, signal = distributed.agree([time.monotonic() - began, stop.signal], self.device)
                    position.elapsed_s, self.signal = elapsed, int(signal)
                    line[f"{self.settings.unit}_per_s"] = rate(elapsed, len(batch.ids) * self.world.size)
                    line["elapsed_s"] = elapsed
                    self._after_step(line, show, log)
                    if self._over or self.signal:
                        return
            if batches == 0 and position.batch == 0:
                raise TrainingError("training: the loader must give at least one batch per epoch, got none")
            position.epoch, position.batch = position.epoch + 1, 0

    @property
    def _share(self) -> float:
        return share_done(self.state.position.step, self.state.position.elapsed_s, self.settings.schedule)

    @property
    def _over(self) -> bool:
        return self._share >= 1

    def _step(self, batch: Any) -> dict[str, Any]:
        """One optimizer step; what the log says of it."""
        settings, state = self.settings.optimizer, self.state
        parameters, position = state.weights.trainable, state.position
        done = progress(position.step, position.elapsed_s, self.settings.schedule)
        learning_rate = settings.learning_rate * rate_factor(done, self.settings.schedule)
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate * group["rate"]
        state.weights.zero_grad()
        distributed.synchronize(self.model.buffers())  # running statistics: the main process's, as saved
        micro_batches = split(batch, self.settings.data.micro_batch_size)
        loss = self.accumulate([self._placed(part) for part in micro_batches], position.step)
        distributed.average_gradients(parameters.values())
        norm = gradient_norm(parameters.values(), settings.clip_norm)
        line = {"step": position.step + 1, "epoch": position.epoch, "loss": loss.item()}
        line |= {"learning_rate": learning_rate, "grad_norm": norm.item()}
        self._check_finite(line)
        state.optimizer.step()
        if self.after_step is not None:
            line |= self.after_step(parameters)
        state.weights.publish()
        if state.average is not None:
            state.average.update()
        position.step += 1
        position.batch += 1
        self.loss = line["loss"]
        return line

    def _placed(self, batch: Any) -> Any:
        batch = batch.to(self.device, non_blocking=True)
        one_size = isinstance(batch.pixels, torch.Tensor)  # a detector's pictures have each their own
        if self.settings.precision == "bf16" and one_size and batch.pixels.is_floating_point():
            batch = replace(batch, pixels=batch.pixels.to(torch.bfloat16))
        return batch

    def _autocast(self) -> contextlib.AbstractContextManager[Any]:
        enabled = self.settings.precision == "bf16-autocast"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    def _check_finite(self, line: dict[str, Any]) -> None:
        if math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]):
            return
        what = f"the loss is {line['loss']:.4g}"
        if math.isfinite(line["loss"]):
            gradients = ((name, p.grad) for name, p in self.state.weights.trainable.items())
            bad = [name for name, g in gradients if g is not None and not g.isfinite().all()]
            what += f", but the gradient is not finite ({bad[0] if bad else 'its norm overflows'})"
        last = (
            f"the last good checkpoint is {self.checkpoint}"
            if self.checkpoint
            else "there is no checkpoint yet"
        )
        raise NonFiniteError(
            f"training: step {line['step']}: {what}; the learning rate is {line['learning_rate']:.3g}; {last}"
        )

    def _after_step(self, line: dict[str, Any], show: Display, log: Log | None) -> None:
        run, step = self.settings.run, line["step"]
        logged = step % run.log_every == 0 or step == 1 or self._over
        show.update(self._share, line, logged=logged)
        if log is not None and logged:
            log.write(line)
        if self.on_step is not None and self.world.is_main:
            self.on_step(line)
        if self._over:
            return
        if run.evaluate_every and step % run.evaluate_every == 0:
            self._score(show, log)
        if step % run.checkpoint_every == 0:
            self._save(log)

    def _score(self, show: Display, log: Log | None) -> None:
        step = self.state.position.step
        if self.evaluate is not None and self.world.is_main:
            with evaluating(self.state.weights, self.state.average) as model, torch.no_grad():
                self.scores, self.scores_step = self.evaluate(model, step), step
            show.message(f"step {step}  " + headline(self.scores))
            if log is not None:
                log.write({"step": step, "evaluation": self.scores})
        distributed.barrier()

    def _finish(self, show: Display, log: Log | None) -> RunResult:
        completed, step = self._over, self.state.position.step
        weights = self.directory / WEIGHTS if completed else None
        if step and (self.checkpoint is None or step_of(self.checkpoint) != step):
            self._save(log)
        # After the checkpoint: should the evaluation fail, the training is not lost.
        if completed and distributed.share(self.scores_step) != step:
            self._score(show, log)
            if log is not None:
                log.sync()
        if weights is not None and self.world.is_main:
            average = self.state.average
            export_weights(weights, average.state if average is not None else self.state.weights.state_dict())
        distributed.barrier()
        if not completed:
            goes_on = (
                f"the same command continues from {self.checkpoint}"
                if self.checkpoint
                else "nothing was lost"
            )
            show.message(f"interrupted by signal {self.signal} at step {step}; {goes_on}")
        return RunResult(
            self.directory,
            "completed" if completed else "interrupted",
            step,
            self.loss,
            self.state.position.elapsed_s,
            self.checkpoint,
            weights,
            self.scores,
            None if completed else self.signal,
        )

    def _save(self, log: Log | None) -> None:
        path = None
        if self.world.is_main:
            if log is not None:
                log.sync()  # a checkpoint must not know more steps than the log
            directory, step = checkpoints_of(self.directory), self.state.position.step
            path = save_checkpoint(directory, step, self.state.snapshot(), self.settings.run.keep)
        self.checkpoint = distributed.share(path)

    def _resume(self, show: Display) -> None:
        """Go to the newest whole checkpoint, the main process's choice in all processes."""
        directory = checkpoints_of(self.directory)
        found = newest_checkpoint(directory, show.message) if self.world.is_main else None
        path = distributed.share(found[0] if found is not None else None)
        if path is None:
            distributed.synchronize(self.state.weights.state_dict().values())
            self.state.weights.publish()
            return
        snapshot = found[1] if found is not None else load_checkpoint(path)
        self.state.restore(snapshot)
        self.checkpoint = path
        show.message(f"continuing from {path}")
        before, now = snapshot.state["threads"], torch.get_num_threads()
        if before != now:
            show.message(
                f"the run had {before} threads and has {now} now: it goes on, but not in the same bits"
            )
        if self.world.is_main:
            step = self.state.position.step
            set_aside(directory, newer_than=step)
            for line in read_log(self.directory / LOG):
                if "evaluation" in line and line["step"] <= step:
                    self.scores, self.scores_step = line["evaluation"], line["step"]


def _closable(batches: Iterator[Any]) -> Any:
    """An iterator that can be closed, so that a loader's workers end with the loop."""
    if hasattr(batches, "close"):
        return batches
    return (batch for batch in batches)
