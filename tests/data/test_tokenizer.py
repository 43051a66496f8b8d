"""CLIP's ids from CLIP's file, and a trained vocabulary that loses no text."""

from __future__ import annotations

import gzip
import importlib.util
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer as Bpe

from pymm.data import Tokenizer, emoji_shards
from pymm.data.report import Report
from pymm.data.shards import read_samples
from pymm.data.tokenizer import clean

TEXTS = [
    "it's 2 o'clock, &amp;amp; we're OK!!! ... don't",
    "naïve café — “quotes” l’été 日本語 русский ☃ 🎉🎉 a\tb\n c",
    "x" * 300,
    "'s't 're'' 12345 a1b2",
    "#hash @me http://x.y/z?q=1 <|foo|>",
    "ÀÉÎ ß İ ΣΑΣ",
    "ﬁ ligature ½ ² ＦＵＬＬ　ｗｉｄｔｈ",
    "e\u0301 combining zero\u200bwidth nb\u00a0sp",
    "word " * 100,
    "0",
    "*",
    "#",
]


@pytest.fixture(scope="module")
def names() -> list[str]:
    found = []
    for sample in read_samples([str(path) for path in emoji_shards(["noto"])], Report(), 1 << 20):
        metadata = json.loads(sample["json"])
        found += [metadata["caption"], *metadata["tags"]]
    return found


def open_clip_tokenizer() -> ModuleType:
    """open_clip's tokenizer file by itself: the package wants torchvision, the tokenizer does not."""
    for needed in ("ftfy", "regex"):
        pytest.importorskip(needed)
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("open_clip is not installed")
    path = Path(spec.submodule_search_locations[0]) / "tokenizer.py"
    file = importlib.util.spec_from_file_location("open_clip_tokenizer", path)
    assert file is not None
    assert file.loader is not None
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module


def test_clip_s_ids(names: list[str]) -> None:
    theirs = open_clip_tokenizer()
    ours = Tokenizer.from_clip(theirs.default_bpe())
    assert ours.vocab_size == 49408
    assert ours("A photo of a cat")[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    reference = theirs.SimpleTokenizer(clean="lower")
    texts = TEXTS + names
    assert torch.equal(ours(texts), reference(texts))
    assert torch.equal(ours(texts, 16), reference(texts, 16))


MERGES = ["t h", "th e</w>", "c a", "ca t</w>", "o f</w>", "r o", "ro o", "roo f</w>", "1 2</w>", "! !</w>"]


@pytest.fixture(params=[gzip.compress, bytes], ids=["gzipped", "plain"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Tokenizer:
    pack: Callable[[bytes], bytes] = request.param
    path = tmp_path / "vocab.txt.gz"
    path.write_bytes(pack(("#version: made up\n" + "\n".join(MERGES) + "\n").encode()))
    return Tokenizer.from_clip(path, 12)


def test_clip_s_rules_on_a_made_vocabulary(small: Tokenizer) -> None:
    base = 512
    assert small.vocab_size == base + len(MERGES) + 2
    end = ord("e") - 33 + 256  # "e" at the end of a word; printable bytes start at 33
    row = small("The  CAT of&nbsp;the roofe !!")[0].tolist()
    expected = [base + 1, base + 3, base + 4, base + 1, base + 6, ord("f") - 33, end, base + 9]
    assert row == [small.start, *expected, small.end, 0, 0]
    assert (small.start, small.end) == (base + 10, base + 11)
    # Digits stand alone, so "12" is never merged; a byte outside ASCII is a token too.
    assert small.encode("12") == [ord("1") - 33 + 256, ord("2") - 33 + 256]
    assert len(small.encode("☃")) == 3
    assert small.decode(row) == "the cat of the roofe !!"


def test_wrong_vocabulary_files(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    for text in ("", "#version\n", "#version\na b c\n"):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"Tokenizer\.from_clip: path must be a file of merges"):
            Tokenizer.from_clip(path)


def test_training_depends_on_the_texts_alone(names: list[str]) -> None:
    first = Tokenizer.train(names, 2048, 24)
    again = Tokenizer.train(reversed([f"  {name.upper()} " for name in names]), 2048, 24)
    assert first.bpe.to_str() == again.bpe.to_str()
    assert first.vocab_size == 2048
    assert Tokenizer.train(["a b"], 2048).vocab_size < 270


@pytest.mark.parametrize("vocab_size", [258, 700])
def test_a_trained_vocabulary_loses_no_text(names: list[str], vocab_size: int) -> None:
    tokenizer = Tokenizer.train(names[:500], vocab_size)
    assert tokenizer.vocab_size == vocab_size
    texts = TEXTS + names[::7]
    for text, row in zip(texts, tokenizer(texts, 700), strict=True):
        assert tokenizer.decode(row.tolist()) == clean(text)
        assert row[0] == tokenizer.start == vocab_size - 2
        assert int((row == tokenizer.end).sum()) == 1
        assert row[row.argmax() + 1 :].count_nonzero() == 0
        assert row.argmax() >= 2


def test_truncation_keeps_the_end(names: list[str]) -> None:
    tokenizer = Tokenizer.train(names, 512, 8)
    row = tokenizer("a very long caption of many many words")[0]
    assert row.shape == (8,)
    assert row[-1] == tokenizer.end
    assert row.argmax() == 7
    longer = tokenizer("a very long caption of many many words", 64)[0]
    assert torch.equal(longer[:7], row[:7])


def test_save_and_load(names: list[str], tmp_path: Path) -> None:
    tokenizer = Tokenizer.train(names, 600, 20)
    path = tokenizer.save(tmp_path)
    assert path == tmp_path / "tokenizer.json"
    texts = [*TEXTS, "a <|endoftext|> b <|startoftext|>"]
    for other in (Tokenizer.load(tmp_path), Tokenizer.load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert other.context_length == 20
        assert other.vocab_size == tokenizer.vocab_size
        assert torch.equal(other(texts), tokenizer(texts))
    # The file stands alone: the library itself gives the same row.
    ids = Bpe.from_file(str(path)).encode("Grinning   FACE with a hat").ids
    assert ids == [i for i in tokenizer("Grinning   FACE with a hat")[0].tolist() if i]


def test_special_tokens_in_a_text_are_text(names: list[str]) -> None:
    tokenizer = Tokenizer.train(names, 600, 32)
    row = tokenizer("a <|endoftext|> b")[0]
    assert int((row == tokenizer.end).sum()) == 1
    assert tokenizer.decode(row.tolist()) == "a <|endoftext|> b"


@pytest.mark.parametrize("text", ["", "  \n", "&nbsp;", "\u3000"])
def test_no_row_is_ever_empty(text: str) -> None:
    tokenizer = Tokenizer.train(["a b c"], 300)
    assert tokenizer.encode(text) == []
    with pytest.raises(
        ValueError, match=r"Tokenizer: texts\[1\] must be a text that yields at least one token"
    ):
        tokenizer(["a", text])


def test_no_texts_are_no_rows() -> None:
    assert Tokenizer.train(["a b c"], 300, 9)([]).shape == (0, 9)


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        Tokenizer.train(["a"], 257)
    with pytest.raises(ValueError, match="texts must be texts that are not blank"):
        Tokenizer.train([" ", ""], 300)
    with pytest.raises(ValueError, match="context_length must be at least 3"):
        Tokenizer.train(["a"], 300, 2)
    with pytest.raises(ValueError, match="context_length must be at least 3"):
        Tokenizer.train(["a"], 300)("a", 1)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer file"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match="bpe must be a vocabulary with"):
        Tokenizer(Bpe.from_str(Tokenizer.train(["a"], 300).bpe.to_str().replace("endoftext", "other")))


def test_a_vocabulary_of_bert(tmp_path: Path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "dog", "##s", "cafe", ","]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(words))
    tokenizer = Tokenizer.from_bert(path, 8)
    assert tokenizer(["A dogs, Café zzz", "dog"]).tolist() == [
        [2, 4, 5, 6, 8, 7, 1, 3],
        [2, 5, 3, 0, 0, 0, 0, 0],
    ]
    assert not tokenizer.end_is_last
    assert tokenizer.decode([2, 4, 5, 6, 3, 0]) == "a dogs"
    again = Tokenizer.load(tokenizer.save(tmp_path))
    assert again.context_length == 8
    assert again.encode("dogs, [SEP]") == tokenizer.encode("dogs, [SEP]")
    assert 3 not in again.encode("dogs, [SEP]")
    path.write_text("\n".join(["[PAD]", "[CLS]", "[SEP]", "a"]))
    with pytest.raises(ValueError, match="a vocabulary with"):
        Tokenizer.from_bert(path)
    path.write_text("\n".join(["a", "[UNK]", "[PAD]", "[CLS]", "[SEP]"]))
    with pytest.raises(ValueError, match="a vocabulary with"):
        Tokenizer.from_bert(path)
