"""Training: settings, the loop, checkpoints, processes. Parts are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pymm.training.classify import ClassifyRun, train_classify
    from pymm.training.classify_settings import ClassifySettings
    from pymm.training.clip import ClipRun, train_clip
    from pymm.training.detect import DetectRun, train_detect
    from pymm.training.detect_settings import DetectSettings
    from pymm.training.errors import CheckpointError, NonFiniteError, SettingsError, TrainingError
    from pymm.training.loop import RunResult, Trainer
    from pymm.training.runs import Run, load_run
    from pymm.training.settings import (
        AugmentSettings,
        ClipSettings,
        DataSettings,
        EvaluationSettings,
        ModelSettings,
        ObjectiveSettings,
        OptimizerSettings,
        RunSettings,
        ScheduleSettings,
    )
    from pymm.training.settings_file import load_settings
    from pymm.training.task_settings import TaskSettings

# The command line reads the settings to answer `--help`, and must not import torch for it.
_PARTS = {
    "classify": ("ClassifyRun", "train_classify"),
    "classify_settings": ("ClassifySettings",),
    "clip": ("ClipRun", "train_clip"),
    "detect": ("DetectRun", "train_detect"),
    "detect_settings": ("DetectSettings",),
    "errors": ("CheckpointError", "NonFiniteError", "SettingsError", "TrainingError"),
    "loop": ("RunResult", "Trainer"),
    "runs": ("Run", "load_run"),
    "settings": (
        "AugmentSettings",
        "ClipSettings",
        "DataSettings",
        "EvaluationSettings",
        "ModelSettings",
        "ObjectiveSettings",
        "OptimizerSettings",
        "RunSettings",
        "ScheduleSettings",
    ),
    "settings_file": ("load_settings",),
    "task_settings": ("TaskSettings",),
}
_PART_OF = {name: part for part, names in _PARTS.items() for name in names}

__all__ = [
    "AugmentSettings",
    "CheckpointError",
    "ClassifyRun",
    "ClassifySettings",
    "ClipRun",
    "ClipSettings",
    "DataSettings",
    "DetectRun",
    "DetectSettings",
    "EvaluationSettings",
    "ModelSettings",
    "NonFiniteError",
    "ObjectiveSettings",
    "OptimizerSettings",
    "Run",
    "RunResult",
    "RunSettings",
    "ScheduleSettings",
    "SettingsError",
    "TaskSettings",
    "Trainer",
    "TrainingError",
    "load_run",
    "load_settings",
    "train_classify",
    "train_clip",
    "train_detect",
]


def __getattr__(name: str) -> Any:
    if name not in _PART_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PART_OF[name]}"), name)
