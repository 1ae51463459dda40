"""IMN, the Iterative Memory Network (equations 1-7; sizes as in its authors' own code).

Shapes: B requests, C candidates, L history length, D embedding width, H hidden units of the
attention, G time granularities.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from contract.features import FeatureSpec
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.head import MLP

# What the attention weights of a full history add up to before training.
INITIAL_WEIGHT_SUM = 10.0


class MultiWayAttention(nn.Module):
    """Weights of all behaviors for a target and a memory (equations 2-4).

    w_j = sigmoid(W2 sigmoid(W1 [e_j - m, e_j - v, e_j * m, e_j * v] + b1) + b2)

    Rearranged, exactly: with W1 = [W_a, W_b, W_c, W_d],

    W1 [...] = (W_a + W_b + W_c diag(m) + W_d diag(v)) e_j - W_a m - W_b v

    so that each (memory, target) costs one H x D matrix, and one matrix product meets the whole
    history: no tensor of width 4D over the sequence is ever made. Kept behaviors-last, so that
    both layers and the weighted sum after them are plain matrix products without a transpose.
    """

    def __init__(self, embedding_dim: int, hidden_units: int, history_length: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * embedding_dim, hidden_units)
        self.output = nn.Linear(hidden_units, 1)
        # Weights are not normalised. At 1/2 each, as a bias of 0 makes them, those of a thousand
        # behaviors drown the GRU's gates in a sum of 500, and no gradient comes back.
        share = min(0.5, INITIAL_WEIGHT_SUM / history_length)
        nn.init.constant_(self.output.bias, math.log(share / (1 - share)))

    def forward(self, history_BDL: Tensor, memory_BCD: Tensor, target_BCD: Tensor) -> Tensor:
        """Return the weights [B, C, L], each in (0, 1): they are not normalised over L."""
        minus_m_HD, minus_v_HD, times_m_HD, times_v_HD = self.hidden.weight.chunk(4, dim=1)
        n_hidden, dim = minus_m_HD.shape
        n_rows, n_candidates, _ = target_BCD.shape
        # H before C: the second layer then contracts one leading axis of a contiguous tensor.
        kernels_BHCD = (
            (minus_m_HD + minus_v_HD).unsqueeze(1)
            + times_m_HD.unsqueeze(1) * memory_BCD.unsqueeze(1)
            + times_v_HD.unsqueeze(1) * target_BCD.unsqueeze(1)
        )
        offsets_BCH = self.hidden.bias - memory_BCD @ minus_m_HD.T - target_BCD @ minus_v_HD.T
        products_BXL = kernels_BHCD.reshape(n_rows, n_hidden * n_candidates, dim) @ history_BDL
        hidden_BXL = torch.sigmoid(
            products_BXL + offsets_BCH.transpose(1, 2).reshape(n_rows, -1, 1)
        )
        scores_BXL = self.output.weight @ hidden_BXL.reshape(n_rows, n_hidden, -1)
        weights_BX = torch.sigmoid(scores_BXL + self.output.bias)
        return weights_BX.reshape(n_rows, n_candidates, -1)


class IterativeMemoryNetwork(nn.Module):
    """IMN-kP, and IMN-kP+ with memory enhancement.

    m^0 = v; for t = 1 .. iterations: u = sum_j w_j e_j, m^t = GRU(u, m^(t-1))     (5-6)
    u^0 = m^P; for t = 1 .. enhancement_steps: u^t = GRU2([W_t u^(t-1), v], u^(t-1))  (7)

    Every pass has attention weights of its own; the GRU is one for all passes; every
    enhancement step has its own W_t. The head is an MLP on [u, v].
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        iterations: int,
        enhancement_steps: int,
        attention_units: int,
        head_units: Sequence[int],
    ) -> None:
        super().__init__()
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        self.attentions = nn.ModuleList(
            MultiWayAttention(embedding_dim, attention_units, spec.history_length)
            for _ in range(iterations)
        )
        self.memory = nn.GRUCell(embedding_dim, embedding_dim)
        self.transforms = nn.ModuleList(
            nn.Linear(embedding_dim, embedding_dim, bias=False) for _ in range(enhancement_steps)
        )
        self.enhancement = (
            nn.GRUCell(2 * embedding_dim, embedding_dim) if enhancement_steps else None
        )
        self.head = MLP(2 * embedding_dim, head_units)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        history_BLD = self.history(self.items, history_items, history_buckets)
        history_BDL = history_BLD.transpose(1, 2).contiguous()
        target_BCD: Tensor = self.items(candidate_items)
        target_XD = target_BCD.flatten(0, 1)  # X = B * C: recurrent cells take one batch axis
        memory_XD = target_XD
        for attention in self.attentions:
            memory_BCD = memory_XD.view_as(target_BCD)
            # Padding is exactly 0 in e, so it drops out of the sum whatever its weight is.
            read_BCD = attention(history_BDL, memory_BCD, target_BCD) @ history_BLD
            memory_XD = self.memory(read_BCD.flatten(0, 1), memory_XD)
        user_XD = memory_XD
        if self.enhancement is not None:
            for transform in self.transforms:
                inputs_XD = torch.cat([transform(user_XD), target_XD], dim=-1)
                user_XD = self.enhancement(inputs_XD, user_XD)
        logits_X: Tensor = self.head(torch.cat([user_XD, target_XD], dim=-1))
        return logits_X.view_as(candidate_items)
