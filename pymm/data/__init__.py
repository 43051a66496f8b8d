"""Images and captions: WebDataset shards, the emoji pack, synthetic scenes, transforms and tokenizers."""

from pymm.data.classification import LabelledBatch, PictureLoader
from pymm.data.classification_sources import Pictures, read_pictures
from pymm.data.classification_stream import PictureStream
from pymm.data.detection import BoxedBatch, DetectionLoader
from pymm.data.detection_sources import BoxedPictures, read_boxed_pictures
from pymm.data.emoji import emoji_concepts, emoji_shards, unseen_concepts
from pymm.data.loader import Batch, ImageTextLoader
from pymm.data.masking import block_mask, random_mask
from pymm.data.report import Report
from pymm.data.samples import Limits
from pymm.data.scenes import Scene, SceneObject, Scenes, SceneSettings
from pymm.data.scenes_dataset import Detection, DetectionBatch, SceneDetection, collate
from pymm.data.shards import list_shards
from pymm.data.tokenizer import Tokenizer
from pymm.data.transforms import CLIP_MEAN, CLIP_STD, EvalTransform, TrainTransform, Transform

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "Batch",
    "BoxedBatch",
    "BoxedPictures",
    "Detection",
    "DetectionBatch",
    "DetectionLoader",
    "EvalTransform",
    "ImageTextLoader",
    "LabelledBatch",
    "Limits",
    "PictureLoader",
    "PictureStream",
    "Pictures",
    "Report",
    "Scene",
    "SceneDetection",
    "SceneObject",
    "SceneSettings",
    "Scenes",
    "Tokenizer",
    "TrainTransform",
    "Transform",
    "block_mask",
    "collate",
    "emoji_concepts",
    "emoji_shards",
    "list_shards",
    "random_mask",
    "read_boxed_pictures",
    "read_pictures",
    "unseen_concepts",
]
