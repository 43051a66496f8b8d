"""The names of transformers' BERT, alone and behind the head of one of its tasks."""

from __future__ import annotations

from torch import nn

from pymm.interop.rules import KeyMap, Rule, behind, stacked
from pymm.models.bert import Bert, Pooler

_BLOCK, _LAYER = r"blocks\.(\d+)\.", r"encoder.layer.\1."


def _norm(ours: str, theirs: str, last: str) -> tuple[Rule, ...]:
    """A layer norm, whose tensors have other names in the first published files."""
    return (
        Rule(ours + r"\.(.*)", (rf"{theirs}.{last}",)),
        Rule(ours + r"\.weight", (theirs + ".gamma",)),
        Rule(ours + r"\.bias", (theirs + ".beta",)),
    )


POOLER_RULE = Rule(r"pool\.dense\.(.*)", (r"pooler.dense.\1",))
ENCODER_RULES = (
    Rule(r"embed\.weight", ("embeddings.word_embeddings.weight",)),
    Rule(r"embed\.position", ("embeddings.position_embeddings.weight",)),
    Rule(r"types", ("embeddings.token_type_embeddings.weight",)),
    *_norm("norm", "embeddings.LayerNorm", r"\1"),
    Rule(
        _BLOCK + r"attn\.qkv\.(.*)",
        tuple(_LAYER + rf"attention.self.{x}.\2" for x in ("query", "key", "value")),
        stacked(3),
    ),
    Rule(_BLOCK + r"attn\.proj\.(.*)", (_LAYER + r"attention.output.dense.\2",)),
    *_norm(_BLOCK + "norm1", _LAYER + "attention.output.LayerNorm", r"\2"),
    Rule(_BLOCK + r"mlp\.fc1\.(.*)", (_LAYER + r"intermediate.dense.\2",)),
    Rule(_BLOCK + r"mlp\.fc2\.(.*)", (_LAYER + r"output.dense.\2",)),
    *_norm(_BLOCK + "norm2", _LAYER + "output.LayerNorm", r"\2"),
)
# Constants, and a pooler's weights where ours has no pooler: they change no result then.
POSITIONS = r"embeddings\.position_ids"
POOLER = r"pooler\.dense\..*"


def _headless(model: nn.Module) -> bool:
    return isinstance(model, Bert) and not model.num_classes


def has_pooler(model: nn.Module) -> bool:
    return isinstance(model, Bert) and isinstance(model.pool, Pooler)


def _pooled(model: nn.Module) -> bool:
    return has_pooler(model) and _headless(model)


def _not_pooled(model: nn.Module) -> bool:
    return _headless(model) and not has_pooler(model)


_HEADS = (r"cls\..*", r"(classifier|qa_outputs)\..*")


def _pair(prefix: str, words: str, more: tuple[str, ...]) -> tuple[KeyMap, ...]:
    plain, pooled = (behind("", prefix, rules) for rules in (ENCODER_RULES, (*ENCODER_RULES, POOLER_RULE)))
    positions, pooler = (prefix.replace(".", r"\.") + name for name in (POSITIONS, POOLER))
    return (
        KeyMap(
            ("transformers",),
            Bert,
            plain,
            variant=f"{words}without a pooler",
            ignored=(positions, pooler, *more),
            fits=_not_pooled,
        ),
        KeyMap(
            ("transformers",),
            Bert,
            pooled,
            variant=f"{words}with a pooler",
            ignored=(positions, *more),
            fits=_pooled,
        ),
    )


# The first of a model's that fits is what is written, so the encoder alone comes first.
MAPS = (*_pair("", "", ()), *_pair("bert.", "in a model for a task, ", _HEADS))
