"""What can be trained, by name; `pymm train TASK`, `pymm eval` and `load_run` read this table.

A task is one settings class, one module and one row of `TASKS`.

1. The settings, in a file that imports nothing heavy: a frozen dataclass that inherits `TaskSettings`
   (`pymm.training.task_settings`), names itself in `task`, says in `unit` what a sample is, and replaces the
   sections `model`, `data` (a `BatchSettings`), `objective` and `evaluation`, or some of them, by its own. A
   field's docstring is its `--help`; `require` refuses wrong values; `metadata=FREE` marks what may differ
   when a run is continued.
2. The module, with

   - `train(settings, *, on_step=None) -> RunResult`. Inside `begin_run(settings)` it builds the model (from
     `settings.run.seed`), the loader (`epoch(epoch, skip)`, the same batches on every call) and a `Trainer`,
     and returns `trainer.fit(loader)`. A batch is a dataclass whose fields all hold one row per sample, with
     `pixels`, `ids (B,)` and `to(device)`. A loss that is a mean over samples is a `forward` that returns
     `(losses,)` with the objective `mean_loss`; random numbers inside it come from torch's generator, which
     is seeded by run and step. Optimizer, schedule, precision, micro-batches, processes, checkpoints,
     resuming, signals, the log and the average of the weights are the Trainer's.
   - a class that inherits `Run` (`pymm.training.runs`): `load` makes it from a run's directory, `evaluate`
     gives nested dictionaries of numbers, the same at the end of the training and from `pymm eval`, and
     `table` shows them.
3. The row here. Nothing else knows a task by its name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from pymm.training.errors import SettingsError


@dataclass(frozen=True)
class Task:
    """A row; what it names is imported when it is used.

    Attributes:
        name: in `pymm train NAME` and in `settings.json`.
        help: one line.
        settings: `module:class` of the settings; the module imports nothing heavy.
        train: `module:function`.
        run: `module:class` of what `load_run` returns.
    """

    name: str
    help: str
    settings: str
    train: str
    run: str


TASKS = (
    Task(
        "clip",
        "Train CLIP on image-text pairs, or continue a run.",
        "pymm.training.settings:ClipSettings",
        "pymm.training.clip:train_clip",
        "pymm.training.clip:ClipRun",
    ),
    Task(
        "classify",
        "Train a classifier from scratch or from a checkpoint, or continue a run.",
        "pymm.training.classify_settings:ClassifySettings",
        "pymm.training.classify:train_classify",
        "pymm.training.classify:ClassifyRun",
    ),
    Task(
        "mae",
        "Pretrain a masked autoencoder on pictures, or continue a run.",
        "pymm.training.pretrain_settings:MAESettings",
        "pymm.training.mae:train_mae",
        "pymm.training.mae:MAERun",
    ),
    Task(
        "tokenizer",
        "Train an image tokenizer on pictures, or continue a run.",
        "pymm.training.pretrain_settings:TokenizerSettings",
        "pymm.training.tokenizer:train_tokenizer",
        "pymm.training.tokenizer:TokenizerRun",
    ),
    Task(
        "beit",
        "Pretrain BEiT on the tokens of a tokenizer, or continue a run.",
        "pymm.training.pretrain_settings:BEiTSettings",
        "pymm.training.beit:train_beit",
        "pymm.training.beit:BEiTRun",
    ),
    Task(
        "detect",
        "Train a detector on pictures with boxes, or continue a run.",
        "pymm.training.detect_settings:DetectSettings",
        "pymm.training.detect:train_detect",
        "pymm.training.detect:DetectRun",
    ),
)


def find_task(name: str) -> Task:
    """The row of a task.

    Raises:
        SettingsError: when there is none.
    """
    for task in TASKS:
        if task.name == name:
            return task
    raise SettingsError(f"settings: task must be one of {', '.join(t.name for t in TASKS)}, got {name!r}")


def imported(target: str) -> Any:
    """What `module:name` names."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
