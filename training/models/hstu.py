"""HSTU: pointwise attention with a bias of position and time, in place of softmax and feed-forward
(Zhai et al., "Actions Speak Louder than Words", 2024), in the form of the authors' research code.

Shapes: B requests, L history length (keys), Q queries (all L positions, or the last one alone),
D embedding width, H heads, E = D / H, G time granularities.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.features import FeatureSpec
from training.models.encoder import ItemEncoder, embedding_table
from training.models.next_item import AgeInput, NextItemModel, valid_positions

_NORM_EPS = 1e-6
_WEIGHT_STD = 0.02
# Each bucket of elapsed time is e^0.301 = 1.35 times as long as the one before.
_LOG_BUCKET = 0.301


@dataclass(frozen=True)
class Pairs:
    """How queries and keys stand to each other: `distances` int64 [Q, L], i - j, below 0 where the
    key comes after the query; `buckets` int64 [B, Q, L], of the time from behavior j to what
    follows i, or None where no layer asks for it.
    """

    distances: Tensor
    buckets: Tensor | None


class HSTU(NextItemModel):
    """u_i = l2(layers(sqrt(D) * item + position)_i) / temperature; score = <u_i, l2(item)>.

    `time_bias`: attention knows the time from each behavior to what follows the query; the spec
    must then tell ages on a linear scale (ConfigError when it does not). `position_bias`: it knows
    the distance i - j. The embedding of the place in the row counts back from its end.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        embedding_dim: int,
        n_layers: int,
        n_heads: int,
        dropout: float,
        temperature: float,
        time_bias: bool = True,
        position_bias: bool = True,
    ) -> None:
        super().__init__(items)
        self.scale = embedding_dim**0.5
        self.history_length = spec.history_length
        self.temperature = temperature
        self.age: AgeInput | None = None
        n_time_buckets = 0
        if time_bias:
            self.age = AgeInput.of(spec, "the time bias of HSTU")
            longest = torch.tensor(spec.granularities[self.age.index].n_buckets - 1)
            n_time_buckets = int(elapsed_buckets(longest)) + 1
        self.positions = embedding_table(spec.history_length, embedding_dim)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList(
            HSTULayer(
                embedding_dim,
                n_heads=n_heads,
                dropout=dropout,
                history_length=spec.history_length,
                n_time_buckets=n_time_buckets,
                position_bias=position_bias,
            )
            for _ in range(n_layers)
        )

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D]; 0 at padding."""
        del users
        x_BLD = self._embed(history_items)
        return self._user_vectors(self._through(self.layers, x_BLD, history_items, history_buckets))

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, D]; 0 for an empty history."""
        del users
        x_BLD = self._embed(history_items)
        *before, last = self.layers
        if before:
            x_BLD = self._through(before, x_BLD, history_items, history_buckets)
        x_B1D = last(x_BLD, self._pairs(history_buckets, last_only=True), last_only=True)
        return self._user_vectors((x_B1D * _real(history_items[:, -1:]))[:, 0])

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors [..., D] of rows [...], of length 1; padding stays 0."""
        return _l2(self.items(rows))

    def item_table(self) -> Tensor:
        """Return `item_vectors` of the whole catalogue, [rows, D]."""
        return _l2(self.items.table())

    def _embed(self, history_items_BL: Tensor) -> Tensor:
        length = history_items_BL.shape[1]
        places_L = torch.arange(length, device=history_items_BL.device)
        position_LD = self.positions(places_L + (self.history_length - length))
        x_BLD = self.items(history_items_BL) * self.scale + position_LD
        embedded: Tensor = self.dropout(x_BLD) * _real(history_items_BL)
        return embedded

    def _through(
        self,
        layers: Iterable[nn.Module],
        x_BLD: Tensor,
        history_items_BL: Tensor,
        history_buckets_BLG: Tensor,
    ) -> Tensor:
        pairs = self._pairs(history_buckets_BLG, last_only=False)
        real_BL1 = _real(history_items_BL)
        for layer in layers:
            # Layers have no bias before the attention: what is 0 here has a value of 0 as a key.
            x_BLD = layer(x_BLD, pairs) * real_BL1
        return x_BLD

    def _pairs(self, history_buckets_BLG: Tensor, *, last_only: bool) -> Pairs:
        places_L = torch.arange(history_buckets_BLG.shape[1], device=history_buckets_BLG.device)
        queries_Q = places_L[-1:] if last_only else places_L
        buckets_BQL = None
        if self.age is not None:
            next_ages_BL = self.age.next_ages(history_buckets_BLG)
            next_ages_BQ = next_ages_BL[:, -1:] if last_only else next_ages_BL
            ages_BL = self.age.ages(history_buckets_BLG)
            buckets_BQL = elapsed_buckets((ages_BL[:, None] - next_ages_BQ[:, :, None]).abs())
        return Pairs(queries_Q[:, None] - places_L, buckets_BQL)

    def _user_vectors(self, x: Tensor) -> Tensor:
        return _l2(x) / self.temperature


class HSTULayer(nn.Module):
    """y = W_o dropout(u * LN(A v)) + x, A_ij = SiLU(q_i k_j + rab_ij) / n for j <= i, else 0.

    u, v, q, k = SiLU(W LN(x)), without biases; both norms have no weights. n is the history length
    of the spec and one: a constant, so that padding changes nothing. rab is w[i - j], shared over
    heads, and a weight for the bucket of elapsed time, where `n_time_buckets` is not 0.
    """

    def __init__(
        self,
        width: int,
        *,
        n_heads: int,
        dropout: float,
        history_length: int,
        n_time_buckets: int,
        position_bias: bool,
    ) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"a width of {width} cannot be shared by {n_heads} heads")
        self.n_heads = n_heads
        # LN(A v / n) is LN(A v) with an eps n^2 times as large; so written, nothing gets so small
        # that fewer bits would lose it.
        self.read_eps = _NORM_EPS * (history_length + 1) ** 2
        # The paper's single matrix, in two: the last layer makes one query and L keys.
        self.gate_query = nn.Linear(width, 2 * width, bias=False)
        self.value_key = nn.Linear(width, 2 * width, bias=False)
        for linear in (self.gate_query, self.value_key):
            nn.init.normal_(linear.weight, std=_WEIGHT_STD)
        self.distance_bias: nn.Parameter | None = None
        self.time_bias: nn.Parameter | None = None
        if position_bias:
            self.distance_bias = nn.Parameter(torch.randn(history_length) * _WEIGHT_STD)
        if n_time_buckets:
            self.time_bias = nn.Parameter(torch.randn(n_time_buckets) * _WEIGHT_STD)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.output.weight)

    def forward(self, x_BLD: Tensor, pairs: Pairs, *, last_only: bool = False) -> Tensor:
        """Return [B, L, D], or [B, 1, D] of the last position alone; `pairs` has as many queries.

        Keys whose x is 0 contribute nothing.
        """
        normed_BLD = _norm(x_BLD)
        residual_BQD, query_BQD = x_BLD, normed_BLD
        if last_only:
            residual_BQD, query_BQD = x_BLD[:, -1:], normed_BLD[:, -1:]
        u_BQD, q_BQD = functional.silu(self.gate_query(query_BQD)).chunk(2, dim=-1)
        v_BLD, k_BLD = functional.silu(self.value_key(normed_BLD)).chunk(2, dim=-1)
        scores_BHQL = self._heads(q_BQD) @ self._heads(k_BLD).transpose(2, 3)
        scores_BHQL = self._biased(scores_BHQL, pairs)
        # SiLU(0) = 0, and padding has values of 0. Of what is as large as Q x L, the backward pass
        # keeps the scores, the weights and the masks.
        weights_BHQL = functional.silu(scores_BHQL.masked_fill(pairs.distances < 0, 0.0))
        read_BHQE = weights_BHQL @ self._heads(v_BLD)
        read_BQD = _norm(read_BHQE.transpose(1, 2).flatten(2), self.read_eps)
        y_BQD: Tensor = self.output(self.dropout(u_BQD * read_BQD)) + residual_BQD
        return y_BQD

    def _biased(self, scores_BHQL: Tensor, pairs: Pairs) -> Tensor:
        if self.time_bias is not None:
            assert pairs.buckets is not None
            scores_BHQL = scores_BHQL + _weights_at(pairs.buckets, self.time_bias).unsqueeze(1)
        if self.distance_bias is not None:
            distances_QL = pairs.distances.clamp(min=0)
            scores_BHQL = scores_BHQL + _weights_at(distances_QL, self.distance_bias)
        return scores_BHQL

    def _heads(self, x_BLD: Tensor) -> Tensor:
        return torch.unflatten(x_BLD, 2, (self.n_heads, -1)).transpose(1, 2)


def elapsed_buckets(elapsed: Tensor) -> Tensor:
    """Return floor(ln(max(1, elapsed)) / 0.301), int64, of whole elapsed units >= 0.

    The scale of the research code. In float64 every library gives the same: no whole number below
    2^32 is nearer to the edge of a bucket than 1e-10 of a bucket's width.
    """
    # Two traps of an exported graph: a Python number is cut to the bits of a float32, so the width
    # is a tensor; and onnxruntime clamps int64 from one side wrongly above 2^31.
    width = torch.tensor(_LOG_BUCKET, dtype=torch.float64)
    return (elapsed.double().clamp(min=1).log() / width).long()


def _weights_at(index: Tensor, weights: Tensor) -> Tensor:
    # An embedding of width 1 gives the same; its backward pass takes many times as long.
    return weights.index_select(0, index.flatten()).view_as(index)


def _real(history_items_BL: Tensor) -> Tensor:
    return valid_positions(history_items_BL).unsqueeze(-1)


def _norm(x: Tensor, eps: float = _NORM_EPS) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], eps=eps)


def _l2(x: Tensor) -> Tensor:
    return functional.normalize(x, dim=-1, eps=_NORM_EPS)
