"""IMN, the Iterative Memory Network (equations 1-7; sizes as in its authors' own code), and the
ablations of its parts.

Shapes: B requests, C candidates, L history length, D embedding width, E = D + 1, H hidden units of
the attention, G time granularities; M segments of W behaviors each; X rows of two axes made one.
"""

import math
from collections.abc import Sequence
from functools import reduce
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.errors import ConfigError
from training.models.attention import MASKED
from training.models.chunks import in_chunks
from training.models.encoder import HistoryEncoder, ItemEncoder, embedding_table
from training.models.head import MLP

Attention = Literal["multiway", "dot", "none"]
Weights = Literal["sigmoid", "softmax"]
Walk = Literal["iterative", "target"]
Cross = Literal["early", "delayed"]
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

    `n_ways`: 1 leaves the target out, [e_j - m, e_j * m]. `distance`: False leaves the differences
    out, [e_j * m, e_j * v]. `weights`: as in `weigh`.
    """

    def __init__(
        self,
        embedding_dim: int,
        hidden_units: int,
        history_length: int = 1,
        *,
        n_ways: int = 2,
        distance: bool = True,
        weights: Weights = "sigmoid",
    ) -> None:
        super().__init__()
        self.n_ways = n_ways
        self.distance = distance
        self.weights: Weights = weights
        self.hidden = nn.Linear((1 + distance) * n_ways * embedding_dim, hidden_units)
        self.output = scoring_layer(hidden_units, history_length, weights)

    def forward(self, history_BEL: Tensor, *ways_BCD: Tensor) -> Tensor:
        """Return the weights [B, C, L]; a sigmoid's are each in (0, 1), not normalised over L.

        `history_BEL`: of `with_ones`. `ways_BCD`: memory and target, or the memory alone.
        """
        n_rows, n_candidates, _ = ways_BCD[0].shape
        n_hidden = self.output.in_features
        kernels_BCX = functional.linear(torch.cat(ways_BCD, dim=-1), *self._kernel_map())
        # H before C: the second layer then contracts one leading axis of a contiguous tensor.
        kernels_BHCE = torch.unflatten(kernels_BCX, 2, (n_hidden, -1)).transpose(1, 2)
        hidden_BXL = torch.sigmoid(kernels_BHCE.flatten(1, 2) @ history_BEL)
        # One copy of the second layer for each row: cuBLAS takes a product with as many matrices
        # on both sides by their stride, any other by a list of addresses, which a captured CUDA
        # graph would go on reading after it is gone.
        second_B1H = self.output.weight + 0 * history_BEL[:, :1, :1]
        scores_B1X = second_B1H @ hidden_BXL.reshape(n_rows, n_hidden, -1)
        scores_BCL = scores_B1X.reshape(n_rows, n_candidates, -1)
        return weigh(scores_BCL, self.output, history_BEL, self.weights)

    def _kernel_map(self) -> tuple[Tensor, Tensor]:
        """Return weight [H * E, 2D] and bias [H * E] of the map from [m, v] to H x E."""
        weight = self.hidden.weight
        if not self.distance:  # differences that weigh nothing; constants of an exported graph
            weight = functional.pad(weight, (weight.shape[1], 0))
        blocks_HD = weight.chunk(2 * self.n_ways, dim=1)
        minus, times = blocks_HD[: self.n_ways], blocks_HD[self.n_ways :]
        identity_DD = torch.eye(minus[0].shape[1], device=weight.device).type_as(weight)
        of_ways_HED = [
            torch.cat([times_HD.unsqueeze(1) * identity_DD, -minus_HD.unsqueeze(1)], dim=1)
            for times_HD, minus_HD in zip(times, minus, strict=True)
        ]
        bias_HE = torch.cat([reduce(torch.add, minus), self.hidden.bias.unsqueeze(1)], dim=1)
        return torch.cat(of_ways_HED, dim=2).flatten(0, 1), bias_HE.flatten()


class DotAttention(nn.Module):
    """Weights by products of behaviors with memory and target, without an MLP.

    w_j = sigmoid((a_m <e_j, m> + a_v <e_j, v>) / sqrt(D) + b)

    a_m, a_v and b are learned: a weight need not be as steep, nor as large, as the vectors make it.
    `n_ways`: 1 leaves the target out. `weights`: as in `weigh`.
    """

    def __init__(
        self, history_length: int = 1, *, n_ways: int = 2, weights: Weights = "sigmoid"
    ) -> None:
        super().__init__()
        self.weights: Weights = weights
        self.output = scoring_layer(n_ways, history_length, weights)
        nn.init.ones_(self.output.weight)

    def forward(self, history_BEL: Tensor, *ways_BCD: Tensor) -> Tensor:
        """Return the weights [B, C, L]; arguments as of `MultiWayAttention`."""
        width = ways_BCD[0].shape[2]
        query_BCD = torch.stack(ways_BCD, dim=3) @ (self.output.weight[0] * width**-0.5)
        scores_BCL = query_BCD @ history_BEL[:, :width]
        return weigh(scores_BCL, self.output, history_BEL, self.weights)


class EvenWeights(nn.Module):
    """The same weight for every behavior, whatever memory and target are.

    The read is the mean of the behaviors times what the weights of `MultiWayAttention` add up to
    over a full history before training: min(history_length / 2, INITIAL_WEIGHT_SUM).
    """

    def __init__(self, history_length: int) -> None:
        super().__init__()
        self.weight_sum = initial_share(history_length) * history_length

    def forward(self, history_BEL: Tensor, *ways_BCD: Tensor) -> Tensor:
        """Return the weights [B, 1, L], 0 for padding; arguments as of `MultiWayAttention`."""
        del ways_BCD
        is_behavior_B1L = history_BEL[:, -1:]
        n_behaviors_B11 = is_behavior_B1L.sum(dim=2, keepdim=True).clamp(min=1)
        return is_behavior_B1L * (self.weight_sum / n_behaviors_B11)


def initial_share(history_length: int) -> float:
    """Return the weight of one behavior before training."""
    # Weights are not normalised. At 1/2 each, as a bias of 0 makes them, those of a thousand
    # behaviors drown the GRU's gates in a sum of 500, and no gradient comes back.
    return min(0.5, INITIAL_WEIGHT_SUM / history_length)


def scoring_layer(n_features: int, history_length: int, weights: Weights) -> nn.Linear:
    """Return the last layer of an attention, from features to the score of a behavior.

    A softmax does not see what is added to all scores, so it gets no bias.
    """
    layer = nn.Linear(n_features, 1, bias=weights == "sigmoid")
    if weights == "sigmoid":
        share = initial_share(history_length)
        nn.init.constant_(layer.bias, math.log(share / (1 - share)))
    return layer


def weigh(scores_BCL: Tensor, output: nn.Linear, history_BEL: Tensor, weights: Weights) -> Tensor:
    """Return weights [B, C, L] of scores that still lack the bias of the layer `output`.

    "sigmoid": each by itself; what padding gets is of no account, since its e_j is 0. "softmax":
    of all behaviors, adding up to 1; exactly 0 for padding, so 0 everywhere where there is nothing
    else.
    """
    if weights == "sigmoid":
        return torch.sigmoid(scores_BCL + output.bias)
    is_behavior_B1L = history_BEL[:, -1:]
    masked_BCL = torch.where(is_behavior_B1L > 0, scores_BCL, MASKED)
    return torch.softmax(masked_BCL, dim=2) * is_behavior_B1L


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

    The other settings replace one part each; with their defaults they change nothing:

    - `attention`: "dot" makes the weights by `DotAttention`; "none" reads the mean of the
      behaviors, see `EvenWeights`.
    - `weights`: "softmax" normalises them over the behaviors.
    - `distance`: False leaves the differences out of what the attention sees.
    - `walk`: "target" lets the attention of every pass see v in place of m^(t-1), as mode "stk" of
      the authors' code does. All else is kept: features and weights of every pass, the one GRU, and
      its state, which goes from pass to pass. Did the state start at v in every pass too, only the
      last pass would count: that is iterations = 1.
    - `cross`: "delayed" lets the target meet a user vector that knows nothing of it. m^0 is
      learned, one for all users, attention sees the memory alone, and v enters the head only. The
      walk is then made once for a request, whatever C is.
    - `segment`: above 0 cuts the history into segments of so many behaviors, counted from its end
      (IMN's segmented hierarchical form, read as simply as possible). The walk above is made in
      every segment, with the same weights and the same m^0. A second walk, with as many passes,
      but attentions and a GRU of its own, goes over the memories that those ended with as if they
      were behaviors, from m^0 once more, and ends with m^P. Segments of padding alone are padding.

    Raises ConfigError when one segment holds the whole history.
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
        attention: Attention = "multiway",
        weights: Weights = "sigmoid",
        distance: bool = True,
        walk: Walk = "iterative",
        cross: Cross = "early",
        segment: int = 0,
    ) -> None:
        super().__init__()
        if segment >= spec.history_length:
            raise ConfigError(
                f"segment: one of {segment} holds all of history_length = {spec.history_length}, "
                "which leaves nothing to walk over"
            )

        def one_attention(history_length: int) -> nn.Module:
            n_ways = 2 if cross == "early" else 1
            match attention:
                case "multiway":
                    return MultiWayAttention(
                        embedding_dim,
                        attention_units,
                        history_length,
                        n_ways=n_ways,
                        distance=distance,
                        weights=weights,
                    )
                case "dot":
                    return DotAttention(history_length, n_ways=n_ways, weights=weights)
                case "none":
                    return EvenWeights(history_length)

        self.walk: Walk = walk
        self.segment = segment
        self.items = items
        self.history = HistoryEncoder(spec, embedding_dim)
        walked_length = segment or spec.history_length
        self.attentions = nn.ModuleList(one_attention(walked_length) for _ in range(iterations))
        self.memory = nn.GRUCell(embedding_dim, embedding_dim)
        self.transforms = nn.ModuleList(
            nn.Linear(embedding_dim, embedding_dim, bias=False) for _ in range(enhancement_steps)
        )
        self.enhancement = (
            nn.GRUCell(2 * embedding_dim, embedding_dim) if enhancement_steps else None
        )
        self.head = MLP(2 * embedding_dim, head_units)
        self.start = embedding_table(1, embedding_dim) if cross == "delayed" else None
        if segment:
            n_segments = math.ceil(spec.history_length / segment)
            self.segment_attentions = nn.ModuleList(
                one_attention(n_segments) for _ in range(iterations)
            )
            self.segment_memory = nn.GRUCell(embedding_dim, embedding_dim)

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return logits [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        return self._logits(history_items, history_buckets, candidate_items, heard=None)

    def explain(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits of `forward`, and the weight [B, C, P, L] of every behavior in each of
        the P passes: as they are computed with, not normalised over L, exactly 0 for padding.

        Raises ConfigError for a segmented model, whose passes are over segments.
        """
        if self.segment:
            raise ConfigError(
                f"model.segment = {self.segment}: passes over segments are not passes over a "
                "history"
            )
        heard: list[Tensor] = []
        logits_BC = self._logits(history_items, history_buckets, candidate_items, heard=heard)
        # One for all candidates where the target takes no part.
        shape = (*candidate_items.shape, history_items.shape[1])
        weights_BCPL = torch.stack([weights.expand(shape) for weights in heard], dim=2)
        return logits_BC, weights_BCPL * (history_items != PADDING_ROW)[:, None, None, :]

    def _logits(
        self,
        history_items: Tensor,
        history_buckets: Tensor,
        candidate_items: Tensor,
        *,
        heard: list[Tensor] | None,
    ) -> Tensor:
        """Return the logits [B, C]; `heard` gathers the weights of each pass, where it is given."""
        history_BLD = self.history(self.items, history_items, history_buckets)
        history_BEL = with_ones(history_BLD, history_items != PADDING_ROW)
        target_BCD: Tensor = self.items(candidate_items)
        target_XD = target_BCD.flatten(0, 1)  # X = B * C: recurrent steps take one batch axis
        if self.start is None:
            user_XD = self._user(history_BEL, history_BLD, target_BCD, target_BCD, heard)
        else:
            start_B1D = self.start.weight.expand(target_BCD.shape[0], 1, -1)
            user_BD = self._user(history_BEL, history_BLD, start_B1D, None, heard)
            user_XD = user_BD.unsqueeze(1).expand_as(target_BCD).flatten(0, 1)
        if self.enhancement is not None:
            user_of, target_of = _halves(target_XD)
            for transform in self.transforms:
                assert isinstance(transform, nn.Linear)
                transformed_of = torch.cat(
                    [transform.weight, torch.zeros_like(transform.weight)], dim=1
                )
                input_of = torch.cat([transformed_of, target_of])
                user_target_XF = torch.cat([user_XD, target_XD], dim=1)
                user_XD = gru_step(self.enhancement, user_target_XF, input_of, user_of, user_XD)
        logits_X: Tensor = self.head(torch.cat([user_XD, target_XD], dim=1))
        return logits_X.view_as(candidate_items)

    def _user(
        self,
        history_BEL: Tensor,
        history_BLD: Tensor,
        start_BCD: Tensor,
        target_BCD: Tensor | None,
        heard: list[Tensor] | None,
    ) -> Tensor:
        """Return m^P [B * C, D] of m^0 = `start_BCD`; without a target C is 1."""
        if not self.segment:
            return self._walk(
                self.attentions,
                self.memory,
                history_BEL,
                history_BLD,
                start_BCD,
                target_BCD,
                heard,
            )
        n_rows, n_candidates, width = start_BCD.shape
        segments_XMW = in_chunks(history_BEL.flatten(0, 1), self.segment)
        segments_BEMW = torch.unflatten(segments_XMW, 0, (n_rows, width + 1))
        segments_BMEW = segments_BEMW.transpose(1, 2)
        n_segments = segments_BMEW.shape[1]

        def of_each(x_BCD: Tensor) -> Tensor:
            return x_BCD.unsqueeze(1).expand(-1, n_segments, -1, -1).flatten(0, 1)

        segments_XEW = segments_BMEW.flatten(0, 1)
        memories_XD = self._walk(
            self.attentions,
            self.memory,
            segments_XEW,
            segments_XEW[:, :width].transpose(1, 2),
            of_each(start_BCD),
            None if target_BCD is None else of_each(target_BCD),
        )
        memories_BMCD = memories_XD.view(n_rows, n_segments, n_candidates, width)
        is_segment_BM = segments_BMEW[:, :, -1].amax(dim=2)
        # Exactly 0 where a segment is padding, as behaviors are: a walk over nothing moves, too.
        memories_BMCD = memories_BMCD * is_segment_BM[:, :, None, None]
        memories_XMD = memories_BMCD.transpose(1, 2).flatten(0, 1)
        is_segment_XM = is_segment_BM.unsqueeze(1).expand(-1, n_candidates, -1).flatten(0, 1)
        return self._walk(
            self.segment_attentions,
            self.segment_memory,
            with_ones(memories_XMD, is_segment_XM),
            memories_XMD,
            start_BCD.flatten(0, 1).unsqueeze(1),
            None if target_BCD is None else target_BCD.flatten(0, 1).unsqueeze(1),
        )

    def _walk(
        self,
        attentions: nn.ModuleList,
        memory: nn.GRUCell,
        history_BEL: Tensor,
        history_BLD: Tensor,
        start_BCD: Tensor,
        target_BCD: Tensor | None,
        heard: list[Tensor] | None = None,
    ) -> Tensor:
        """Return the last memory [B * C, D] of a walk from m^0 = `start_BCD`."""
        memory_XD = start_BCD.flatten(0, 1)
        read_of, memory_of = _halves(memory_XD)
        for attention in attentions:
            memory_BCD = memory_XD.view_as(start_BCD)
            if target_BCD is None:
                ways_BCD = [memory_BCD]
            else:
                ways_BCD = [target_BCD if self.walk == "target" else memory_BCD, target_BCD]
            weights_BCL = attention(history_BEL, *ways_BCD)
            if heard is not None:
                heard.append(weights_BCL)
            # Padding is exactly 0 in e, so it drops out of the sum whatever its weight is.
            read_BCD = weights_BCL @ history_BLD
            if isinstance(attention, EvenWeights):
                read_BCD = read_BCD.expand_as(memory_BCD)
            read_memory_XF = torch.cat([read_BCD.flatten(0, 1), memory_XD], dim=1)
            memory_XD = gru_step(memory, read_memory_XF, read_of, memory_of, memory_XD)
        return memory_XD


def _halves(like_XD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the maps [D, 2D] from two vectors side by side to the first and to the second."""
    identity_DD = torch.eye(like_XD.shape[1], device=like_XD.device).type_as(like_XD)
    nothing_DD = torch.zeros_like(identity_DD)
    return (
        torch.cat([identity_DD, nothing_DD], dim=1),
        torch.cat([nothing_DD, identity_DD], dim=1),
    )


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
