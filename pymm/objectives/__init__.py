"""Objectives: what a model's outputs are asked for, apart from the model."""

from pymm.objectives.contrastive import ContrastiveObjective

__all__ = ["ContrastiveObjective"]
