"""Training CLIP from settings alone, and loading what a run left behind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from pymm.data import Batch, Tokenizer
from pymm.data.tokenizer import FILE as TOKENIZER
from pymm.models import CLIP
from pymm.objectives import ContrastiveObjective
from pymm.training import distributed
from pymm.training.checkpoint import list_checkpoints, verify
from pymm.training.errors import CheckpointError, SettingsError
from pymm.training.loop import RunResult, Trainer
from pymm.training.parts import build_loader, build_model, evaluate, save_new_tokenizer
from pymm.training.rundir import SETTINGS, WEIGHTS, check_settings, checkpoints_of
from pymm.training.settings import ClipSettings
from pymm.training.settings_file import load_settings
from pymm.training.weights import check_names


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
    with distributed.process_group(settings.run.device) as world:
        directory = Path(settings.run.out)
        if world.is_main:
            check_settings(directory, settings)
        model = build_model(settings.model, settings.run.seed)
        if settings.objective.kind == "sigmoid" and model.logit_bias is None:
            raise SettingsError(
                "settings: model.name must be a model with a logit bias (pymm list '*_sigmoid') for the "
                f"sigmoid objective, got {settings.model.name!r}"
            )
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


@dataclass(frozen=True)
class Run:
    """A run as its directory holds it.

    Attributes:
        model: in eval mode, float32.
        tokenizer: the one that it was trained with.
        settings: those of the run.
        weights: the file that the model's weights are from.
    """

    model: CLIP
    tokenizer: Tokenizer
    settings: ClipSettings
    weights: Path


def load_run(path: Path | str) -> Run:
    """Load a trained model.

    Args:
        path: a run's directory (its `model.safetensors`, or the newest checkpoint when it has not ended),
            one of its checkpoints (the averaged weights where there are some), or a safetensors file inside
            either.

    Raises:
        FileNotFoundError: when there is no such path, no settings beside it, or no weights.
        CheckpointError: when the checkpoint is damaged or the weights do not fit the model.
        SettingsError: when the settings are not readable.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"load_run: {path} does not exist")
    inside = path.resolve() if path.is_dir() else path.resolve().parent
    home = next((p for p in (inside, *inside.parents[:2]) if (p / SETTINGS).is_file()), None)
    if home is None:
        raise FileNotFoundError(
            f"load_run: {path} must be a run's directory or a part of it: no {SETTINGS} there"
        )
    settings = load_settings(ClipSettings, home / SETTINGS)
    model = build_model(settings.model)
    weights = _weights(path, home)
    if (weights.parent / "manifest.json").exists():
        verify(weights.parent)
    try:
        tensors = load_file(weights)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"load_run: {weights} cannot be read: {error}") from error
    check_names(model.state_dict(), tensors, f"the model {settings.model.name}")
    model.load_state_dict(tensors)
    return Run(model.eval(), Tokenizer.load(home / TOKENIZER), settings, weights)


def _weights(path: Path, home: Path) -> Path:
    if path.is_file():
        return path
    if path.resolve() == home:
        if (home / WEIGHTS).is_file():
            return home / WEIGHTS
        checkpoints = list_checkpoints(checkpoints_of(home))
        if not checkpoints:
            raise FileNotFoundError(f"load_run: {path} holds neither {WEIGHTS} nor a checkpoint")
        path = checkpoints[0]
    found = [path / name for name in ("average.safetensors", "model.safetensors") if (path / name).is_file()]
    if not found:
        raise FileNotFoundError(f"load_run: {path} holds no weights")
    return found[0]
