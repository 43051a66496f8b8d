"""The commands that train, evaluate and list; `pymm.cli` calls them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from pymm.training.task_settings import TaskSettings
from pymm.training.tasks import find_task, imported


def train(settings: TaskSettings) -> int:
    """0 when the run is complete, 128 + the signal's number when it was interrupted and can go on."""
    result = imported(find_task(settings.task).train)(settings)
    if result.signal is not None:
        return 128 + int(result.signal)
    if result.weights is not None:
        print(f"{result.weights}: step {result.step}, {result.elapsed_s:.0f} s")
    return 0


@dataclass(frozen=True)
class EvalSettings:
    """Evaluate a run's weights, or a checkpoint, as the run itself does at its end."""

    path: tyro.conf.Positional[str]
    """A run's directory, one of its checkpoints, or a safetensors file in either."""
    source: tuple[str, ...] = ()
    """Shards whose pictures are to be named; by default those that the run's settings name."""
    templates: tuple[str, ...] = ()
    """Prompts around a caption, with {object} for it; by default those of the run's settings."""
    device: str = "cpu"
    """Where the model is."""
    threads: int | None = None
    """CPU threads; by default the run's."""
    out: str | None = None
    """A JSON file for the scores."""
    picture: str | None = None
    """A PNG of the answers: a classifier's confusion. Needs pymm[plot]."""


def evaluate(settings: EvalSettings) -> int:
    import torch

    from pymm.training.environment import reproducible
    from pymm.training.files import write_atomically
    from pymm.training.runs import load_run

    run = load_run(settings.path)
    asked = _asked(run.settings, settings)
    device = torch.device(settings.device)
    with reproducible(device, settings.threads or run.settings.run.threads):
        run.model.to(device)
        run = replace(run, settings=replace(run.settings, evaluation=asked))
        scores = run.evaluate()
        if settings.picture is not None:
            run.draw(Path(settings.picture))
    table = run.table(scores)
    table.title = f"{run.weights} on {', '.join(getattr(asked, 'source', ())) or 'the test part of its data'}"
    Console().print(table)
    if settings.out is not None:
        write_atomically(Path(settings.out), (json.dumps(scores, indent=2) + "\n").encode())
    return 0


def _asked(run: TaskSettings, settings: EvalSettings) -> Any:
    """The run's evaluation with what the command line says otherwise."""
    given = {key: value for key in ("source", "templates") if (value := getattr(settings, key))}
    for key in given:
        if not hasattr(run.evaluation, key):
            raise ValueError(f"eval: {key} must be left out for a run of {run.task}, got {given[key]}")
    return replace(run.evaluation, **given)


@dataclass(frozen=True)
class ListSettings:
    """List the models."""

    pattern: Annotated[str | None, tyro.conf.Positional] = None
    """A shell pattern, such as "clip_*"; all models by default."""


def list_models(settings: ListSettings) -> int:
    """1 when no model fits the pattern."""
    from pymm.models import describe, list_models

    rows = [describe(name) for name in list_models(settings.pattern)]
    for row in rows:
        print(f"{row.name:<{max(len(r.name) for r in rows)}}  {row.parameters / 1e6:8.1f} M  {row.source}")
    return 0 if rows else 1
