"""YouTube DNN as a click model: mean of the behaviors, then an MLP (Covington et al., 2016).

Shapes: B requests, C candidates, L history length, D embedding width.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.head import MLP


class YouTubeDNN(nn.Module):
    """logit = MLP([mean_j e_j, v]); the mean is over behaviors, not over padding."""

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        head_units: Sequence[int],
    ) -> None:
        super().__init__()
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        self.head = MLP(2 * embedding_dim, head_units)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        history_BLD = self.history(self.items, history_items, history_buckets)
        n_behaviors_B1 = (history_items != PADDING_ROW).sum(dim=1, keepdim=True).clamp(min=1)
        user_BD = history_BLD.sum(dim=1) / n_behaviors_B1
        target_BCD = self.items(candidate_items)
        user_BCD = user_BD.unsqueeze(1).expand_as(target_BCD)
        logits_BC: Tensor = self.head(torch.cat([user_BCD, target_BCD], dim=-1))
        return logits_BC
