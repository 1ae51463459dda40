"""DIEN, the Deep Interest Evolution Network (Zhou et al., 2019; sizes as in its authors' code).

Shapes: B requests, C candidates, L history length, D embedding width, E = D + 1, H hidden units of
both recurrences, F features of the head, G time granularities.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.din import PRELU_SLOPE, Activation, Head, TargetAttention, with_mean
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.recurrence import Tensors, recur

Convention = Literal["paper", "code"]
AUXILIARY_UNITS = (100, 50)


class AUGRU(nn.Module):
    """GRU whose update gate is scaled by the attention a_t of a candidate (equations 2-5, 12-13).

    r_t = sigmoid(W_r x_t + U_r h_(t-1) + b_r), u_t = sigmoid(W_u x_t + U_u h_(t-1) + b_u),
    n_t = tanh(W_n x_t + r_t * U_n h_(t-1) + b_n), h_t = (1 - w_t) * h_(t-1) + w_t * n_t, h_0 = 0

    `convention`: "paper" has w_t = a_t u_t, so that what gets no attention changes nothing. The
    authors' code scales the gate that *keeps* the state instead, 1 - w_t = (1 - a_t) (1 - u_t),
    that is w_t = u_t + a_t (1 - u_t): what gets no attention is still read, and what gets all of it
    replaces the state. Padding leaves the state as it is under both.

    The inputs are the same for all candidates of a request: their products are computed once.
    """

    def __init__(
        self, input_units: int, hidden_units: int, convention: Convention = "paper"
    ) -> None:
        super().__init__()
        self.convention = convention
        self.inputs = nn.Linear(input_units, 3 * hidden_units)
        # One matrix each: the parts of a common product would be copied to and fro at every step.
        self.reset, self.update, self.candidate = (
            nn.Linear(hidden_units, hidden_units, bias=False) for _ in range(3)
        )

    def forward(self, inputs_BLI: Tensor, attention_BCL: Tensor, is_behavior_BL: Tensor) -> Tensor:
        """Return the last state [B, C, H]; the attention of padding must be 0."""
        n_rows, n_candidates, _ = attention_BCL.shape
        inputs_LB1X = self.inputs(inputs_BLI).transpose(0, 1).unsqueeze(2)
        reset_LB1H, update_LB1H, candidate_LB1H = inputs_LB1X.chunk(3, dim=3)
        attention_LBC1 = attention_BCL.permute(2, 0, 1).unsqueeze(3)
        is_behavior_LB11 = is_behavior_BL.T.type_as(attention_BCL)[..., None, None]
        state_BCH = attention_BCL.new_zeros(n_rows, n_candidates, self.reset.in_features)
        steps = (reset_LB1H, update_LB1H, candidate_LB1H, attention_LBC1, is_behavior_LB11)

        def step(before: Tensors, now: Tensors) -> tuple[Tensors, Tensors]:
            return (self.step(before[0], now),), ()

        (last_BCH,), _ = recur(step, (state_BCH,), steps)
        return last_BCH

    def step(self, state_BCH: Tensor, now: Tensors) -> Tensor:
        """Return the state [B, C, H] after one step.

        `now`: the inputs' shares of the three gates [B, 1, H], reset, update and candidate; the
        attention [B, C, 1]; which rows have a behavior there [B, 1, 1].
        """
        reset_B1H, update_B1H, candidate_B1H, attention_BC1, is_behavior_B11 = now
        r_BCH = torch.sigmoid(reset_B1H + self.reset(state_BCH))
        u_BCH = torch.sigmoid(update_B1H + self.update(state_BCH))
        n_BCH = torch.tanh(candidate_B1H + r_BCH * self.candidate(state_BCH))
        w_BCH = attention_BC1 * u_BCH
        if self.convention == "code":
            w_BCH = attention_BC1 + is_behavior_B11 * u_BCH - w_BCH
        return state_BCH + w_BCH * (n_BCH - state_BCH)


class DIEN(nn.Module):
    """logit = MLP([h'_T, v, m, m * v]), m the mean of the behaviors.

    h_1 .. h_T = GRU(e_1 .. e_T), the interests (equations 2-5); a_t = softmax_t of DIN's attention
    on h_t for the query PReLU(W v + b), where the paper has a bilinear form (equation 8); h'_T =
    AUGRU(h, a), the interest as it evolved towards the candidate. As in the authors' code, but
    without a user id, and with the mean in place of the sum: the sum grows with the history.

    `hidden_units`: of both recurrences, `embedding_dim` unless said. `augru`: see AUGRU.
    `auxiliary`: whether there is an `auxiliary_loss`, which has a network of its own.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        attention_units: Sequence[int],
        head_units: Sequence[int],
        hidden_units: int | None = None,
        augru: Convention = "paper",
        activation: Activation = "relu",
        auxiliary: bool = True,
    ) -> None:
        super().__init__()
        hidden_units = hidden_units or embedding_dim
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        # Each behavior carries a 1, which padding has not: its column is the bias. Without any
        # other bias, inputs of 0 leave a state of 0 at exactly 0, and no mask is needed.
        self.gru = nn.GRU(embedding_dim + 1, hidden_units, bias=False, batch_first=True)
        self.query = nn.Sequential(
            nn.Linear(embedding_dim, hidden_units), nn.PReLU(hidden_units, init=PRELU_SLOPE)
        )
        self.attention = TargetAttention(hidden_units, attention_units)
        self.evolution = AUGRU(hidden_units, hidden_units, augru)
        self.head = Head(hidden_units + 3 * embedding_dim, head_units, activation)
        self.auxiliary = _auxiliary(hidden_units + embedding_dim) if auxiliary else None

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        is_behavior_BL = history_items != PADDING_ROW
        history_BLD = self.history(self.items, history_items, history_buckets)
        target_BCD = self.items(candidate_items)
        states_BLH = self._states(history_BLD, is_behavior_BL)
        query_BCH = torch.unflatten(
            self.query(target_BCD.flatten(0, 1)), 0, tuple(candidate_items.shape)
        )
        attention_BCL = self.attention(states_BLH, query_BCH, is_behavior_BL)
        evolved_BCH = self.evolution(states_BLH, attention_BCL, is_behavior_BL)
        features_BCF = with_mean(evolved_BCH, target_BCD, history_BLD, is_behavior_BL)
        logits_BC: Tensor = self.head(features_BCF, candidate_items)
        return logits_BC

    def auxiliary_loss(
        self, history_items: Tensor, history_buckets: Tensor, negative_items: Tensor
    ) -> Tensor:
        """Return the mean of -log p(h_t, e_(t+1)) - log(1 - p(h_t, e'_(t+1))) over all t that have
        a behavior after them; 0 if none has (equation 7, p as in the authors' code).

        `negative_items`: int64 [B, L], for every behavior a catalogue row that stands in its place,
        at its time; any where there is no behavior. The code's mean is over padding too, which
        makes the loss of short histories small; this one is not.

        There is no batch norm in front of the network, which the code has: its statistics would
        tell positives, which are a batch of their own, from negatives; and states, within (-1, 1),
        and embeddings, of length about 1, are of one scale already.

        Raises ValueError for a model that was built without it.
        """
        if self.auxiliary is None:
            raise ValueError("the model was built without an auxiliary network")
        is_behavior_BL = history_items != PADDING_ROW
        history_BLD = self.history(self.items, history_items, history_buckets)
        negative_BLD = self.history(self.items, negative_items, history_buckets)
        states_BLH = self._states(history_BLD, is_behavior_BL)[:, :-1]
        positive_BL, negative_BL = (
            self.auxiliary(torch.cat([states_BLH, next_BLD[:, 1:]], dim=2)).squeeze(2)
            for next_BLD in (history_BLD, negative_BLD)
        )
        loss_BL = functional.softplus(-positive_BL) + functional.softplus(negative_BL)
        has_next_BL = is_behavior_BL[:, :-1]
        return (loss_BL * has_next_BL).sum() / has_next_BL.sum().clamp(min=1)

    def _states(self, history_BLD: Tensor, is_behavior_BL: Tensor) -> Tensor:
        """Return the states [B, L, H] of the GRU, exactly 0 for padding."""
        history_BLE = torch.cat([history_BLD, is_behavior_BL.unsqueeze(2)], dim=2)
        states_BLH: Tensor
        states_BLH, _ = self.gru(history_BLE)
        return states_BLH


def _auxiliary(n_features: int) -> nn.Module:
    first, second = AUXILIARY_UNITS
    return nn.Sequential(
        nn.Linear(n_features, first),
        nn.Sigmoid(),
        nn.Linear(first, second),
        nn.Sigmoid(),
        nn.Linear(second, 1),
    )
