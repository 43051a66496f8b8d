"""Objectives: what a model's outputs are asked for, apart from the model."""

from pymm.objectives.contrastive import ContrastiveObjective
from pymm.objectives.detection import DetectionObjective
from pymm.objectives.masked import MaskedPixels, MaskedTokens
from pymm.objectives.tokenizer import TokenizerObjective

__all__ = [
    "ContrastiveObjective",
    "DetectionObjective",
    "MaskedPixels",
    "MaskedTokens",
    "TokenizerObjective",
]
