"""`pymm.load` of BERTs: transformers' directories, sentence-transformers' layout, and bad ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import pymm
from pymm.interop import save, to_donor
from pymm.models.bert import Bert, ClassVector, MeanVector, Pooler
from tests.interop.compare import error, randomize

TOKENS = torch.tensor([[3, 9, 5, 7, 0, 0], [5, 6, 7, 8, 9, 10]])


@pytest.fixture
def transformers() -> Any:
    pytest.importorskip("torchvision")
    return pytest.importorskip("transformers")


def donor(transformers: Any, kind: str = "BertModel", **more: Any) -> Any:
    """The sizes of `bert_tiny` with other vocabulary, positions and heads, which no shape shows."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 512}
    config = transformers.BertConfig(**sizes, vocab_size=60, max_position_embeddings=20, **more)
    model = getattr(transformers, kind)(config).eval()
    randomize(model)
    return model


def truth(model: Any) -> Any:
    with torch.no_grad():
        return model(TOKENS, TOKENS.ne(0).long())


def folder(path: Path, *modules: str, **flags: bool) -> Path:
    """The layout of sentence-transformers around a transformer."""
    places = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize", "Dense": "3_Dense"}
    listed = [{"path": places[m], "type": f"sentence_transformers.models.{m}"} for m in modules]
    (path / "modules.json").write_text(json.dumps(listed))
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 128, **flags}))
    return path


def test_directory(transformers: Any, tmp_path: Path) -> None:
    theirs = donor(transformers, hidden_act="relu", layer_norm_eps=1e-3, type_vocab_size=3)
    theirs.save_pretrained(tmp_path)
    ours = pymm.load(tmp_path)
    assert isinstance(ours, Bert)
    assert (ours.arch, ours.vocab_size, ours.context_length) == ("bert_tiny", 60, 20)
    assert isinstance(ours.pool, Pooler)
    result = truth(theirs)
    with torch.no_grad():
        assert error(ours(TOKENS), result.pooler_output) < 1e-5
    save(ours, tmp_path / "ours.safetensors")
    again = pymm.load(tmp_path / "ours.safetensors")
    with torch.no_grad():
        assert torch.equal(again(TOKENS), ours(TOKENS))
    back = to_donor(again, "transformers")
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


@pytest.mark.parametrize("flag", ["pooling_mode_cls_token", "pooling_mode_mean_tokens"])
def test_sentence_encoder(transformers: Any, tmp_path: Path, flag: str) -> None:
    theirs = donor(transformers)
    theirs.save_pretrained(tmp_path)
    flags = {"pooling_mode_max_tokens": False, flag: True, "include_prompt": True}
    ours = pymm.load(folder(tmp_path, "Transformer", "Pooling", "Normalize", **flags))
    assert isinstance(ours, Bert)
    x, weight = truth(theirs).last_hidden_state, TOKENS.ne(0)[..., None]
    mean = "mean" in flag
    wanted = (x * weight).sum(1) / weight.sum(1) if mean else x[:, 0]
    with torch.no_grad():
        assert error(ours(TOKENS), wanted) < 1e-5
    save(ours, tmp_path / "ours.safetensors")
    again = pymm.load(tmp_path / "ours.safetensors")
    assert isinstance(again, Bert)
    assert isinstance(again.pool, MeanVector if mean else ClassVector)


def test_masked_language_model_with_the_names_of_the_first_files(transformers: Any, tmp_path: Path) -> None:
    theirs = donor(transformers, "BertForMaskedLM")
    state = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in theirs.state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(theirs.config.to_dict()))
    ours = pymm.load(tmp_path)
    assert isinstance(ours, Bert)
    assert isinstance(ours.pool, ClassVector)
    with torch.no_grad():
        x = theirs.bert(TOKENS, TOKENS.ne(0).long()).last_hidden_state
        assert error(ours(TOKENS), x[:, 0]) < 1e-5


@pytest.mark.parametrize("name", ["bert_tiny", "bert_base", "minilm_l6", "minilm_l12"])
def test_rows_are_told_apart(transformers: Any, name: str) -> None:
    """And hold as many parameters as transformers' model of these sizes, whose pooler MiniLM does not use."""
    from pymm.interop.identify import identify

    with torch.device("meta"):
        ours = pymm.create_model(name)
        assert isinstance(ours, Bert)
        config = transformers.BertConfig(
            hidden_size=ours.num_features,
            num_attention_heads=1,
            num_hidden_layers=len(ours.blocks),
            intermediate_size=4 * ours.num_features,
        )
        theirs = transformers.BertModel(config, add_pooling_layer=isinstance(ours.pool, Pooler))
    assert identify(theirs.state_dict(), {}).arch == name
    assert sum(p.numel() for p in theirs.parameters()) == pymm.models.describe(name).parameters


def one_line(call: Any, start: str = "load: ") -> str:
    with pytest.raises(ValueError) as caught:
        call()
    text = str(caught.value)
    assert text.startswith(start), text
    assert "\n" not in text
    return text


def test_bad_sentence_encoders(transformers: Any, tmp_path: Path) -> None:
    theirs = donor(transformers)

    def made(name: str, *modules: str, **flags: bool) -> Path:
        (tmp_path / name).mkdir()
        theirs.save_pretrained(tmp_path / name)
        return folder(tmp_path / name, *modules, **flags)

    plain = ("Transformer", "Pooling")
    path = made("dense", *plain, "Dense", pooling_mode_mean_tokens=True)
    assert "Dense in '3_Dense'" in one_line(lambda: pymm.load(path))
    path = made("max", *plain, pooling_mode_max_tokens=True)
    assert "got pooling_mode_max_tokens" in one_line(lambda: pymm.load(path))
    (path / "1_Pooling" / "config.json").write_text("{")
    assert "a readable config.json" in one_line(lambda: pymm.load(path))
    for text in ("{", "[1]", '[{"type": "Transformer"}]', '"x"'):
        (path / "modules.json").write_text(text)
        one_line(lambda: pymm.load(path))
    (path / "modules.json").write_text(json.dumps([{"path": "../max", "type": "x.Transformer"}]))
    assert "'../max'" in one_line(lambda: pymm.load(path))


def bad_states(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    nan, narrow, short = (dict(state) for _ in range(3))
    nan["encoder.layer.1.output.dense.bias"] = torch.full((128,), float("nan"))
    narrow["encoder.layer.0.output.dense.bias"] = torch.zeros(5)
    del short["encoder.layer.0.attention.self.key.weight"]
    return {"NaN or infinity in blocks.1.mlp.fc2.bias": nan, "for no row fits": narrow, "no row": short}


def test_bad_weights(transformers: Any) -> None:
    state = donor(transformers).state_dict()
    for words, bad in bad_states(state).items():
        assert words in one_line(lambda bad=bad: pymm.load(bad))
    state["encoder.layer.0.output.dense.bias"] = torch.zeros(5)
    text = one_line(lambda: pymm.load(state, "bert_tiny"))
    assert "1 mismatched (blocks.0.mlp.fc2.bias: expected (128,), got (5,))" in text


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_attention_heads", 0), ("layer_norm_eps", "x"), ("hidden_act", ["gelu"]), ("vocab_size", None)],
)
def test_bad_configuration(transformers: Any, tmp_path: Path, key: str, value: Any) -> None:
    theirs = donor(transformers)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
    assert f"config[{key!r}] must be" in one_line(lambda: pymm.load(tmp_path), "read_config: ")
    sections = {
        "vision_config": 3,
        "preprocessor": [],
        "hidden_act": {},
        "pretrained_cfg": {"mean": ["x"] * 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(sections))
    assert pymm.load(tmp_path).arch == "bert_tiny"


def test_what_is_no_bert(transformers: Any, tmp_path: Path) -> None:
    """RoBERTa has BERT's names and counts its positions otherwise."""
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    theirs = transformers.RobertaModel(transformers.RobertaConfig(**sizes, vocab_size=60, type_vocab_size=1))
    assert "for no row fits" in one_line(lambda: pymm.load(theirs.state_dict()))
    theirs.save_pretrained(tmp_path)
    assert "for no row fits" in one_line(lambda: pymm.load(tmp_path))
    text = one_line(lambda: pymm.load(tmp_path, "bert_tiny"), "read_config: ")
    assert text == "read_config: config['model_type'] must be 'bert', got 'roberta'"


def test_damaged_metadata(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model = pymm.create_model("bert_tiny")
    for said in ("{", "[1]", '{"teeth": 3}'):
        save_file(model.state_dict(), path, {"arch": "bert_tiny", "bert": said})
        assert "metadata 'bert'" in one_line(lambda: pymm.load(path))
    save(model, path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    assert "a whole checkpoint" in one_line(lambda: pymm.load(path))
