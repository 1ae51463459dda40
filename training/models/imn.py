"""IMN, the Iterative Memory Network (equations 1-7; sizes as in its authors' own code).

Shapes: B requests, C candidates, L history length, D embedding width, H hidden units of the
attention, G time granularities.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.models.encoder import HistoryEncoder, ItemEncoder
from training.models.head import MLP

# What the attention weights of a full history add up to before training.
INITIAL_WEIGHT_SUM = 10.0


class MultiWayAttention(nn.Module):
    """Weights of all behaviors for a target and a memory (equations 2-4).

    w_j = sigmoid(W2 sigmoid(W1 [e_j - m, e_j - v, e_j * m, e_j * v] + b1) + b2)

    Rearranged, exactly: with W1 = [W_a, W_b, W_c, W_d],

    W1 [...] + b1 = (W_a + W_b + W_c diag(m) + W_d diag(v)) e_j + (b1 - W_a m - W_b v)

    so that each (memory, target) costs one H x E matrix, E = D + 1, and one matrix product meets
    the whole history: no tensor of width 4D over the sequence is ever made. Every behavior carries
    a 1 as its last entry (`with_ones`), which the offset's column meets: no pass of its own over
    the products. The H x E matrix is an affine map of [m, v], and so one matrix product too.
    Behaviors stand last, so that both layers and the weighted sum after them are plain matrix
    products without a transpose.
    """

    def __init__(self, embedding_dim: int, hidden_units: int, history_length: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(4 * embedding_dim, hidden_units)
        self.output = nn.Linear(hidden_units, 1)
        # Weights are not normalised. At 1/2 each, as a bias of 0 makes them, those of a thousand
        # behaviors drown the GRU's gates in a sum of 500, and no gradient comes back.
        share = min(0.5, INITIAL_WEIGHT_SUM / history_length)
        nn.init.constant_(self.output.bias, math.log(share / (1 - share)))

    def forward(self, history_BEL: Tensor, memory_BCD: Tensor, target_BCD: Tensor) -> Tensor:
        """Return the weights [B, C, L], each in (0, 1): they are not normalised over L.

        `history_BEL`: of `with_ones`.
        """
        n_rows, n_candidates, _ = target_BCD.shape
        n_hidden = self.output.in_features
        kernels_BCX = functional.linear(
            torch.cat([memory_BCD, target_BCD], dim=-1), *self._kernel_map()
        )
        # H before C: the second layer then contracts one leading axis of a contiguous tensor.
        kernels_BHCE = torch.unflatten(kernels_BCX, 2, (n_hidden, -1)).transpose(1, 2)
        hidden_BXL = torch.sigmoid(kernels_BHCE.flatten(1, 2) @ history_BEL)
        # One copy of the second layer for each row: cuBLAS takes a product with as many matrices
        # on both sides by their stride, any other by a list of addresses, which a captured CUDA
        # graph would go on reading after it is gone.
        second_B1H = self.output.weight + 0 * history_BEL[:, :1, :1]
        scores_B1X = second_B1H @ hidden_BXL.reshape(n_rows, n_hidden, -1)
        weights_B1X = torch.sigmoid(scores_B1X + self.output.bias)
        return weights_B1X.reshape(n_rows, n_candidates, -1)

    def _kernel_map(self) -> tuple[Tensor, Tensor]:
        """Return weight [H * E, 2D] and bias [H * E] of the map from [m, v] to H x E."""
        minus_m_HD, minus_v_HD, times_m_HD, times_v_HD = self.hidden.weight.chunk(4, dim=1)
        identity_DD = torch.eye(minus_m_HD.shape[1], device=minus_m_HD.device).type_as(minus_m_HD)
        of_m_HED, of_v_HED = (
            torch.cat([times_HD.unsqueeze(1) * identity_DD, -minus_HD.unsqueeze(1)], dim=1)
            for times_HD, minus_HD in ((times_m_HD, minus_m_HD), (times_v_HD, minus_v_HD))
        )
        bias_HE = torch.cat([minus_m_HD + minus_v_HD, self.hidden.bias.unsqueeze(1)], dim=1)
        return torch.cat([of_m_HED, of_v_HED], dim=2).flatten(0, 1), bias_HE.flatten()


def with_ones(history_BLD: Tensor, is_behavior_BL: Tensor) -> Tensor:
    """Return the history [B, E, L], E = D + 1: behaviors last, each with a 1 added."""
    ones_BL1 = is_behavior_BL.unsqueeze(2).type_as(history_BLD)
    return torch.cat([history_BLD, ones_BL1], dim=2).transpose(1, 2).contiguous()


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
        history_BEL = with_ones(history_BLD, history_items != PADDING_ROW)
        target_BCD: Tensor = self.items(candidate_items)
        target_XD = target_BCD.flatten(0, 1)  # X = B * C: recurrent steps take one batch axis
        identity_DD = torch.eye(target_BCD.shape[2], device=target_BCD.device).type_as(target_BCD)
        nothing_DD = torch.zeros_like(identity_DD)
        read_of, memory_of = (
            torch.cat(blocks, dim=1)
            for blocks in ((identity_DD, nothing_DD), (nothing_DD, identity_DD))
        )
        memory_XD = target_XD
        for attention in self.attentions:
            memory_BCD = memory_XD.view_as(target_BCD)
            # Padding is exactly 0 in e, so it drops out of the sum whatever its weight is.
            read_BCD = attention(history_BEL, memory_BCD, target_BCD) @ history_BLD
            read_memory_XF = torch.cat([read_BCD.flatten(0, 1), memory_XD], dim=1)
            memory_XD = gru_step(self.memory, read_memory_XF, read_of, memory_of, memory_XD)
        user_XD = memory_XD
        if self.enhancement is not None:
            user_of = read_of
            for transform in self.transforms:
                assert isinstance(transform, nn.Linear)
                transformed_of = torch.cat([transform.weight, nothing_DD], dim=1)
                input_of = torch.cat([transformed_of, memory_of])
                user_target_XF = torch.cat([user_XD, target_XD], dim=1)
                user_XD = gru_step(self.enhancement, user_target_XF, input_of, user_of, user_XD)
        logits_X: Tensor = self.head(torch.cat([user_XD, target_XD], dim=1))
        return logits_X.view_as(candidate_items)


def gru_step(
    cell: nn.GRUCell, features_XF: Tensor, input_of: Tensor, state_of: Tensor, state_XD: Tensor
) -> Tensor:
    """Return the next state [X, D] of a GRU whose input and state are linear in `features_XF`.

    Input = `input_of` f and state = `state_of` f, for each row f. The gates are then linear in f
    too, so that one product makes all of them, whatever the input was made of; the weights'
    products are constants of an exported graph.
    """
    n_r_z, n_state = 2 * cell.hidden_size, cell.hidden_size
    of_input, of_state = cell.weight_ih, cell.weight_hh
    weight = torch.cat(
        [
            of_input[:n_r_z] @ input_of + of_state[:n_r_z] @ state_of,
            of_input[n_r_z:] @ input_of,
            of_state[n_r_z:] @ state_of,
        ]
    )
    bias = torch.cat(
        [(cell.bias_ih + cell.bias_hh)[:n_r_z], cell.bias_ih[n_r_z:], cell.bias_hh[n_r_z:]]
    )
    gates_X = functional.linear(features_XF, weight, bias)
    r_z, input_n, state_n = torch.split(gates_X, [n_r_z, n_state, n_state], dim=1)
    r, z = torch.sigmoid(r_z).chunk(2, dim=1)
    n = torch.tanh(input_n + r * state_n)
    return n + z * (state_XD - n)
