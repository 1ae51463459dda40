"""SASRec: a causal transformer over the history (Kang and McAuley, 2018), and what a revision of
it corrects (Huang, "Revisiting Self-Attentive Sequential Recommendation").

Shapes: B requests, L history length, D embedding width, H heads, G time granularities.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from contract.features import FeatureSpec
from training.models.attention import MASKED, Norm, TransformerBlock, attention_bias
from training.models.encoder import EMBEDDING_STD, ItemEncoder, embedding_table
from training.models.next_item import NextItemModel, valid_positions

Positions = Literal["row", "relative"]


class SASRec(NextItemModel):
    """u_i = LayerNorm(blocks(sqrt(D) * item + position)) at position i; keys up to i only.

    `positions`: "row" is the classic embedding of the place in the row, which is the distance to
    the prediction at the last position only; "relative" adds a learned bias of the distance i - j
    to the attention instead, so that every position is trained with what serving sees.
    `mask_padding`: padding is no key, and contributes nothing; False is the classic form, whose
    scores change with the width of the row. `n_users`: users with an embedding of their own, which
    is added to u; 0 leaves it out. A user is hidden with probability `user_dropout` in training,
    so that unknown users are served by a vector of zeros that the model knows.
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
        norm: Norm = "pre",
        positions: Positions = "row",
        mask_padding: bool = True,
        n_users: int = 0,
        user_dropout: float = 0.5,
    ) -> None:
        super().__init__(items)
        self.scale = embedding_dim**0.5
        self.history_length = spec.history_length
        self.mask_padding = mask_padding
        self.user_dropout = user_dropout
        self.row_positions: nn.Embedding | None = None
        self.distance_bias: nn.Parameter | None = None
        if positions == "row":
            self.row_positions = embedding_table(
                spec.history_length, embedding_dim, std=EMBEDDING_STD
            )
        else:
            self.distance_bias = nn.Parameter(torch.zeros(n_heads, spec.history_length))
        self.users = embedding_table(n_users + 1, embedding_dim, padding_idx=0) if n_users else None
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embedding_dim,
                n_heads=n_heads,
                ffn_units=ffn_units,
                dropout=dropout,
                norm=norm,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim)

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D]."""
        del history_buckets
        return self._encode(history_items, users, last_only=False)

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, D]."""
        del history_buckets
        return self._encode(history_items, users, last_only=True)[:, -1]

    def _encode(self, history_items: Tensor, users: Tensor | None, *, last_only: bool) -> Tensor:
        valid_BL = valid_positions(history_items)
        length = history_items.shape[1]
        x_BLD: Tensor = self.items(history_items) * self.scale
        if self.row_positions is not None:
            places_L = torch.arange(length, device=x_BLD.device) + (self.history_length - length)
            x_BLD = x_BLD + self.row_positions(places_L)
        # Padding is no behavior: its position embedding goes, its place among the keys stays
        # only in the classic form.
        x_BLD = self.dropout(x_BLD) * valid_BL.unsqueeze(-1)
        keys_BL = valid_BL if self.mask_padding else torch.ones_like(valid_BL)
        bias = self._bias(keys_BL, last_only=False)
        for n, block in enumerate(self.blocks):
            if last_only and n == len(self.blocks) - 1:
                x_BLD = block(x_BLD, self._bias(keys_BL, last_only=True), last_only=True)
            else:
                x_BLD = block(x_BLD, bias)
        x_BLD = self.norm(x_BLD)
        if self.users is not None and users is not None:
            x_BLD = x_BLD + self._user_vectors(self.users, users).unsqueeze(1)
        return x_BLD

    def _bias(self, keys_BL: Tensor, *, last_only: bool) -> Tensor:
        length = keys_BL.shape[1]
        bias = attention_bias(keys_BL, causal=True, n_queries=1 if last_only else None)
        if self.distance_bias is None:
            return bias
        places_L = torch.arange(length, device=keys_BL.device)
        queries_Q = places_L[-1:] if last_only else places_L
        distances_QL = (queries_Q[:, None] - places_L).clamp(min=0)
        return (bias + self.distance_bias[:, distances_QL]).clamp(min=MASKED)

    def _user_vectors(self, table: nn.Embedding, users_B: Tensor) -> Tensor:
        if self.training:
            hidden_B = torch.rand(users_B.shape, device=users_B.device) < self.user_dropout
            users_B = users_B.masked_fill(hidden_B, 0)
        vectors_BD: Tensor = table(users_B)
        return vectors_BD
