"""Training CLIP from settings alone, and loading what a run left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from rich.table import Table
from torch import Tensor, nn

from pymm.data import Batch, Tokenizer
from pymm.data.tokenizer import FILE as TOKENIZER
from pymm.models import CLIP
from pymm.objectives import ContrastiveObjective
from pymm.training import distributed, runs
from pymm.training.checkpoint import list_checkpoints
from pymm.training.errors import SettingsError
from pymm.training.loop import AfterStep, RunResult, Trainer
from pymm.training.optimizer import clamp_logit_scale
from pymm.training.parts import build_loader, build_model, evaluate, save_new_tokenizer
from pymm.training.rundir import checkpoints_of
from pymm.training.runs import begin_run, load_weights
from pymm.training.settings import ClipSettings
from pymm.training.towers import begin_towers


def train_clip(
    settings: ClipSettings, *, on_step: Callable[[dict[str, Any]], None] | None = None
) -> RunResult:
    """Train CLIP (Radford et al. 2021, arXiv:2103.00020) on image-text pairs, or go on where a run broke off.

    `settings.run.out` receives `settings.json`, `tokenizer.json`, `log.jsonl`, `checkpoints/` and, at the
    end, `model.safetensors`; `load_run` reads them. Under torchrun the processes share every batch.

    Args:
        settings: the model, the data and the run.
        on_step: called in the main process after each step with the line that the log would hold.

    Returns:
        How the run ended.

    Raises:
        SettingsError: for settings that do not fit the model or the run in that directory.
        ValueError: for an unknown model, or data that yields nothing.
        TrainingError: as `Trainer.fit`.
    """
    with begin_run(settings) as world:
        directory = Path(settings.run.out)
        model = build_model(settings.model, settings.run.seed)
        if settings.objective.kind == "sigmoid" and model.logit_bias is None:
            raise SettingsError(
                "settings: model.name must be a model with a logit bias (pymm list '*_sigmoid') for the "
                f"sigmoid objective, got {settings.model.name!r}"
            )
        frozen = begin_towers(model, settings.model)
        if world.is_main and frozen:
            print(frozen, flush=True)
        if settings.objective.kind == "triplet":  # it has no temperature
            model.logit_scale.requires_grad_(False)
        if settings.objective.kind != "sigmoid" and model.logit_bias is not None:
            model.logit_bias.requires_grad_(False)
        if world.is_main and not list_checkpoints(checkpoints_of(directory)):
            save_new_tokenizer(settings, model)
        distributed.barrier()
        tokenizer = Tokenizer.load(directory / TOKENIZER)

        def score(scored: nn.Module, step: int) -> dict[str, Any]:
            return evaluate(cast(CLIP, scored), tokenizer, settings)

        trainer = Trainer(
            model,
            ContrastiveObjective(**asdict(settings.objective)),
            settings,
            forward=encode_pairs,
            evaluate=score if settings.evaluation.source else None,
            after_step=bound_logit_scale(settings.optimizer.max_logit_scale),
            on_step=on_step,
        )
        loader = build_loader(settings, model, tokenizer, world)
        result = trainer.fit(loader)
        if loader.report.skipped:
            print(f"data of the last epoch, process {world.rank}: {loader.report}", flush=True)
        return result


def encode_pairs(model: Any, batch: Batch) -> tuple[Tensor, ...]:
    """What the objective needs, features not yet normalized: it does that in float32, whatever their type."""
    outputs = (
        model.encode_image(batch.pixels),
        model.encode_text(batch.tokens),
        model.logit_scale.exp(),
    )
    return outputs if model.logit_bias is None else (*outputs, model.logit_bias)


def bound_logit_scale(maximum: float) -> AfterStep:
    """Keeps the logit scale at most `maximum` and logs it."""

    def after_step(parameters: Mapping[str, nn.Parameter]) -> dict[str, float]:
        clamp_logit_scale(parameters, maximum)
        scale = parameters.get("logit_scale")
        return {} if scale is None else {"logit_scale": scale.exp().item()}

    return after_step


@dataclass(frozen=True)
class ClipRun(runs.Run):
    """A run of CLIP; `tokenizer` is the one that it was trained with."""

    model: CLIP
    settings: ClipSettings
    tokenizer: Tokenizer

    @classmethod
    def load(cls, home: Path, settings: ClipSettings, weights: Path) -> ClipRun:
        model = load_weights(build_model(settings.model), weights, f"the model {settings.model.name}")
        return cls(model, settings, weights, Tokenizer.load(home / TOKENIZER))

    def evaluate(self) -> dict[str, Any]:
        return evaluate(self.model, self.tokenizer, self.settings)

    def table(self, scores: dict[str, Any]) -> Table:
        """Recalls, chance beside them, of what `pymm.evaluation.evaluate_clip` returns."""
        places = [key for key in next(iter(scores.values())) if key.startswith("r") and key[1:].isdigit()]
        table = Table(title_justify="left")
        table.add_column("concepts", no_wrap=True)
        table.add_column("from, to", no_wrap=True)
        for heading in ("among", *(f"R@{key[1:]}" for key in places), f"chance of R@{places[0][1:]}"):
            table.add_column(heading, justify="right")
        for name, part in scores.items():
            words = name.replace("_concepts", "").replace("_", " ")
            for way, values in (("image, text", part), ("text, image", part["text_to_image"])):
                recalls = (f"{values[key]:.3f}" for key in (*places, f"chance_{places[0]}"))
                table.add_row(words, way, str(values["candidates"]), *recalls)
        return table


def load_run(path: Path | str) -> ClipRun:
    """Load a trained CLIP; as `pymm.training.load_run`, which loads runs of every task.

    Raises:
        SettingsError: when the run is of another task.
        FileNotFoundError, CheckpointError: as there.
    """
    run = runs.load_run(path)
    if not isinstance(run, ClipRun):
        raise SettingsError(f"load_run: {path} must be a run of CLIP, got {run.settings.task}")
    return run
