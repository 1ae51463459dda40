"""LinRec: attention without softmax, linear in the length of the history (Liu et al., "LinRec:
Linear attention mechanism for long-term sequential recommender systems", 2023).

Shapes: B requests, L history length (keys), Q queries (all L positions, or the last one alone),
D embedding width, H heads, E = D / H, G time granularities, N chunks of S positions.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.features import FeatureSpec
from training.models.attention import FeedForward
from training.models.encoder import EMBEDDING_STD, ItemEncoder, embedding_table
from training.models.next_item import NextItemModel, valid_positions

# Prefix sums cost L * (S + E^2 / S) numbers a head: the least near S = E.
_CHUNK = 32
_NORM_EPS = 1e-6


class LinRec(NextItemModel):
    """u_i = blocks(dropout(LN(item + position)))_i, with linear attention in post-norm blocks.

    The published form looks at the whole history from every position, so that it can be trained on
    the last position only; with `causal`, position i looks at what came up to it. The embedding of
    the place in the row counts back from its end.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        n_layers: int,
        n_heads: int,
        ffn_units: int,
        dropout: float,
        causal: bool = False,
    ) -> None:
        super().__init__(items)
        self.causal = causal
        self.history_length = spec.history_length
        self.positions = embedding_table(spec.history_length, embedding_dim, std=EMBEDDING_STD)
        self.norm = nn.LayerNorm(embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            LinRecBlock(
                embedding_dim,
                n_heads=n_heads,
                ffn_units=ffn_units,
                dropout=dropout,
                causal=causal,
            )
            for _ in range(n_layers)
        )

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D]."""
        del history_buckets, users
        return self._encode(history_items, last_only=False)

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, D]."""
        del history_buckets, users
        return self._encode(history_items, last_only=True)[:, -1]

    def _encode(self, history_items_BL: Tensor, *, last_only: bool) -> Tensor:
        length = history_items_BL.shape[1]
        places_L = torch.arange(length, device=history_items_BL.device)
        position_LD = self.positions(places_L + (self.history_length - length))
        x_BLD: Tensor = self.dropout(self.norm(self.items(history_items_BL) + position_LD))
        valid_BL = valid_positions(history_items_BL)
        for n, block in enumerate(self.blocks):
            last = last_only and n == len(self.blocks) - 1
            x_BLD = block(x_BLD, valid_BL, last_only=last)
        return x_BLD


class LinRecBlock(nn.Module):
    """Linear attention and a GELU feed-forward, each with dropout, residual and layer norm."""

    def __init__(
        self, width: int, *, n_heads: int, ffn_units: int, dropout: float, causal: bool
    ) -> None:
        super().__init__()
        self.attention = LinearAttention(width, n_heads, causal=causal)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, ffn_units)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor, *, last_only: bool = False) -> Tensor:
        """Return [B, L, D], or [B, 1, D] of the last position alone; keys are where `valid_BL`."""
        residual_BQD = x_BLD[:, -1:] if last_only else x_BLD
        met_BQD = self.attention(x_BLD, valid_BL, last_only=last_only)
        x_BQD = self.attention_norm(residual_BQD + self.dropout(met_BQD))
        y_BQD: Tensor = self.feed_forward_norm(x_BQD + self.dropout(self.feed_forward(x_BQD)))
        return y_BQD


class LinearAttention(nn.Module):
    """q (k^T v) / sqrt(E), where q and k are elu(Q) and elu(K), each row divided by its length.

    As in the authors' code: there is no denominator, so that a longer history gives larger sums,
    and weights may be negative. The paper divides the columns of K instead of its rows.
    """

    def __init__(self, width: int, n_heads: int, *, causal: bool) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"a width of {width} cannot be shared by {n_heads} heads")
        self.n_heads, self.causal = n_heads, causal
        self.scale = (width // n_heads) ** -0.5
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, valid_BL: Tensor, *, last_only: bool = False) -> Tensor:
        """Return [B, L, D], or [B, 1, D] of the last position alone."""
        query_BQD = self.query(x_BLD[:, -1:] if last_only else x_BLD)
        key_BLD, value_BLD = self.key_value(x_BLD).chunk(2, dim=-1)
        query_BHQE = _unit(functional.elu(self._heads(query_BQD)))
        key_BHLE = _unit(functional.elu(self._heads(key_BLD))) * valid_BL[:, None, :, None]
        # The last position sees all keys, causal or not.
        attend = prefix_attention if self.causal and not last_only else linear_attention
        met_BHQE = attend(query_BHQE, key_BHLE, self._heads(value_BLD)) * self.scale
        met_BQD: Tensor = self.output(met_BHQE.transpose(1, 2).flatten(2))
        return met_BQD

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return torch.unflatten(x_BLD, 2, (self.n_heads, -1)).transpose(1, 2)


def linear_attention(query_BHQE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor) -> Tensor:
    """Return sum_j (q_i k_j) v_j over all keys, [B, H, Q, E]."""
    return query_BHQE @ (key_BHLE.transpose(2, 3) @ value_BHLE)


def prefix_attention(query_BHLE: Tensor, key_BHLE: Tensor, value_BHLE: Tensor) -> Tensor:
    """Return sum_{j <= i} (q_i k_j) v_j, [B, H, L, E].

    Chunks of S positions: what came before a chunk is one running sum of k_j v_j^T, what stands in
    it is met one by one. Takes memory for L * (S + E^2 / S) numbers a head.
    """
    length = query_BHLE.shape[2]
    n_chunks = (length + _CHUNK - 1) // _CHUNK
    # At the end, where no position before it looks.
    missing = n_chunks * _CHUNK - length
    query_BHNSE, key_BHNSE, value_BHNSE = (
        torch.unflatten(functional.pad(x, (0, 0, 0, missing)), 2, (n_chunks, _CHUNK))
        for x in (query_BHLE, key_BHLE, value_BHLE)
    )
    sums_BHNEE = (key_BHNSE.transpose(3, 4) @ value_BHNSE).cumsum(dim=2)
    before_BHNEE = torch.cat([torch.zeros_like(sums_BHNEE[:, :, :1]), sums_BHNEE[:, :, :-1]], dim=2)
    within_BHNSS = (query_BHNSE @ key_BHNSE.transpose(3, 4)).tril()
    met_BHNSE: Tensor = query_BHNSE @ before_BHNEE + within_BHNSS @ value_BHNSE
    return met_BHNSE.flatten(2, 3)[:, :, :length]


def _unit(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1, eps=_NORM_EPS)
