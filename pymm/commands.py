"""The commands that train, evaluate and list; `pymm.cli` calls them."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.table import Table

from pymm.training.settings import ClipSettings


def train_clip(settings: ClipSettings) -> int:
    """0 when the run is complete, 128 + the signal's number when it was interrupted and can go on."""
    from pymm.training.clip import train_clip

    result = train_clip(settings)
    if result.signal is not None:
        return 128 + result.signal
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


def evaluate(settings: EvalSettings) -> int:
    import torch

    from pymm.training.clip import load_run
    from pymm.training.environment import reproducible
    from pymm.training.files import write_atomically
    from pymm.training.parts import evaluate

    run = load_run(settings.path)
    asked = run.settings.evaluation
    asked = replace(
        asked, source=settings.source or asked.source, templates=settings.templates or asked.templates
    )
    device = torch.device(settings.device)
    with reproducible(device, settings.threads or run.settings.run.threads):
        scores = evaluate(run.model.to(device), run.tokenizer, replace(run.settings, evaluation=asked))
    print_scores(scores, f"{run.weights} on {', '.join(asked.source)}")
    if settings.out is not None:
        write_atomically(Path(settings.out), (json.dumps(scores, indent=2) + "\n").encode())
    return 0


def print_scores(scores: dict[str, Any], title: str) -> None:
    """A table of recalls, chance beside them, of what `pymm.evaluation.evaluate_clip` returns."""
    places = [key for key in next(iter(scores.values())) if key.startswith("r") and key[1:].isdigit()]
    table = Table(title=title, title_justify="left")
    table.add_column("concepts", no_wrap=True)
    table.add_column("from, to", no_wrap=True)
    for heading in ("among", *(f"R@{key[1:]}" for key in places), f"chance of R@{places[0][1:]}"):
        table.add_column(heading, justify="right")
    for name, part in scores.items():
        words = name.replace("_concepts", "").replace("_", " ")
        for way, values in (("image, text", part), ("text, image", part["text_to_image"])):
            recalls = (f"{values[key]:.3f}" for key in (*places, f"chance_{places[0]}"))
            table.add_row(words, way, str(values["candidates"]), *recalls)
    Console().print(table)


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
