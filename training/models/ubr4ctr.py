"""UBR4CTR: a policy selects behaviors, attention over the selected ones makes the user's vector
(Qin et al., "User behavior retrieval for click-through rate prediction", 2020).

In the paper, the policy selects features of the target, which are a query to a search engine over
the history. Here it is in the form that the IMN paper compares with, for data without such
features: the policy selects behaviors themselves, by self-attention over the history.

Shapes: B requests, C candidates, L history length, D embedding width, G time granularities.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.attention import MASKED, MultiHeadAttention, attention_bias
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.head import MLP

_MIN_REWARD = -1.0


class SelectionPolicy(nn.Module):
    """p_j = sigmoid(W2 relu(W1 LayerNorm(e_j + attention(e)_j))): the probability of keeping j."""

    def __init__(self, width: int, *, n_heads: int, units: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, n_heads)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.Sequential(nn.Linear(width, units), nn.ReLU(), nn.Linear(units, 1))

    def forward(self, history_BLD: Tensor, is_behavior_BL: Tensor) -> Tensor:
        """Return the logits [B, L] of p; those of padding mean nothing, but are finite."""
        # The same for every query, and so of one: no L x L mask is made.
        bias = attention_bias(is_behavior_BL, causal=False, n_queries=1)
        met_BLD = self.norm(history_BLD + self.attention(history_BLD, history_BLD, bias))
        logits_BL: Tensor = self.layers(met_BLD).squeeze(-1)
        return logits_BL


class UBR4CTR(nn.Module):
    """logit = MLP([u, v]), u = sum_j softmax_j(<W v + b, e_j>) e_j over the kept behaviors.

    Nothing kept is u = 0. In training mode behaviors are kept at random, each with its probability;
    otherwise those of more than 1/2 are, so that a request always has the same scores. The policy
    sees no candidate: a request is selected from once.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        selection_heads: int,
        selection_units: int,
        head_units: Sequence[int],
    ) -> None:
        super().__init__()
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        self.policy = SelectionPolicy(embedding_dim, n_heads=selection_heads, units=selection_units)
        self.query = nn.Linear(embedding_dim, embedding_dim)
        self.head = MLP(2 * embedding_dim, head_units)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        is_behavior_BL = history_items != PADDING_ROW
        history_BLD = self.history(self.items, history_items, history_buckets)
        kept_BL = self._keep(self.policy(history_BLD, is_behavior_BL)) & is_behavior_BL
        return self._score(history_BLD, kept_BL, candidate_items)

    def training_loss(
        self,
        history_items: Tensor,
        history_buckets: Tensor,
        candidate_items: Tensor,
        labels: Tensor,
        mask: Tensor,
    ) -> Tensor:
        """Return the BCE plus the policy's loss, both summed over the samples.

        `labels`, `mask`: [B, C], 1 for clicks and 1 for samples, 0 for others. The policy learns by
        REINFORCE: loss = -log P(kept behaviors) * reward, reward = max(-1, 1 - logloss / log 2),
        the information gain over a coin. P is of the whole selection, of what was left out too: the
        code of the paper's authors counts the kept alone, which is not the reward's gradient. The
        two losses share no gradient: the BCE trains all but the policy, which learns from the
        history as the others encode it.
        """
        is_behavior_BL = history_items != PADDING_ROW
        history_BLD = self.history(self.items, history_items, history_buckets)
        keep_logits_BL = self.policy(history_BLD.detach(), is_behavior_BL)
        kept_BL = self._keep(keep_logits_BL) & is_behavior_BL
        loss_BC = functional.binary_cross_entropy_with_logits(
            self._score(history_BLD, kept_BL, candidate_items), labels, reduction="none"
        )
        reward_BC = (1 - loss_BC.detach() / math.log(2)).clamp(min=_MIN_REWARD)
        log_p_BL = -functional.binary_cross_entropy_with_logits(
            keep_logits_BL, kept_BL.type_as(keep_logits_BL), reduction="none"
        )
        log_p_B1 = (log_p_BL * is_behavior_BL).sum(dim=1, keepdim=True)
        return ((loss_BC - log_p_B1 * reward_BC) * mask).sum()

    def _keep(self, keep_logits_BL: Tensor) -> Tensor:
        if self.training:
            return torch.bernoulli(torch.sigmoid(keep_logits_BL.detach())).bool()
        return keep_logits_BL > 0

    def _score(self, history_BLD: Tensor, kept_BL: Tensor, candidate_items: Tensor) -> Tensor:
        target_BCD: Tensor = self.items(candidate_items)
        scores_BCL = self.query(target_BCD) @ history_BLD.transpose(1, 2)
        kept_B1L = kept_BL.unsqueeze(1)
        # Where nothing is kept the softmax is even; the product makes it 0.
        weights_BCL = torch.softmax(torch.where(kept_B1L, scores_BCL, MASKED), dim=2) * kept_B1L
        user_BCD = weights_BCL @ history_BLD
        logits_BC: Tensor = self.head(torch.cat([user_BCD, target_BCD], dim=-1))
        return logits_BC
