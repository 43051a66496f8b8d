"""Byte-level BPE in CLIP's layout, trained or read from CLIP's public vocabulary, and BERT's WordPiece."""

from __future__ import annotations

import gzip
import html
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Bpe
from torch import Tensor

from pymm.data._errors import fail

START, END = "<|startoftext|>", "<|endoftext|>"
BERT_START, BERT_END, BERT_PAD, BERT_UNKNOWN = "[CLS]", "[SEP]", "[PAD]", "[UNK]"
FILE = "tokenizer.json"
CLIP_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
CLIP_MERGES = 49152 - 256 - 2
_SPACE = re.compile(r"\s+")
# Curly quotes to straight ones; ligatures, full-width and half-width forms to plain letters.
_PLAIN = {
    **dict.fromkeys((0x2BC, *range(0x2018, 0x201C)), "'"),
    **dict.fromkeys(range(0x201C, 0x2020), '"'),
    **{
        c: unicodedata.normalize("NFKC", chr(c))
        for c in (0x132, 0x133, 0x149, *range(0x1C4, 0x1CD), *range(0x1F1, 0x1F4), *range(0xFB00, 0xFB07))
    },
    **{c: unicodedata.normalize("NFKC", chr(c)) for c in range(0xFF01, 0xFFF0)},
}


def clean(text: str) -> str:
    """CLIP's cleaning of a text.

    HTML entities are resolved (twice, as in CLIP), curly quotes, ligatures and full-width letters become
    plain, Unicode is composed (NFC), white space becomes one blank, and letters become lower case. CLIP also
    repairs text that was decoded with the wrong code page (ftfy); such text stays as it is here.
    """
    text = html.unescape(html.unescape(text)).translate(_PLAIN)
    return _SPACE.sub(" ", unicodedata.normalize("NFC", text)).strip().lower()


class Tokenizer:
    """Texts to rows of token ids: start token, text, end token, zeros.

    In CLIP's layout the end token has the highest id, so `tokens.argmax(-1)` finds it (Radford et al. 2021,
    arXiv:2103.00020, section 2.4); in BERT's, start and end are [CLS] and [SEP], and zero is [PAD]. A text
    that is too long loses its tail and keeps the end token. Special tokens written inside a text are text.

    Args:
        bpe: a `tokenizers.Tokenizer` that knows both special tokens; `train`, `from_clip`, `from_bert` and
            `load` make one.
        context_length: tokens per row unless the call says otherwise, at least 3.
    """

    def __init__(self, bpe: Bpe, context_length: int = 77) -> None:
        start, end = bpe.token_to_id(START), bpe.token_to_id(END)
        self.end_is_last = end is not None and end == bpe.get_vocab_size() - 1
        if start is None and end is None and bpe.token_to_id(BERT_PAD) == 0:
            start, end = bpe.token_to_id(BERT_START), bpe.token_to_id(BERT_END)
        elif not self.end_is_last:
            end = None
        if start is None or end is None:
            expected = f"{START} whose last token is {END}, or with {BERT_PAD}, {BERT_START} and {BERT_END}"
            fail("Tokenizer", "bpe", f"a vocabulary with {expected}", f"{start}, {end}")
        self.bpe, self.start, self.end = bpe, start, end
        self.context_length = _check_length(context_length)
        bpe.no_truncation()
        bpe.no_padding()
        bpe.encode_special_tokens = True  # "<|endoftext|>" in a caption must not end the row

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.bpe.to_str(), self.context_length)  # the library's own pickle drops a setting

    @property
    def vocab_size(self) -> int:
        return int(self.bpe.get_vocab_size())

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without start and end token."""
        cleaned = clean(text) if self.end_is_last else text  # BERT's file holds BERT's own cleaning
        return list(self.bpe.encode(cleaned, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int]) -> str:
        """The cleaned text that the ids stand for, without special tokens and padding.

        A zero is padding after the end token and a token before it.
        """
        kept: list[int] = []
        for i in ids:
            if i == self.end:
                break
            if i != self.start:
                kept.append(int(i))
        return str(self.bpe.decode(kept)).strip()

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokens of every text.

        Args:
            texts: one text or several.
            context_length: tokens per row, at least 3; `self.context_length` by default.

        Returns:
            `(B, L)` int64.

        Raises:
            ValueError: when a text yields no token: its row would say nothing and still be trained on.
        """
        length = self.context_length if context_length is None else _check_length(context_length)
        texts = [texts] if isinstance(texts, str) else list(texts)
        tokens = torch.zeros(len(texts), length, dtype=torch.int64)
        for row, text in enumerate(texts):
            ids = self.encode(text)
            if not ids:
                fail("Tokenizer", f"texts[{row}]", "a text that yields at least one token", repr(text))
            ids = [self.start, *ids[: length - 2], self.end]
            tokens[row, : len(ids)] = torch.tensor(ids)
        return tokens

    def save(self, folder: str | Path) -> Path:
        """Write `tokenizer.json` into the folder, cleaning and special tokens included.

        Other programs that read the file get the same ids; HTML entities and curly quotes they have to clean
        themselves.
        """
        copy = Bpe.from_str(self.bpe.to_str())
        copy.enable_truncation(self.context_length)
        path = Path(folder) / FILE
        copy.save(str(path))
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Tokenizer:
        """Read what `save` wrote: the folder, or the file itself.

        Raises:
            FileNotFoundError: when there is none.
            ValueError: when the file is none of ours.
        """
        path = Path(folder)
        path = path / FILE if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"Tokenizer: {path} does not exist")
        try:
            bpe = Bpe.from_file(str(path))
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"Tokenizer: {path} is no tokenizer file: {error}") from error
        return cls(bpe, (bpe.truncation or {}).get("max_length", 77))

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, context_length: int = 77) -> Tokenizer:
        """Learn a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909).

        All 256 bytes are tokens, so any text that is not blank yields tokens. The result depends on the texts
        and how often each occurs, not on their order.

        Args:
            texts: the captions.
            vocab_size: tokens in all, at least 258; fewer come out when the texts hold fewer merges.
            context_length: see the class.

        Raises:
            ValueError: when `vocab_size` is too small or no text is left after cleaning.
        """
        if vocab_size < 258:
            fail(
                "Tokenizer.train", "vocab_size", "at least 258: 256 bytes and two special tokens", vocab_size
            )
        cleaned = sorted(text for text in map(clean, texts) if text)
        if not cleaned:
            fail("Tokenizer.train", "texts", "texts that are not blank", "none")
        bpe = Bpe(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        bpe.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe.train_from_iterator(
            cleaned,
            trainers.BpeTrainer(vocab_size=vocab_size - 2, initial_alphabet=alphabet, show_progress=False),
        )
        return cls(_finish(bpe), context_length)

    @classmethod
    def from_clip(cls, path: str | Path, context_length: int = 77) -> Tokenizer:
        """CLIP's own tokenizer from its public file `bpe_simple_vocab_16e6.txt.gz`, which open_clip and clip
        ship.

        Args:
            path: the file, which open_clip and clip ship, gzipped or plain: a header, then one merge (two
                words) a line.
            context_length: see the class.

        Raises:
            ValueError: when the file holds no merges.
        """
        raw = Path(path).read_bytes()
        lines = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8").split("\n")
        words = [line.split() for line in lines[1 : CLIP_MERGES + 1] if line.strip()]
        if not words or any(len(pair) != 2 for pair in words):
            fail("Tokenizer.from_clip", "path", "a file of merges, two words a line", repr(str(path)))
        merges = [(first, second) for first, second in words]
        alphabet = list(_bytes_to_unicode().values())
        names = [*alphabet, *(c + "</w>" for c in alphabet), *("".join(pair) for pair in merges)]
        vocab = {name: i for i, name in enumerate(names)}
        bpe = Bpe(models.BPE(vocab=vocab, merges=merges, end_of_word_suffix="</w>", fuse_unk=False))
        bpe.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(CLIP_PATTERN), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        bpe.decoder = decoders.Sequence([decoders.Replace("</w>", " "), decoders.ByteLevel()])
        return cls(_finish(bpe), context_length)

    @classmethod
    def from_bert(cls, path: str | Path, context_length: int = 512, lowercase: bool = True) -> Tokenizer:
        """BERT's WordPiece (Devlin et al. 2019, arXiv:1810.04805, sec. 3) from its `vocab.txt`, one token a
        line.

        Args:
            path: the file.
            context_length: see the class.
            lowercase: as the `uncased` models need it; accents go too.

        Raises:
            ValueError: when the special tokens are not in it.
        """
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        vocab = {token: i for i, token in enumerate(lines)}
        if BERT_UNKNOWN not in vocab:
            fail("Tokenizer.from_bert", "path", f"a vocabulary with {BERT_UNKNOWN}", repr(str(path)))
        wordpiece = Bpe(models.WordPiece(vocab=vocab, unk_token=BERT_UNKNOWN, max_input_chars_per_word=100))
        wordpiece.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
        wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        wordpiece.decoder = decoders.WordPiece()
        wordpiece.add_special_tokens(
            [t for t in (BERT_PAD, BERT_UNKNOWN, BERT_START, BERT_END, "[MASK]") if t in vocab]
        )
        return cls(wordpiece, context_length)


def _restore(text: str, context_length: int) -> Tokenizer:
    return Tokenizer(Bpe.from_str(text), context_length)


def _finish(bpe: Bpe) -> Bpe:
    """Add what the file needs to stand alone: cleaning, the special tokens, the layout of a row."""
    bpe.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    bpe.add_special_tokens([START, END])
    special = [(START, bpe.token_to_id(START)), (END, bpe.token_to_id(END))]
    bpe.post_processor = processors.TemplateProcessing(single=f"{START} $A {END}", special_tokens=special)
    return bpe


def _check_length(context_length: int) -> int:
    if context_length < 3:
        fail("Tokenizer", "context_length", "at least 3: start, one token, end", context_length)
    return context_length


def _bytes_to_unicode() -> dict[int, str]:
    """GPT-2's table in CLIP's order: printable bytes as they are, the others from character 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
