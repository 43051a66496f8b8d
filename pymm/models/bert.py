"""BERT's encoder, as a sentence encoder and as the text tower of a CLIP."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.layers import MLP, Attention, Blocks, Linear, TokenEmbed
from pymm.models.text_network import TextNetwork
from pymm.ops._checks import fail, shape
from pymm.ops.linear import Activation

Pooling = Literal["class", "mean", "pooler"]
ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
}


class PostNormBlock(nn.Module):
    r"""A post-norm transformer block (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.1).

    .. math:: x' = \mathrm{norm}_1(x + \mathrm{attn}(x)), \qquad y = \mathrm{norm}_2(x' + \mathrm{mlp}(x'))

    Args:
        attn: called as `attn(x, x, attn_mask=, key_padding_mask=, is_causal=)`.
        mlp: called as `mlp(x, x)`.
        norm1, norm2: after the two sums.
    """

    def __init__(self, attn: nn.Module, mlp: nn.Module, norm1: nn.Module, norm2: nn.Module) -> None:
        super().__init__()
        self.attn, self.norm1, self.mlp, self.norm2 = attn, norm1, mlp, norm2

    def forward(
        self,
        x: Tensor,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """`x (B, T, C)` -> `(B, T, C)`; the masks are those of `pymm.layers.Attention`."""
        x = self.norm1(
            self.attn(x, x, attn_mask=attn_mask, key_padding_mask=key_padding_mask, is_causal=is_causal)
        )
        y: Tensor = self.norm2(self.mlp(x, x))
        return y


class ClassVector(nn.Module):
    """The first token: `(B, L, C)` -> `(B, C)`."""

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return x[:, 0]


class MeanVector(nn.Module):
    """The mean of the valid tokens (Reimers and Gurevych 2019, arXiv:1908.10084, sec. 3); zero without any.

    Numerics: summed in float32 at least.
    """

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        acc = x.to(torch.promote_types(x.dtype, torch.float32))
        total = (acc * valid[..., None]).sum(1)
        return (total / valid.sum(1, keepdim=True).clamp_min(1)).to(x.dtype)


class Pooler(nn.Module):
    """BERT's own, `tanh(W x₀ + b)` of the first token (Devlin et al. 2019, arXiv:1810.04805, sec. 3.1)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense = Linear(width, width)

    def forward(self, x: Tensor, valid: Tensor) -> Tensor:
        return torch.tanh(self.dense(x[:, 0]))


class Bert(TextNetwork):
    """A bidirectional transformer over text (Devlin et al. 2019, arXiv:1810.04805, sec. 3). No dropout.

    Padding is what the caller says, or else the zeros at the end of a row: `[PAD]` in BERT's vocabularies,
    and what `pymm.data.Tokenizer` fills up with.

    Args:
        embed: tokens with positions, `(B, L, C)`.
        types: number of segments, of which each adds a vector of its own.
        norm: after the embedding.
        blocks: the transformer.
        pool: `(B, L, C)` and the valid places `(B, L)` -> `(B, C)`.
        head: the projection into a shared embedding, or `nn.Identity()`.
    """

    def __init__(
        self, embed: TokenEmbed, types: int, norm: nn.Module, blocks: Blocks, pool: nn.Module, head: nn.Module
    ) -> None:
        super().__init__(embed, blocks, norm, head)
        self.pool = pool
        self.types = nn.Parameter(torch.empty(types, embed.weight.shape[1]))
        nn.init.normal_(self.types, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two dimensions that an optimizer should not decay."""
        return {"embed.position", "types"}

    def forward_features(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        types: Tensor | None = None,
        intermediates: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """Token ids to vectors.

        Args:
            tokens: `(B, L)` int64, L ≤ context_length, ids in [0, vocab_size).
            valid: bool `(B, L)`, True = a token; by default all but the zeros at a row's end.
            types: int64 `(B, L)`, the segment of each token; by default 0.
            intermediates: receives `"embed"`, `"blocks.0"`, ...

        Returns:
            `(B, L, C)`; what stands at padding means nothing.

        Raises:
            ValueError: when shape, type or an id does not fit.
        """
        x = self.embed(tokens)
        if types is None:
            x = x + self.types[0]
        else:
            _check("types", types, tokens, torch.int64)
            x = x + F.embedding(types, self.types)
        x = self.norm(x)
        if intermediates is not None:
            intermediates["embed"] = x
        if valid is None:
            valid = before_padding(tokens)
        else:
            _check("valid", valid, tokens, torch.bool)
        return self.blocks(x, key_padding_mask=valid, intermediates=intermediates)

    def forward_head(self, x: Tensor, tokens: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """Vectors `(B, L, C)` of `tokens (B, L)` to `(B, E)`, or to the pooled `(B, C)` without a head."""
        vector: Tensor = self.head(self.pool(x, before_padding(tokens) if valid is None else valid))
        return vector

    def forward(
        self,
        tokens: Tensor,
        *,
        valid: Tensor | None = None,
        types: Tensor | None = None,
        intermediates: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """`tokens (B, L)` -> `(B, E)`; arguments as in `forward_features`."""
        x = self.forward_features(tokens, valid=valid, types=types, intermediates=intermediates)
        return self.forward_head(x, tokens, valid=valid)


def before_padding(tokens: Tensor) -> Tensor:
    """All places of `tokens (B, L)` but the zeros at the end of each row."""
    return tokens.ne(0).flip(1).cumsum(1).flip(1) > 0


def _check(name: str, got: Tensor, tokens: Tensor, dtype: torch.dtype) -> None:
    if got.shape != tokens.shape or got.dtype != dtype:
        fail("Bert", name, f"{dtype} {shape(tokens)}, as the tokens", f"{got.dtype} {shape(got)}")


@dataclass(frozen=True)
class BertSpec:
    """A row: sizes, and where they are written. `parameters` counts those of the row as it stands, without a
    head."""

    name: str
    width: int
    depth: int
    heads: int
    mlp_width: int
    parameters: int
    source: str
    pooling: Pooling = "pooler"
    vocab_size: int = 30522
    context_length: int = 512
    types: int = 2
    activation: Activation = "gelu"
    eps: float = 1e-12
    aliases: tuple[str, ...] = ()


_DEVLIN = "Devlin et al. 2019, arXiv:1810.04805, sec. 3"
_TURC = "Turc et al. 2019, arXiv:1908.08962"
_WANG = "Wang et al. 2020, arXiv:2002.10957"

ROWS = (
    BertSpec("bert_tiny", 128, 2, 2, 512, 4_385_920, _TURC),
    BertSpec("bert_mini", 256, 4, 4, 1024, 11_170_560, _TURC),
    BertSpec("bert_small", 512, 4, 8, 2048, 28_763_648, _TURC),
    BertSpec("bert_medium", 512, 8, 8, 2048, 41_373_184, _TURC),
    BertSpec("bert_base", 768, 12, 12, 3072, 109_482_240, _DEVLIN),
    BertSpec("bert_large", 1024, 24, 16, 4096, 335_141_888, _DEVLIN),
    BertSpec("minilm_l6", 384, 6, 12, 1536, 22_565_376, _WANG, pooling="mean"),
    BertSpec("minilm_l12", 384, 12, 12, 1536, 33_212_160, _WANG, pooling="mean"),
)


def describe_bert(name: str) -> BertSpec:
    """The row of that name.

    Raises:
        ValueError: when there is none.
    """
    rows = {row.name: row for row in ROWS}
    if name not in rows:
        fail("describe_bert", "name", f"one of {', '.join(rows)}", repr(name))
    return rows[name]


def read_config(config: Mapping[str, Any], pooling: Pooling = "pooler") -> BertSpec:
    """The sizes that transformers' `config.json` of a BERT holds; `parameters` is 0, not counted.

    Raises:
        ValueError: when a size is missing or the model is of another kind.
    """
    for key, wanted in (("model_type", "bert"), ("position_embedding_type", "absolute")):
        if config.get(key, wanted) != wanted:
            fail("read_config", f"config[{key!r}]", repr(wanted), repr(config[key]))
    if pooling not in get_args(Pooling):
        fail("read_config", "pooling", f"one of {', '.join(get_args(Pooling))}", repr(pooling))
    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        fail("read_config", "config['hidden_act']", f"one of {', '.join(ACTIVATIONS)}", repr(activation))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")
    for key in (*names, "max_position_embeddings", "type_vocab_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            fail("read_config", f"config[{key!r}]", "a positive integer", repr(config.get(key)))
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float) or not eps > 0:
        fail("read_config", "config['layer_norm_eps']", "a positive number", repr(eps))
    width, depth, heads, hidden, vocabulary = (config[key] for key in names)
    return BertSpec(
        "bert",
        width,
        depth,
        heads,
        hidden,
        0,
        "config.json",
        pooling,
        vocabulary,
        config["max_position_embeddings"],
        config["type_vocab_size"],
        ACTIVATIONS[activation],
        eps,
    )


def build(spec: BertSpec, embed: int | None = None) -> Bert:
    """The encoder of a row, initialised as BERT: normal with 0.02, zero biases.

    Args:
        spec: the sizes.
        embed: E of a linear head without bias; None for no head.
    """
    width = spec.width
    pools: dict[Pooling, type[nn.Module]] = {"class": ClassVector, "mean": MeanVector}
    pool = Pooler(width) if spec.pooling == "pooler" else pools[spec.pooling]()
    model = Bert(
        TokenEmbed(spec.vocab_size, spec.context_length, width),
        spec.types,
        nn.LayerNorm(width, spec.eps),
        Blocks(
            PostNormBlock(
                Attention(width, spec.heads),
                MLP(width, spec.mlp_width, spec.activation),
                nn.LayerNorm(width, spec.eps),
                nn.LayerNorm(width, spec.eps),
            )
            for _ in range(spec.depth)
        ),
        pool,
        nn.Identity() if embed is None else Linear(width, embed, bias=False),
    )
    nn.init.normal_(model.embed.position, std=0.02)
    for module in model.modules():
        if isinstance(module, Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
