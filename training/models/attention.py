"""Multi-head attention and the transformer block, for rows of which a part is padding.

Shapes: B rows, Q queries, L keys, H heads, D width, E = D / H.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Norm = Literal["pre", "post", "query"]
# Finite: a softmax over nothing but padding is then even, not NaN; what it gives is masked.
MASKED = -1e9


def attention_bias(valid_BL: Tensor, *, causal: bool, n_queries: int | None = None) -> Tensor:
    """Return the additive float mask [B, 1, Q, L]: 0 where a query may look, MASKED elsewhere.

    `valid_BL`: keys that are no padding. `causal`: the Q queries are the last Q positions, and see
    nothing after themselves. All L positions are queries unless `n_queries` is given.
    """
    n_rows, length = valid_BL.shape
    n_queries = length if n_queries is None else n_queries
    seen_B1QL = valid_BL[:, None, None, :].expand(n_rows, 1, n_queries, length)
    if causal:
        keys_L = torch.arange(length, device=valid_BL.device)
        seen_B1QL = seen_B1QL & (keys_L <= keys_L[length - n_queries :, None])
    return torch.where(seen_B1QL, 0.0, MASKED)


class MultiHeadAttention(nn.Module):
    """softmax(Q K^T / sqrt(E) + bias) V, H heads (Vaswani et al., 2017).

    Attention weights are not dropped out: torch's fused kernels do not do it, and drawing L x L
    random numbers a head costs more than the attention does.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"a width of {width} cannot be shared by {n_heads} heads")
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, query_BQD: Tensor, memory_BLD: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [B, Q, D]; `bias` is added to the scores [B, H, Q, L], and may be broadcast."""
        query_BHQE = self._heads(self.query(query_BQD))
        key_BLD, value_BLD = self.key_value(memory_BLD).chunk(2, dim=-1)
        met_BHQE = functional.scaled_dot_product_attention(
            query_BHQE,
            self._heads(key_BLD),
            self._heads(value_BLD),
            attn_mask=bias,
        )
        met: Tensor = self.output(met_BHQE.transpose(1, 2).flatten(2))
        return met

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return torch.unflatten(x_BLD, 2, (self.n_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two layers with an activation between them."""

    def __init__(
        self,
        width: int,
        hidden_units: int,
        *,
        activation: Literal["relu", "gelu"] = "gelu",
    ) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, hidden_units),
            nn.ReLU() if activation == "relu" else nn.GELU(),
            nn.Linear(hidden_units, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return [..., D] of [..., D]."""
        y: Tensor = self.layers(x)
        return y


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each with a residual.

    `norm`: "pre" or "post" normalises before or after either. "query" is what SASRec's authors
    published as code: queries are normalised, keys and values are not, and the residual goes
    around from behind the norm.
    """

    def __init__(
        self,
        width: int,
        *,
        n_heads: int,
        ffn_units: int,
        dropout: float,
        norm: Norm = "pre",
        activation: Literal["relu", "gelu"] = "gelu",
    ) -> None:
        super().__init__()
        self.norm = norm
        self.attention = MultiHeadAttention(width, n_heads)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, ffn_units, activation=activation)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, bias: Tensor, *, last_only: bool = False) -> Tensor:
        """Return [B, L, D], or [B, 1, D] of the last position alone.

        `bias`: of `attention_bias`, with as many queries as are returned.
        """
        residual = x_BLD[:, -1:] if last_only else x_BLD
        if self.norm == "pre":
            memory = self.attention_norm(x_BLD)
            query = memory[:, -1:] if last_only else memory
            x: Tensor = residual + self.dropout(self.attention(query, memory, bias))
            x = x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))
        elif self.norm == "query":
            query = self.attention_norm(residual)
            x = self.feed_forward_norm(query + self.dropout(self.attention(query, x_BLD, bias)))
            x = x + self.dropout(self.feed_forward(x))
        else:
            x = self.attention_norm(residual + self.dropout(self.attention(residual, x_BLD, bias)))
            x = self.feed_forward_norm(x + self.dropout(self.feed_forward(x)))
        return x
