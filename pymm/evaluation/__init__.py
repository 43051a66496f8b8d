"""Classification, zero-shot classification and detection, and retrieval."""

from pymm.evaluation.average_precision import average_precision
from pymm.evaluation.classification import (
    classification_scores,
    confusion_matrix,
    evaluate_classifier,
    extract_features,
    knn_scores,
    logistic_scores,
    predict,
    ridge_scores,
)
from pymm.evaluation.clip import evaluate_clip
from pymm.evaluation.encoding import class_embeddings, encode_images, encode_texts
from pymm.evaluation.retrieval import ranks, recalls, retrieval
from pymm.evaluation.zero_shot import zero_shot
from pymm.evaluation.zero_shot_detection import (
    ProposedRegions,
    Windows,
    ZeroShotDetector,
    evaluate_detection,
)

__all__ = [
    "ProposedRegions",
    "Windows",
    "ZeroShotDetector",
    "average_precision",
    "class_embeddings",
    "classification_scores",
    "confusion_matrix",
    "encode_images",
    "encode_texts",
    "evaluate_classifier",
    "evaluate_clip",
    "evaluate_detection",
    "extract_features",
    "knn_scores",
    "logistic_scores",
    "predict",
    "ranks",
    "recalls",
    "retrieval",
    "ridge_scores",
    "zero_shot",
]
