"""BERT4Rec: a transformer that looks both ways and fills in hidden items (Sun et al., "BERT4Rec:
sequential recommendation with bidirectional encoder representations from transformer", 2019).

Shapes: B requests, L history length, S = L + 1 places of a row, D embedding width, N masked places.
User and item vectors are D + 1 wide: the last entry carries the item's bias.
"""

import torch
from torch import Tensor, nn

from contract.features import FeatureSpec
from training.models.attention import TransformerBlock, attention_bias
from training.models.encoder import EMBEDDING_STD, ItemEncoder, embedding_table
from training.models.next_item import (
    NO_TARGET,
    NextItemModel,
    valid_positions,
)

# The share of rows of which training hides the last item alone, as serving does: cloze hardly ever
# shows a row whose only gap is its end (section 3.6). The authors' data for ML-1M holds one such
# row to ten of the other kind.
LAST_ONLY_RATE = 0.1


class BERT4Rec(NextItemModel):
    """score(v) = <LayerNorm(GELU(W h + b)), item_v> + bias_v (equation 7), h: the mask's state.

    At inference the mask stands behind the newest behavior, at place S; positions are counted back
    from there, so that a row's width changes nothing. The state comes of post-norm blocks over
    LayerNorm(item + position), no place hidden from any other except for padding.

    `mask_rate`: the share of a row's targets that training hides, at least one of each row.
    """

    causal = False

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
        mask_rate: float,
    ) -> None:
        super().__init__(items)
        self.target_share = mask_rate
        self.n_places = spec.history_length + 1
        self.mask = nn.Parameter(torch.empty(embedding_dim))
        nn.init.normal_(self.mask, std=EMBEDDING_STD)
        self.positions = embedding_table(self.n_places, embedding_dim, std=EMBEDDING_STD)
        self.norm = nn.LayerNorm(embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embedding_dim,
                n_heads=n_heads,
                ffn_units=ffn_units,
                dropout=dropout,
                norm="post",
            )
            for _ in range(n_layers)
        )
        self.head = nn.Sequential(
            nn.Linear(embedding_dim, embedding_dim), nn.GELU(), nn.LayerNorm(embedding_dim)
        )
        self.item_bias = nn.Parameter(torch.zeros(items.items.num_embeddings))

    @property
    def learns_whole_rows(self) -> bool:
        """True: cloze learns any place of a row, from both of its sides."""
        return True

    def training_pairs(
        self, history_items: Tensor, history_buckets: Tensor, targets: Tensor, users: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the user vectors [N, D + 1] of hidden places, the rows that stood there, int64
        [N], and the row of the batch that each comes from, int64 [N].

        A row is its history and the last target. Only what is a target of the row is ever hidden:
        no padding, no unknown item, and nothing of a row that has no target. The first behavior is
        nobody's target either.
        """
        del history_buckets, users
        nothing_B1 = torch.full_like(targets[:, :1], NO_TARGET)
        truths_BS = torch.cat([nothing_B1, targets], dim=1)
        items_BS = torch.cat([history_items, targets[:, -1:]], dim=1)
        hidden_BS = self._draw_hidden(truths_BS != NO_TARGET)
        x_BSD = torch.where(hidden_BS.unsqueeze(-1), self.mask, self.items(items_BS))
        states_BSD = self._states(x_BSD, valid_positions(items_BS), last_only=False)
        vectors = self._user_vectors(states_BSD[hidden_BS])
        return vectors, truths_BS[hidden_BS], hidden_BS.nonzero()[:, 0]

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D + 1], of which only the last, the mask's, predicts.

        The others are states of the place right after each behavior in the same row, and have seen
        which item stands there.
        """
        del history_buckets, users
        states_BSD = self._states(*self._with_mask(history_items), last_only=False)
        return self._user_vectors(states_BSD[:, 1:])

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, D + 1]: what the mask behind the newest behavior stands for."""
        del history_buckets, users
        states_B1D = self._states(*self._with_mask(history_items), last_only=True)
        return self._user_vectors(states_B1D[:, -1])

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return item vectors [..., D + 1]: the embedding and the bias."""
        return torch.cat([self.items(rows), self.item_bias[rows].unsqueeze(-1)], dim=-1)

    def item_table(self) -> Tensor:
        """Return the item vectors [rows, D + 1] of the whole catalogue."""
        return torch.cat([self.items.table(), self.item_bias.unsqueeze(-1)], dim=-1)

    def _draw_hidden(self, is_target_BS: Tensor) -> Tensor:
        """Return which places are hidden, bool [B, S]: at least one wherever there is a target."""
        device = is_target_BS.device
        draws_BS = torch.rand(is_target_BS.shape, device=device).masked_fill(~is_target_BS, 1.0)
        is_least_BS = draws_BS == draws_BS.min(dim=1, keepdim=True).values
        hidden_BS = is_target_BS & ((draws_BS < self.target_share) | is_least_BS)
        last_only_B1 = torch.rand((len(is_target_BS), 1), device=device) < LAST_ONLY_RATE
        is_last_S = torch.arange(is_target_BS.shape[1], device=device) == is_target_BS.shape[1] - 1
        return torch.where(last_only_B1 & is_target_BS[:, -1:], is_last_S, hidden_BS)

    def _with_mask(self, history_items_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Return the row with a mask behind it, [B, S, D], and which places count, bool [B, S]."""
        history_BLD = self.items(history_items_BL)
        mask_B1D = self.mask.expand_as(history_BLD[:, :1])
        valid_BL = valid_positions(history_items_BL)
        return (
            torch.cat([history_BLD, mask_B1D], dim=1),
            torch.cat([valid_BL, torch.ones_like(valid_BL[:, :1])], dim=1),
        )

    def _states(self, x_BSD: Tensor, valid_BS: Tensor, *, last_only: bool) -> Tensor:
        """Return the last block's states [B, S, D], or [B, 1, D] of the last place alone."""
        n_places = x_BSD.shape[1]
        places_S = torch.arange(n_places, device=x_BSD.device) + (self.n_places - n_places)
        x_BSD = self.dropout(self.norm(x_BSD + self.positions(places_S)))
        for n, block in enumerate(self.blocks):
            last = last_only and n == len(self.blocks) - 1
            bias = attention_bias(valid_BS, causal=False, n_queries=1 if last else None)
            x_BSD = block(x_BSD, bias, last_only=last)
        return x_BSD

    def _user_vectors(self, states: Tensor) -> Tensor:
        """Return user vectors [..., D + 1] of states [..., D]."""
        vectors: Tensor = self.head(states)
        return torch.cat([vectors, torch.ones_like(vectors[..., :1])], dim=-1)
