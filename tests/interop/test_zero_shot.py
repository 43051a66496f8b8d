"""Zero-shot classification against open_clip's classifier of the same weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pymm.data import Tokenizer
from pymm.evaluation import class_embeddings, zero_shot
from pymm.interop import load_state
from pymm.models.clip import build
from tests.interop.compare import randomize
from tests.interop.test_open_clip import TEXT, VIT, configs, open_clip, spec

__all__ = ["open_clip"]

NAMES = ["red apple", "dog", "cat face", "alarm clock", "bus", "tree", "snowman"]
TEMPLATES = ["A photo of a {}", "a drawing of the {}.", "{}"]


def test_classifier_of_open_clip(open_clip: Any) -> None:
    tokenizer = Tokenizer.train(NAMES + TEMPLATES, 290, 16)
    row = replace(spec(VIT), text=replace(TEXT, vocab_size=tokenizer.vocab_size, context_length=16))
    vision, text = configs(row)
    text |= {"vocab_size": tokenizer.vocab_size, "context_length": 16}
    theirs = open_clip.CLIP(row.embed, vision, text).eval()
    randomize(theirs)
    ours = build(row).eval()
    assert load_state(ours, theirs.state_dict()).complete
    weights = open_clip.build_zero_shot_classifier(theirs, tokenizer, NAMES, TEMPLATES, 3)
    classes = class_embeddings(ours, tokenizer, NAMES, TEMPLATES)
    torch.testing.assert_close(classes, weights.T, rtol=1e-5, atol=1e-5)

    pixels, labels = torch.randn(40, 3, 24, 24), torch.arange(40) % 7
    with torch.no_grad():
        logits = 100 * F.normalize(theirs.encode_image(pixels), dim=-1) @ weights
    top = logits.topk(5).indices == labels[:, None]
    scores = zero_shot(ours, tokenizer, NAMES, TEMPLATES, [(pixels, labels)])
    assert scores["top1"] == pytest.approx(top[:, 0].float().mean().item())
    assert scores["top5"] == pytest.approx(top.any(1).float().mean().item())
