"""BERT's encoder on its own; tests/interop compares it with transformers'."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch

from pymm.models import bert
from pymm.models.bert import BertSpec, before_padding, build, describe_bert, read_config

SMALL = BertSpec("test", 32, 2, 4, 48, 0, "test", vocab_size=40, context_length=12)
TOKENS = torch.tensor([[3, 9, 0, 7, 0, 0], [5, 6, 7, 8, 9, 10], [4, 0, 0, 0, 0, 0]])


def with_noise(spec: BertSpec, embed: int | None = None) -> bert.Bert:
    torch.manual_seed(0)
    model = build(spec, embed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


@pytest.mark.parametrize("row", bert.ROWS, ids=lambda row: row.name)
def test_rows(row: BertSpec) -> None:
    with torch.device("meta"):
        model = build(describe_bert(row.name))
    assert sum(p.numel() for p in model.parameters()) == row.parameters
    assert (model.context_length, model.vocab_size, model.num_features) == (512, 30522, row.width)


def test_padding_is_the_zeros_at_the_end() -> None:
    valid = before_padding(TOKENS)
    assert valid.tolist() == [
        [True] * 4 + [False] * 2,
        [True] * 6,
        [True] + [False] * 5,
    ]


@pytest.mark.parametrize("pooling", ["class", "mean", "pooler"])
def test_padding_changes_nothing(pooling: bert.Pooling) -> None:
    model = with_noise(replace(SMALL, pooling=pooling), embed=7)
    long = model(torch.nn.functional.pad(TOKENS, (0, 5)))
    assert torch.allclose(model(TOKENS), long, atol=1e-6)
    assert long.shape == (3, 7)
    alone = model(TOKENS[:1, :4])
    assert torch.allclose(alone, long[:1], atol=1e-6)
    told = model(TOKENS, valid=before_padding(TOKENS))
    assert torch.allclose(told, long, atol=1e-6)


def test_a_zero_among_tokens_is_a_token() -> None:
    model = with_noise(SMALL)
    other = TOKENS.clone()
    other[0, 2] = 1
    assert not torch.allclose(model(TOKENS)[0], model(other)[0], atol=1e-3)


def test_mean_of_valid_tokens_by_hand() -> None:
    x = torch.randn(2, 3, 4)
    valid = torch.tensor([[True, True, False], [False, False, False]])
    pooled = bert.MeanVector()(x, valid)
    assert torch.allclose(pooled[0], x[0, :2].mean(0))
    assert torch.equal(pooled[1], torch.zeros(4))
    assert bert.MeanVector()(x.bfloat16(), valid).dtype == torch.bfloat16


def test_types_and_intermediates() -> None:
    model = with_noise(SMALL)
    types = torch.zeros_like(TOKENS)
    assert torch.equal(model(TOKENS), model(TOKENS, types=types))
    types[:, 2:] = 1
    assert not torch.allclose(model(TOKENS), model(TOKENS, types=types), atol=1e-3)
    told: dict[str, torch.Tensor] = {}
    x = model.forward_features(TOKENS, intermediates=told)
    assert list(told) == ["embed", "blocks.0", "blocks.1"]
    assert torch.equal(told["blocks.1"], x)
    model.set_grad_checkpointing()
    assert torch.allclose(model.forward_features(TOKENS), x, atol=1e-6)
    assert model.no_weight_decay() <= set(dict(model.named_parameters()))


def test_errors() -> None:
    model = build(SMALL)
    with pytest.raises(
        ValueError, match=re.escape("Bert: valid must be torch.bool (3, 6), as the tokens, got")
    ):
        model(TOKENS, valid=torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=re.escape("Bert: types must be torch.int64 (3, 6)")):
        model(TOKENS, types=torch.zeros(3, 6))
    with pytest.raises(ValueError, match=r"describe_bert: name must be one of bert_tiny, .*, got 'bert'"):
        describe_bert("bert")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "roberta"}, "config['model_type'] must be 'bert', got 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "must be 'absolute', got 'relative_key'"),
        ({"hidden_act": "swish"}, "config['hidden_act'] must be one of gelu, "),
        ({"hidden_size": None}, "config['hidden_size'] must be a positive integer, got None"),
    ],
)
def test_configurations_that_are_refused(change: dict[str, object], message: str) -> None:
    config = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "vocab_size": 20,
        "max_position_embeddings": 10,
        "type_vocab_size": 2,
    }
    assert (read_config(config).width, read_config(config, "mean").pooling) == (8, "mean")
    with pytest.raises(ValueError, match=re.escape(message)):
        read_config(config | change)
