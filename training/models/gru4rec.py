"""GRU4Rec: a recurrent network over the history (Hidasi et al., "Session-based recommendations
with recurrent neural networks", 2016; sizes and layers as in RecBole's form of it).

Shapes: B requests, L history length, D embedding width, H hidden units.
"""

from torch import Tensor, nn

from contract.features import FeatureSpec
from training.models.encoder import ItemEncoder
from training.models.next_item import NextItemModel


class GRU4Rec(NextItemModel):
    """u_i = W h_i + b, h_i = GRU(dropout(item_i), h_(i-1)), h_0 = 0 (equations 2-5 of the paper,
    but the reset gate acts on the product with the state, not on the state, as cuDNN has it).

    The GRU has no bias, so that a zero input leaves a zero state at exactly 0: padding on the left
    changes nothing, without a mask. The mapping back to the width of the items lets candidates have
    the same table as the history.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        hidden_units: int,
        n_layers: int,
        dropout: float,
    ) -> None:
        super().__init__(items)
        del spec  # the order of behaviors counts, their times do not
        self.dropout = nn.Dropout(dropout)
        self.gru = nn.GRU(embedding_dim, hidden_units, n_layers, bias=False, batch_first=True)
        self.output = nn.Linear(hidden_units, embedding_dim)

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D]."""
        del history_buckets, users
        states_BLH, _ = self.gru(self.dropout(self.items(history_items)))
        vectors_BLD: Tensor = self.output(states_BLH)
        return vectors_BLD

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, D]."""
        del history_buckets, users
        _, last_of_layers = self.gru(self.dropout(self.items(history_items)))
        vectors_BD: Tensor = self.output(last_of_layers[-1])
        return vectors_BD
