"""PKM-ACT: experts of a product-key memory gather what a user is interested in, and send it back
to the behaviors (published as ELASTIC, arXiv 2408.09380); and a causal form of it.

Shapes: B requests, L history length, G time granularities, D width, H heads, E = D / H; M chunks of
a row, W positions of a chunk, Q of them that are asked for, X = B * M; K experts of a chunk. In the
form "last" a row is one chunk: M = 1, W = L.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from contract.catalogue import PADDING_ROW
from contract.features import AGE_SECONDS, MAX_ELAPSED_UNITS, FeatureSpec
from training.errors import ConfigError
from training.models.attention import FeedForward, MultiHeadAttention, attention_bias
from training.models.chunks import in_chunks, one_chunk_later
from training.models.encoder import (
    EMBEDDING_STD,
    HistoryEncoder,
    ItemEncoder,
    embedding_table,
)
from training.models.next_item import (
    AgeInput,
    NextItemModel,
    doubling_buckets,
    valid_positions,
)
from training.models.product_keys import ProductKeys

Form = Literal["last", "causal"]
# The bit lengths of all ages that a linear scale can tell.
TIME_BUCKETS = MAX_ELAPSED_UNITS.bit_length()
_SMALLEST_SUM = 1e-6


@dataclass(frozen=True)
class Chunks:
    """What stays the same from layer to layer.

    `valid`: bool [B, M, W], behaviors, not padding. `elapsed`: int64 [B, M, W, W], the bucket of
    the time from behavior j of a chunk to what follows behavior i, or None where it is not told.
    """

    valid: Tensor
    elapsed: Tensor | None = None


class PkmAct(NextItemModel):
    """In each layer, K experts that a user's history retrieves from N x N gather from it, and every
    behavior reads what they gathered. No behavior looks at all others, so cost grows with L; only
    tokens that the query network has merged, L / stride of them at most, look at each other.

    `form`: "last" is the paper's. The experts gather from the whole row, so that every position
    sees what comes after it, and only the last one can be trained. "causal" cuts the row in chunks
    of `chunk` positions, counted from its end. A position sees its own chunk up to itself by
    self-attention, and everything before the chunk through experts which those earlier chunks
    retrieved, and who gathered from them alone. So all positions of a row are trained at once.

    `stride`: tokens that a step of the query network merges (form "last"). `time_features`: tokens
    know when they were, in the form "last" by the doubling granularities of the spec; in the form
    "causal" by the time to what follows, told by the first linear one, which biases the
    self-attention, too.

    Ablations: without `query_network` a query is the mean of the behaviors; without `product_keys`
    all users share one learned set of K experts; without `dispatcher` every position gets the mean
    of the experts instead of asking them.
    """

    def __init__(
        self,
        items: ItemEncoder,
        spec: FeatureSpec,
        *,
        form: Form = "last",
        embedding_dim: int,
        n_layers: int,
        n_heads: int,
        ffn_units: int,
        dropout: float,
        keys_per_side: int,
        n_experts: int,
        stride: int = 4,
        chunk: int = 16,
        time_features: bool = True,
        query_network: bool = True,
        product_keys: bool = True,
        dispatcher: bool = True,
    ) -> None:
        super().__init__(items)
        self.causal = form == "causal"
        self.scale = embedding_dim**0.5
        self.tokens = (
            ChunkTokens(spec, embedding_dim, chunk, time_features=time_features)
            if self.causal
            else RowTokens(spec, embedding_dim, time_features=time_features)
        )
        self.dropout = nn.Dropout(dropout)

        def query() -> nn.Module:
            if not query_network:
                return MeanQuery(causal=self.causal)
            if self.causal:
                return ChunkQuery(embedding_dim, chunk, n_heads, dropout)
            return RowQuery(embedding_dim, spec.history_length, stride, n_heads, dropout)

        def experts() -> nn.Module:
            if not product_keys:
                return SharedExperts(n_experts, embedding_dim)
            keys = ProductKeys(
                embedding_dim,
                keys_per_side=keys_per_side,
                n_experts=n_experts,
                value_width=embedding_dim,
            )
            return RetrievedExperts(query(), keys)

        self.layers = nn.ModuleList(
            ActionLayer(
                embedding_dim,
                nearby=ChunkAttention(embedding_dim, chunk, n_heads, time_bias=time_features)
                if self.causal
                else None,
                experts=experts(),
                gathering=GatherFromEarlier(embedding_dim, n_heads)
                if self.causal
                else GatherFromRow(embedding_dim, n_heads),
                dispatch=Dispatch(embedding_dim, n_heads) if dispatcher else Broadcast(),
                ffn_units=ffn_units,
                dropout=dropout,
            )
            for _ in range(n_layers)
        )
        self.norm = nn.LayerNorm(embedding_dim)

    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D]."""
        del users
        x_BMWD = self._encode(history_items, history_buckets, last_only=False)
        return x_BMWD.flatten(1, 2)[:, -history_items.shape[1] :]

    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, D]."""
        del users
        return self._encode(history_items, history_buckets, last_only=True)[:, -1, -1]

    @torch.no_grad()
    def chosen_experts(self, history_items: Tensor, history_buckets: Tensor) -> Tensor:
        """Return the numbers of the experts that the last position is served by, int64
        [layers, B, K], each in 0 .. N * N - 1 of its layer's own: what key usage and expert load
        are counted from. For a model in evaluation mode.

        Raises ValueError for a model without product keys.
        """
        x_BMWD, chunks = self._tokens(history_items, history_buckets)
        chosen = []
        for layer in self.layers:
            assert isinstance(layer, ActionLayer)
            chosen.append(layer.chosen_experts(x_BMWD, chunks))
            x_BMWD = layer(x_BMWD, chunks)
        return torch.stack(chosen)

    def _encode(self, history_items: Tensor, history_buckets: Tensor, *, last_only: bool) -> Tensor:
        x_BMWD, chunks = self._tokens(history_items, history_buckets)
        for n, layer in enumerate(self.layers):
            x_BMWD = layer(x_BMWD, chunks, last_only=last_only and n == len(self.layers) - 1)
        vectors_BMWD: Tensor = self.norm(x_BMWD)
        return vectors_BMWD

    def _tokens(self, history_items: Tensor, history_buckets: Tensor) -> tuple[Tensor, Chunks]:
        x_BMWD, chunks = self.tokens(self.items, history_items, history_buckets)
        return self.dropout(x_BMWD * self.scale), chunks


class RowTokens(nn.Module):
    """Tokens of the form "last": item + position counted from the end + time buckets."""

    def __init__(self, spec: FeatureSpec, width: int, *, time_features: bool) -> None:
        super().__init__()
        if not time_features:
            # The encoder has no table for a linear scale: items and positions are left.
            spec = FeatureSpec(history_length=spec.history_length, granularities=(AGE_SECONDS,))
        elif all(one.scale == "linear" for one in spec.granularities):
            raise ConfigError(
                "features.granularities: time_features needs one with scale = 'doubling', "
                f"got {[one.name for one in spec.granularities]}"
            )
        self.history = HistoryEncoder(spec, width)

    def forward(
        self, items: ItemEncoder, history_items_BL: Tensor, history_buckets_BLG: Tensor
    ) -> tuple[Tensor, Chunks]:
        """Return tokens [B, 1, L, D], 0 for padding, of rows [B, L] and buckets [B, L, G]."""
        x_BLD = self.history(items, history_items_BL, history_buckets_BLG)
        return x_BLD.unsqueeze(1), Chunks(valid_positions(history_items_BL).unsqueeze(1))


class ChunkTokens(nn.Module):
    """Tokens of the form "causal": item + bucket of the time to what follows it."""

    def __init__(self, spec: FeatureSpec, width: int, chunk: int, *, time_features: bool) -> None:
        super().__init__()
        self.chunk = chunk
        self.ages = AgeInput.of(spec, "time_features of the causal form") if time_features else None
        self.waits = (
            embedding_table(TIME_BUCKETS, width, std=EMBEDDING_STD) if time_features else None
        )

    def forward(
        self, items: ItemEncoder, history_items_BL: Tensor, history_buckets_BLG: Tensor
    ) -> tuple[Tensor, Chunks]:
        """Return tokens [B, M, W, D], 0 for padding, of rows [B, L] and buckets [B, L, G]."""
        rows_BMW = in_chunks(history_items_BL, self.chunk)
        valid_BMW = rows_BMW != PADDING_ROW
        x_BMWD: Tensor = items(rows_BMW)
        if self.ages is None or self.waits is None:
            return x_BMWD, Chunks(valid_BMW)
        ages_BMW = in_chunks(self.ages.ages(history_buckets_BLG), self.chunk)
        next_BMW = in_chunks(self.ages.next_ages(history_buckets_BLG), self.chunk)
        waits_BMW = doubling_buckets((next_BMW - ages_BMW).abs(), TIME_BUCKETS)
        x_BMWD = (x_BMWD + self.waits(waits_BMW)) * valid_BMW.unsqueeze(3)
        elapsed_BMWW = (next_BMW.unsqueeze(3) - ages_BMW.unsqueeze(2)).abs()
        return x_BMWD, Chunks(valid_BMW, doubling_buckets(elapsed_BMWW, TIME_BUCKETS))


class ActionLayer(nn.Module):
    """X' = X + nearby(X) (form "causal" only); P' = P + gathering(P, X); X'' = dispatch(X', P') and
    a feed-forward, both with a residual.

    X is normalised before it is read (pre-norm). P is not: its length carries the retrieval's
    gradient (see `ProductKeys`).
    """

    def __init__(
        self,
        width: int,
        *,
        nearby: "ChunkAttention | None",
        experts: nn.Module,
        gathering: nn.Module,
        dispatch: nn.Module,
        ffn_units: int,
        dropout: float,
    ) -> None:
        super().__init__()
        # A table's vectors have a length of about 1: experts start at the scale of the tokens.
        self.scale = width**0.5
        self.norm = nn.LayerNorm(width)
        self.nearby = nearby
        self.experts = experts
        self.gathering = gathering
        self.dispatch = dispatch
        self.feed_forward_norm = nn.LayerNorm(width)
        self.feed_forward = FeedForward(width, ffn_units)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BMWD: Tensor, chunks: Chunks, *, last_only: bool = False) -> Tensor:
        """Return [B, M, W, D], or [B, 1, 1, D] of the last position alone."""
        memory_BMWD = self._memory(x_BMWD, chunks)
        experts_BMKD = self.experts(memory_BMWD, chunks.valid, last_only=last_only) * self.scale
        experts_BMKD = experts_BMKD + self.dropout(
            self.gathering(experts_BMKD, memory_BMWD, chunks.valid, last_only=last_only)
        )
        x_BMQD = x_BMWD[:, -1:, -1:] if last_only else x_BMWD
        if self.nearby is not None:
            x_BMQD = x_BMQD + self.dropout(self.nearby(memory_BMWD, chunks, last_only=last_only))
        x_BMQD = x_BMQD + self.dropout(self.dispatch(x_BMQD, experts_BMKD))
        fed_BMQD = self.feed_forward(self.feed_forward_norm(x_BMQD))
        out_BMQD: Tensor = x_BMQD + self.dropout(fed_BMQD)
        return out_BMQD

    def chosen_experts(self, x_BMWD: Tensor, chunks: Chunks) -> Tensor:
        """Return the numbers of the experts of the last chunk, int64 [B, K]."""
        if not isinstance(self.experts, RetrievedExperts):
            raise ValueError("a model without product keys chooses no experts")
        return self.experts.chosen(self._memory(x_BMWD, chunks), chunks.valid)

    def _memory(self, x_BMWD: Tensor, chunks: Chunks) -> Tensor:
        # Exactly 0 at padding: neither the norm's bias nor what padding read itself gets further.
        memory_BMWD: Tensor = self.norm(x_BMWD) * chunks.valid.unsqueeze(3)
        return memory_BMWD


class RetrievedExperts(nn.Module):
    """The experts that the query of each chunk retrieves."""

    def __init__(self, query: nn.Module, keys: ProductKeys) -> None:
        super().__init__()
        self.query = query
        self.keys = keys

    def forward(self, memory_BMWD: Tensor, valid_BMW: Tensor, *, last_only: bool) -> Tensor:
        """Return [B, M, K, D], or [B, 1, K, D] of the last chunk alone."""
        query_BMD = self.query(memory_BMWD, valid_BMW)
        if last_only:
            query_BMD = query_BMD[:, -1:]
        experts_XKD = self.keys(query_BMD.flatten(0, 1))
        return torch.unflatten(experts_XKD, 0, query_BMD.shape[:2])

    def chosen(self, memory_BMWD: Tensor, valid_BMW: Tensor) -> Tensor:
        """Return the numbers of the experts of the last chunk, int64 [B, K]."""
        _, experts_BK = self.keys.choose(self.query(memory_BMWD, valid_BMW)[:, -1])
        return experts_BK


class SharedExperts(nn.Module):
    """One learned set of experts for all users (the ablation of the product keys)."""

    def __init__(self, n_experts: int, width: int) -> None:
        super().__init__()
        self.values = embedding_table(n_experts, width)

    def forward(self, memory_BMWD: Tensor, valid_BMW: Tensor, *, last_only: bool) -> Tensor:
        """Return [B, M, K, D], or [B, 1, K, D] of the last chunk alone."""
        del valid_BMW
        n_rows, n_chunks, _, _ = memory_BMWD.shape
        return self.values.weight.expand(n_rows, 1 if last_only else n_chunks, -1, -1)


class Pooling(nn.Module):
    """Merges each group of `size` neighbours into one token; the merged then attend to each other.

    A group's tokens side by side, size * D, a linear map back to D, self-attention with a residual.
    A merged token is valid if any of its members is, and exactly 0 otherwise.
    """

    def __init__(
        self, width: int, size: int, n_heads: int, dropout: float, *, attends: bool = True
    ) -> None:
        super().__init__()
        self.merge = nn.Linear(size * width, width)
        self.norm = nn.LayerNorm(width) if attends else None
        self.attention = MultiHeadAttention(width, n_heads) if attends else None
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x_BMWD: Tensor, valid_BMW: Tensor, *, causal: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return merged tokens [B, M, D] and which of them are valid, bool [B, M].

        `x_BMWD`: groups of W = `size`, 0 at what is not valid.
        """
        valid_BM = valid_BMW.any(dim=2)
        merged_BMD = self.merge(x_BMWD.flatten(2))
        if self.norm is not None and self.attention is not None:
            memory_BMD = self.norm(merged_BMD)
            bias = attention_bias(valid_BM, causal=causal)
            merged_BMD = merged_BMD + self.dropout(self.attention(memory_BMD, memory_BMD, bias))
        return merged_BMD * valid_BM.unsqueeze(2), valid_BM


class RowQuery(nn.Module):
    """The hierarchical query network: poolings by `stride` until one token is left, the query."""

    def __init__(
        self, width: int, history_length: int, stride: int, n_heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.stride = stride
        n_steps, self.length = 0, 1
        while self.length < history_length:
            n_steps, self.length = n_steps + 1, self.length * stride
        # The last step's token has no other to attend to.
        self.steps = nn.ModuleList(
            Pooling(width, stride, n_heads, dropout, attends=step < n_steps - 1)
            for step in range(n_steps)
        )

    def forward(self, memory_B1LD: Tensor, valid_B1L: Tensor) -> Tensor:
        """Return the query [B, 1, D] of the one chunk that a row is."""
        # Padding on the left up to the full length, whatever L is: the end of a wider row has a
        # size that does not depend on L, which an exported graph needs.
        more = self.length - 1
        x_BWD = functional.pad(memory_B1LD.squeeze(1), (0, 0, more, 0))[:, -self.length :]
        valid_BW = functional.pad(valid_B1L.squeeze(1), (more, 0))[:, -self.length :]
        for step in self.steps:
            groups = (-1, self.stride)
            x_BWD, valid_BW = step(
                torch.unflatten(x_BWD, 1, groups), torch.unflatten(valid_BW, 1, groups)
            )
        return x_BWD


class ChunkQuery(nn.Module):
    """The query of a chunk: what the chunks before it, each pooled to one token, come to.

    The first chunk that has none before it asks with a learned vector.
    """

    def __init__(self, width: int, chunk: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.pooling = Pooling(width, chunk, n_heads, dropout)
        self.start = nn.Parameter(torch.zeros(width))

    def forward(self, memory_BMWD: Tensor, valid_BMW: Tensor) -> Tensor:
        """Return queries [B, M, D]."""
        pooled_BMD, valid_BM = self.pooling(memory_BMWD, valid_BMW, causal=True)
        has_earlier_BM1 = one_chunk_later(valid_BM).unsqueeze(2)
        return torch.where(has_earlier_BM1, one_chunk_later(pooled_BMD), self.start)


class MeanQuery(nn.Module):
    """The mean of a chunk's behaviors, or of all before the chunk (the query network's ablation).

    Nothing to average gives 0.
    """

    def __init__(self, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, memory_BMWD: Tensor, valid_BMW: Tensor) -> Tensor:
        """Return queries [B, M, D]."""
        sums_BMD, counts_BM = memory_BMWD.sum(dim=2), valid_BMW.sum(dim=2)
        if self.causal:
            sums_BMD = one_chunk_later(sums_BMD).cumsum(dim=1)
            counts_BM = one_chunk_later(counts_BM).cumsum(dim=1)
        return sums_BMD / counts_BM.clamp(min=1).unsqueeze(2)


class GatherFromRow(nn.Module):
    """Aggregation of the form "last": experts attend to the whole row."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, n_heads)

    def forward(
        self, experts_B1KD: Tensor, memory_B1LD: Tensor, valid_B1L: Tensor, *, last_only: bool
    ) -> Tensor:
        """Return what each expert gathered, [B, 1, K, D]."""
        del last_only  # every position needs all of it
        bias = attention_bias(valid_B1L.squeeze(1), causal=False, n_queries=1)
        gathered_BKD: Tensor = self.attention(experts_B1KD.squeeze(1), memory_B1LD.squeeze(1), bias)
        return gathered_BKD.unsqueeze(1)


class GatherFromEarlier(nn.Module):
    """Aggregation of the form "causal": experts attend to all chunks before their own.

    Kernel attention (Katharopoulos et al., "Transformers are RNNs", 2020), with
    phi = elu + 1:   sum_j phi(q) phi(k_j) v_j / sum_j phi(q) phi(k_j), 0 where there is no j.
    Both sums over j are running sums over chunks, whoever asks: linear in L.
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        if width % n_heads:
            raise ValueError(f"a width of {width} cannot be shared by {n_heads} heads")
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.output = nn.Linear(width, width)

    def forward(
        self, experts_BMKD: Tensor, memory_BMWD: Tensor, valid_BMW: Tensor, *, last_only: bool
    ) -> Tensor:
        """Return what each expert gathered, [B, M, K, D], or [B, 1, K, D] of the last chunk."""
        query_BMHKE = self._heads(_phi(self.query(experts_BMKD)))
        key_BMWD, value_BMWD = self.key_value(memory_BMWD).chunk(2, dim=3)
        key_BMHWE = self._heads(_phi(key_BMWD) * valid_BMW.unsqueeze(3))
        # A value of 1 beside the others sums up the keys alone: the denominator.
        value_BMHWF = functional.pad(self._heads(value_BMWD), (0, 1), value=1.0)
        earlier_BMHEF = one_chunk_later(key_BMHWE.transpose(3, 4) @ value_BMHWF)
        seen_BMHEF = (
            earlier_BMHEF.sum(dim=1, keepdim=True) if last_only else earlier_BMHEF.cumsum(dim=1)
        )
        sums_BMHKF = query_BMHKE @ seen_BMHEF
        met_BMHKE = sums_BMHKF[..., :-1] / sums_BMHKF[..., -1:].clamp(min=_SMALLEST_SUM)
        gathered_BMKD: Tensor = self.output(met_BMHKE.transpose(2, 3).flatten(3))
        return gathered_BMKD

    def _heads(self, x_BMWD: Tensor) -> Tensor:
        return torch.unflatten(x_BMWD, 3, (self.n_heads, -1)).transpose(2, 3)


class ChunkAttention(nn.Module):
    """Causal self-attention inside each chunk, biased by distance and by elapsed time.

    To the score of j for i are added, per head, a learned bias of i - j and, with `time_bias`, one
    of the bucket of |t_(i+1) - t_j|, as HSTU adds them: t_(i+1) is the time that is asked about.
    """

    def __init__(self, width: int, chunk: int, n_heads: int, *, time_bias: bool) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(width, n_heads)
        self.distance_bias = nn.Parameter(torch.zeros(n_heads, chunk))
        self.time_bias = nn.Parameter(torch.zeros(TIME_BUCKETS, n_heads)) if time_bias else None

    def forward(self, memory_BMWD: Tensor, chunks: Chunks, *, last_only: bool) -> Tensor:
        """Return [B, M, W, D], or [B, 1, 1, D] of the last position alone."""
        valid_BMW, elapsed_BMWW = chunks.valid, chunks.elapsed
        queries_BMQD = memory_BMWD
        if last_only:
            memory_BMWD, valid_BMW = memory_BMWD[:, -1:], valid_BMW[:, -1:]
            queries_BMQD = memory_BMWD[:, :, -1:]
            elapsed_BMWW = None if elapsed_BMWW is None else elapsed_BMWW[:, -1:, -1:]
        n_queries = queries_BMQD.shape[2]
        bias = attention_bias(valid_BMW.flatten(0, 1), causal=True, n_queries=n_queries)
        bias = bias + self._distance_bias(n_queries)
        if self.time_bias is not None and elapsed_BMWW is not None:
            by_time_XQWH = functional.embedding(elapsed_BMWW.flatten(0, 1), self.time_bias)
            bias = bias + by_time_XQWH.movedim(3, 1)
        met_XQD = self.attention(queries_BMQD.flatten(0, 1), memory_BMWD.flatten(0, 1), bias)
        return torch.unflatten(met_XQD, 0, queries_BMQD.shape[:2])

    def _distance_bias(self, n_queries: int) -> Tensor:
        """Return [H, Q, W]."""
        places_W = torch.arange(self.distance_bias.shape[1], device=self.distance_bias.device)
        distances_QW = (places_W[-n_queries:, None] - places_W).clamp(min=0)
        return self.distance_bias[:, distances_QW]


class Dispatch(nn.Module):
    """Every position asks the experts of its chunk."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, n_heads)

    def forward(self, x_BMQD: Tensor, experts_BMKD: Tensor) -> Tensor:
        """Return [B, M, Q, D]."""
        query_XQD = self.norm(x_BMQD).flatten(0, 1)
        told_XQD = self.attention(query_XQD, experts_BMKD.flatten(0, 1))
        return torch.unflatten(told_XQD, 0, x_BMQD.shape[:2])


class Broadcast(nn.Module):
    """Every position is told the same, the mean of the experts (the ablation of the dispatcher).

    The paper leaves open what predicts when nothing is sent back to the behaviors. The mean keeps
    layers, residuals and the last position's role as they are, and takes the asking away.
    """

    def forward(self, x_BMQD: Tensor, experts_BMKD: Tensor) -> Tensor:
        """Return [B, M, 1, D]."""
        del x_BMQD
        return experts_BMKD.mean(dim=2, keepdim=True)


def _phi(x: Tensor) -> Tensor:
    return functional.elu(x) + 1
