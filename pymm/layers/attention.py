"""Multi-head self-attention."""

from __future__ import annotations

from torch import Tensor, nn

from pymm.layers.linear import Linear
from pymm.ops import attention
from pymm.ops._checks import fail


class Attention(nn.Module):
    r"""Multi-head self-attention, one fused projection (Vaswani et al. 2017, arXiv:1706.03762, sec. 3.2.2).

    The heads are strided views of the projection's result, which `pymm.ops.attention` reads without a copy.

    Args:
        width: of the input and the result, C.
        heads: H, a divisor of `width`.
        qkv: the projection `(..., C)` -> `(..., 3C)`; a linear layer with a bias when None.

    Raises:
        ValueError: when `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, qkv: nn.Module | None = None) -> None:
        super().__init__()
        if width % heads:
            fail("Attention", "heads", f"a divisor of the width {width}", heads)
        self.heads = heads
        self.qkv = Linear(width, 3 * width) if qkv is None else qkv
        self.proj = Linear(width, width)

    def forward(
        self,
        x: Tensor,
        residual: Tensor | None = None,
        *,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attend among the tokens of `x`.

        Args:
            x: `(B, T, C)`.
            residual: `(B, T, C)`, added to the result.
            attn_mask: as `pymm.ops.attention` takes it, broadcastable to `(B, H, T, T)`.
            key_padding_mask: bool `(B, T)`, True = valid.
            is_causal: token i attends to the tokens up to i.

        Returns:
            `(B, T, C)`.
        """
        b, t, c = x.shape
        qkv = self.qkv(x).view(b, t, 3, self.heads, c // self.heads)
        # Taken apart in this order, the three gradients come together in one copy that the product can read.
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))
        y = attention(q, k, v, attn_mask, is_causal=is_causal, key_padding_mask=key_padding_mask)
        assert isinstance(y, Tensor)
        return self.proj(y.transpose(1, 2).reshape(b, t, c), residual)
