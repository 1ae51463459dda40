"""What all next-item models share: the history is read once, candidates meet it by dot product.

Shapes: B requests, C candidates, L history length, D embedding width, G time granularities.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from contract.catalogue import PADDING_ROW
from contract.features import FeatureSpec
from training.errors import ConfigError
from training.models.encoder import ItemEncoder

UNKNOWN_USER = 0
NO_TARGET = PADDING_ROW


class NextItemModel(nn.Module, ABC):
    """A model of the item that a user chooses next: score(v) = <u, v> + bias of v.

    `encode` gives one user vector for every position of the history, what was known right after
    that behavior. A model is `causal` when no vector depends on later behaviors: only such a model
    may be trained on all positions at once. The others are trained on the last position alone.
    """

    causal: bool = True
    """Whether `encode` at a position depends on nothing that comes after it."""
    target_share: float = 1.0
    """The share of a row's targets that `training_pairs` learns from."""

    def __init__(self, items: ItemEncoder) -> None:
        super().__init__()
        self.items = items

    @property
    def learns_whole_rows(self) -> bool:
        """Whether a row has a target at every position, not at the last one only."""
        return self.causal

    def training_pairs(
        self, history_items: Tensor, history_buckets: Tensor, targets: Tensor, users: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return N user vectors [N, D], the row of the item each is to find, int64 [N], and the
        row of the batch that each comes from, int64 [N].

        `targets`: int64 [B, L], the item after each position, 0 where there is nothing to learn.
        """
        if self.learns_whole_rows:
            vectors_BLD = self.encode(history_items, history_buckets, users)
            learned_BL = targets != NO_TARGET
            return vectors_BLD[learned_BL], targets[learned_BL], learned_BL.nonzero()[:, 0]
        last_B = targets[:, -1]
        learned_B = last_B != NO_TARGET
        vectors_BD = self.encode_last(history_items, history_buckets, users)
        return vectors_BD[learned_B], last_B[learned_B], learned_B.nonzero()[:, 0]

    @abstractmethod
    def encode(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return user vectors [B, L, D] of catalogue rows [B, L] and buckets [B, L, G].

        `users`: int64 [B], for models that have user embeddings; `UNKNOWN_USER` or None for users
        that training has not seen. Vectors at padding mean nothing, but are finite.
        """

    @abstractmethod
    def encode_last(
        self, history_items: Tensor, history_buckets: Tensor, users: Tensor | None = None
    ) -> Tensor:
        """Return `encode(...)[:, -1]`, [B, D], without what only other positions need.

        Finite for an empty history, too.
        """

    def item_vectors(self, rows: Tensor) -> Tensor:
        """Return the vectors [..., D] that rows [...] are met with as candidates."""
        vectors: Tensor = self.items(rows)
        return vectors

    def item_table(self) -> Tensor:
        """Return `item_vectors` of the whole catalogue, [rows, D]."""
        return self.items.table()

    def forward(
        self, history_items: Tensor, history_buckets: Tensor, candidate_items: Tensor
    ) -> Tensor:
        """Return affinities [B, C] of catalogue rows [B, L], buckets [B, L, G] and rows [B, C]."""
        user_BD = self.encode_last(history_items, history_buckets)
        return torch.matmul(self.item_vectors(candidate_items), user_BD.unsqueeze(-1)).squeeze(-1)


@dataclass(frozen=True)
class AgeInput:
    """Where `history_buckets` holds the age of each behavior, and in which unit.

    Ages are told on a linear scale; differences of two are what a model of time between behaviors
    looks at, and `history_buckets` of a doubling scale have lost them.
    """

    index: int

    @classmethod
    def of(cls, spec: FeatureSpec, needed_by: str) -> "AgeInput":
        """Return the first granularity on a linear scale; ConfigError when there is none."""
        for g, granularity in enumerate(spec.granularities):
            if granularity.scale == "linear":
                return cls(index=g)
        raise ConfigError(
            f"features.granularities: {needed_by} needs one with scale = 'linear', "
            f"got {[g.name for g in spec.granularities]}"
        )

    def ages(self, history_buckets_BLG: Tensor) -> Tensor:
        """Return the ages int64 [B, L] before the ranking time."""
        return history_buckets_BLG[:, :, self.index]

    def next_ages(self, history_buckets_BLG: Tensor) -> Tensor:
        """Return the age int64 [B, L] of what followed each behavior; after the last: 0, now.

        The time of a position's own target: known whenever scores are asked.
        """
        ages_BL = self.ages(history_buckets_BLG)
        return torch.cat([ages_BL[:, 1:], torch.zeros_like(ages_BL[:, :1])], dim=1)


def doubling_buckets(elapsed: Tensor, n_buckets: int) -> Tensor:
    """Return the buckets of whole elapsed units >= 0, as `contract.buckets.time_buckets` does.

    The bit length, by a logarithm: in float64, and with 3/4 added, no number below 2^40 is rounded
    across a power of two, neither by torch nor in an exported graph.
    """
    # Neither log2 nor a plain number: the exporter rounds both to float32.
    log_2 = torch.tensor(math.log(2), dtype=torch.float64)
    exponents = torch.floor(torch.log(elapsed.double() + 0.75) / log_2) + 1
    return exponents.clamp(0, n_buckets - 1).long()


def valid_positions(history_items_BL: Tensor) -> Tensor:
    """Return bool [B, L]: behaviors, not padding."""
    return history_items_BL != PADDING_ROW
