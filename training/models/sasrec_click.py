"""SASRec as a click model: a causal transformer reads the history, an MLP meets its last vector
with the target (Kang and McAuley, "Self-attentive sequential recommendation", 2018; the sizes are
those of the baseline in the code of IMN's authors).

Shapes: B requests, C candidates, L history length, D embedding width, G time granularities.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.attention import TransformerBlock, attention_bias
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.head import MLP


class SASRecClick(nn.Module):
    """logit = MLP([u, v, u * v]), u = blocks(e)_L, the vector of the last position.

    Blocks normalise before attention and before the feed-forward layer, as in the paper (section
    3.2), which scores by <u, v>: u * v lets the MLP do so. The baseline that the sizes are from
    hands the vectors of all positions to its MLP, which fixes L; here u stands for them. An empty
    history is u = 0.
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
        head_units: Sequence[int],
    ) -> None:
        super().__init__()
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(
                embedding_dim,
                n_heads=n_heads,
                ffn_units=ffn_units,
                dropout=dropout,
                activation="relu",
            )
            for _ in range(n_layers)
        )
        self.head = MLP(3 * embedding_dim, head_units)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        user_BD = self._user(history_items, history_buckets)
        target_BCD = self.items(candidate_items)
        user_BCD = user_BD.unsqueeze(1).expand_as(target_BCD)
        features = torch.cat([user_BCD, target_BCD, user_BCD * target_BCD], dim=-1)
        logits_BC: Tensor = self.head(features)
        return logits_BC

    def _user(self, history_items: Tensor, history_buckets: Tensor) -> Tensor:
        is_behavior_BL = history_items != PADDING_ROW
        x_BLD = self.dropout(self.history(self.items, history_items, history_buckets))
        *lower, top = self.blocks
        if lower:
            bias = attention_bias(is_behavior_BL, causal=True)
            for block in lower:
                x_BLD = block(x_BLD, bias)
        last_bias = attention_bias(is_behavior_BL, causal=True, n_queries=1)
        last_B1D = top(x_BLD, last_bias, last_only=True)
        # The last position is padding in an empty history only.
        user_BD: Tensor = last_B1D[:, 0] * is_behavior_BL[:, -1:]
        return user_BD
