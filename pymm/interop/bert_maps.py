"""The names of transformers' BERT, alone and behind the head of one of its tasks."""

from __future__ import annotations

import re

from torch import nn

from pymm.interop.rules import KeyMap, Rule, stacked
from pymm.models.bert import Bert, Pooler


def bert_rules(ours: str, theirs: str) -> tuple[Rule, ...]:
    """The encoder's rules behind the two prefixes."""
    o, e = re.escape(ours), f"{theirs}embeddings."
    a, b = rf"{o}blocks\.(\d+)\.", rf"{theirs}encoder.layer.\1."
    three = tuple(b + rf"attention.self.{x}.\2" for x in ("query", "key", "value"))
    return (
        Rule(o + r"embed\.weight", (e + "word_embeddings.weight",)),
        Rule(o + r"embed\.position", (e + "position_embeddings.weight",)),
        Rule(o + "types", (e + "token_type_embeddings.weight",)),
        Rule(o + r"norm\.(.*)", (e + r"LayerNorm.\1",)),
        Rule(a + r"attn\.qkv\.(.*)", three, stacked(3)),
        Rule(a + r"attn\.proj\.(.*)", (b + r"attention.output.dense.\2",)),
        Rule(a + r"norm1\.(.*)", (b + r"attention.output.LayerNorm.\2",)),
        Rule(a + r"mlp\.fc1\.(.*)", (b + r"intermediate.dense.\2",)),
        Rule(a + r"mlp\.fc2\.(.*)", (b + r"output.dense.\2",)),
        Rule(a + r"norm2\.(.*)", (b + r"output.LayerNorm.\2",)),
        Rule(o + r"pool\.dense\.(.*)", (theirs + r"pooler.dense.\1",)),
    )


def _headless(model: nn.Module) -> bool:
    return isinstance(model, Bert) and not model.num_classes


def _pooled(model: nn.Module) -> bool:
    return isinstance(model, Bert) and isinstance(model.pool, Pooler) and _headless(model)


def _not_pooled(model: nn.Module) -> bool:
    return _headless(model) and not _pooled(model)


_POSITIONS = r"(bert\.)?embeddings\.position_ids"
_HEADS = (r"cls\..*", r"(classifier|qa_outputs)\..*")
# Without a pooler of ours the donor's has nothing to go into, and changes no result.
_POOLER = r"(bert\.)?pooler\.dense\..*"


def _pair(prefix: str, words: str, more: tuple[str, ...]) -> tuple[KeyMap, ...]:
    *plain, pooler = bert_rules("", prefix)
    ignored = (_POSITIONS, *more)
    return (
        KeyMap(
            ("transformers",),
            Bert,
            tuple(plain),
            variant=f"{words}without a pooler",
            ignored=(*ignored, _POOLER),
            fits=_not_pooled,
        ),
        KeyMap(
            ("transformers",),
            Bert,
            (*plain, pooler),
            variant=f"{words}with a pooler",
            ignored=ignored,
            fits=_pooled,
        ),
    )


# The first of a model's that fits is what is written, so the encoder alone comes first.
MAPS = (*_pair("", "", ()), *_pair("bert.", "in a model for a task, ", _HEADS))
