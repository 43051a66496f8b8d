"""Where torchvision keeps what Fast and Faster R-CNN need."""

from __future__ import annotations

from pymm.interop.residual_maps import residual_stages
from pymm.interop.rules import KeyMap, Rule
from pymm.models.rcnn import RCNN


def _either(ours: str, new: str, old: str) -> tuple[Rule, Rule]:
    """Convolutions have stood in a sequence since torchvision 0.14; published files are older."""
    return Rule(ours, (new,)), Rule(ours, (old,))


RULES = (
    Rule(r"backbone\.stem\.(conv|bn)\.(.*)", (r"backbone.body.\g<1>1.\2",)),
    *residual_stages("backbone.", "backbone.body."),
    *_either(
        r"pyramid\.lateral\.(\d)\.(.*)",
        r"backbone.fpn.inner_blocks.\1.0.\2",
        r"backbone.fpn.inner_blocks.\1.\2",
    ),
    *_either(
        r"pyramid\.output\.(\d)\.(.*)",
        r"backbone.fpn.layer_blocks.\1.0.\2",
        r"backbone.fpn.layer_blocks.\1.\2",
    ),
    *_either(r"proposals\.conv\.(.*)", r"rpn.head.conv.0.0.\1", r"rpn.head.conv.\1"),
    Rule(r"proposals\.objectness\.(.*)", (r"rpn.head.cls_logits.\1",)),
    Rule(r"proposals\.offsets\.(.*)", (r"rpn.head.bbox_pred.\1",)),
    Rule(r"head\.fc1\.(.*)", (r"roi_heads.box_head.fc6.\1",)),
    Rule(r"head\.fc2\.(.*)", (r"roi_heads.box_head.fc7.\1",)),
    Rule(r"head\.classes\.(.*)", (r"roi_heads.box_predictor.cls_score.\1",)),
    Rule(r"head\.offsets\.(.*)", (r"roi_heads.box_predictor.bbox_pred.\1",)),
)
IGNORED = (r".*\.num_batches_tracked",)
MAPS = (KeyMap(("torchvision",), RCNN, RULES, ignored=IGNORED),)

__all__ = ["MAPS"]
