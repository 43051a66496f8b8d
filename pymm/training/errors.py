"""What goes wrong in a run, by name."""

from __future__ import annotations


class SettingsError(ValueError):
    """A setting that is unknown, of the wrong type, out of range, or different from the run's."""


class TrainingError(RuntimeError):
    """A run that cannot go on."""


class NonFiniteError(TrainingError):
    """A loss or a gradient that is not a finite number."""


class CheckpointError(TrainingError):
    """A checkpoint that is damaged, incomplete or cannot be written."""
