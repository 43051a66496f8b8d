"""Token embedding with learned positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pymm.ops._checks import fail, shape


class TokenEmbed(nn.Module):
    """Token ids as vectors, plus a learned position: `(B, L)` -> `(B, L, C)`.

    Args:
        vocab_size: V; ids lie in [0, V).
        context_length: the longest L.
        width: C.
    """

    def __init__(self, vocab_size: int, context_length: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab_size, width))
        self.position = nn.Parameter(torch.empty(context_length, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal with 0.02 for tokens and 0.01 for positions, as CLIP."""
        nn.init.normal_(self.weight, std=0.02)
        nn.init.normal_(self.position, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Embed a batch of token ids.

        Args:
            tokens: `(B, L)` of an integer type, L ≤ context_length, ids in [0, V).

        Returns:
            `(B, L, C)`.

        Raises:
            ValueError: when shape, type or an id does not fit. Ids are looked at on the CPU outside
                `torch.compile`; elsewhere a wrong id is the device's own assertion.
        """
        v, longest = self.weight.shape[0], self.position.shape[0]
        if tokens.ndim != 2 or tokens.shape[1] > longest:
            fail("TokenEmbed", "tokens", f"(B, L) with L <= {longest}", shape(tokens))
        if tokens.dtype not in (torch.int64, torch.int32):
            fail("TokenEmbed", "tokens", "int64 or int32", tokens.dtype)
        readable = (
            type(tokens) is Tensor and tokens.device.type == "cpu" and not torch.compiler.is_compiling()
        )
        if readable and tokens.numel():
            low, high = (int(n) for n in tokens.aminmax())
            if low < 0 or high >= v:
                fail("TokenEmbed", "tokens", f"ids in [0, {v})", low if low < 0 else high)
        return F.embedding(tokens, self.weight) + self.position[: tokens.shape[1]]

    def extra_repr(self) -> str:
        v, c = self.weight.shape
        return f"vocab_size={v}, context_length={self.position.shape[0]}, width={c}"
