"""Zero-shot classification and retrieval."""

from pymm.evaluation.clip import evaluate_clip
from pymm.evaluation.encoding import class_embeddings, encode_images, encode_texts
from pymm.evaluation.retrieval import ranks, recalls, retrieval
from pymm.evaluation.zero_shot import zero_shot

__all__ = [
    "class_embeddings",
    "encode_images",
    "encode_texts",
    "evaluate_clip",
    "ranks",
    "recalls",
    "retrieval",
    "zero_shot",
]
