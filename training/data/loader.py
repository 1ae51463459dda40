"""Batches of click samples, gathered with vectorised slices of the memory-mapped log.

Shapes: B moments, C candidates, L history length, G granularities.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import UNKNOWN_ROW, Catalogue
from contract.encoding import ModelInputs
from contract.features import FeatureSpec
from contract.records import PADDING_ITEM
from training.data.batches import length_sorted_batches
from training.data.histories import HistoryGatherer
from training.data.log import PreparedLog
from training.data.negatives import NegativeSampler
from training.data.samples import Moments


@dataclass(frozen=True, kw_only=True)
class ClickBatch:
    """One batch: model inputs, float32 `labels` [B, C] and the bool `mask` [B, C] of real samples.

    `users` int32 [B]. `probabilities` float32 [B, C] in synthetic logs. `n_samples`: samples of
    the whole batch, over all processes that share it. `weight`: all batches count alike.
    """

    inputs: ModelInputs
    labels: NDArray[np.float32]
    mask: NDArray[np.bool_]
    users: NDArray[np.int32]
    probabilities: NDArray[np.float32] | None
    n_samples: int
    weight: float = 1.0


class ClickLoader:
    """Gathers batches of `batch_size` of the `moments`.

    `negatives`: draws `n_negatives` items beside each moment's candidates. `unknown_rate`: share
    of behaviors and candidates that are shown to the model as the unknown item, so that its row
    is trained. Everything random depends on `seed`, epoch and batch number alone: a loader that
    starts in the middle of an epoch goes on exactly as one that was never stopped.
    """

    def __init__(
        self,
        log: PreparedLog,
        moments: Moments,
        catalogue: Catalogue,
        spec: FeatureSpec,
        *,
        batch_size: int,
        seed: int,
        negatives: NegativeSampler | None = None,
        n_negatives: int = 0,
        unknown_rate: float = 0.0,
    ) -> None:
        self._histories = HistoryGatherer(log, catalogue, spec, unknown_rate=unknown_rate)
        self.moments = moments
        self._catalogue = catalogue
        self._batch_size = batch_size
        self._seed = seed
        self._negatives = negatives
        self._n_negatives = n_negatives if negatives is not None else 0
        self._unknown_rate = unknown_rate

    @property
    def n_batches(self) -> int:
        """Batches in one epoch."""
        return -(-len(self.moments) // self._batch_size)

    @property
    def n_samples(self) -> int:
        """Samples in one epoch, sampled negatives included; fewer where there is none to draw."""
        return len(self.moments.labels) + len(self.moments) * self._n_negatives

    def epoch(
        self,
        epoch: int,
        *,
        shuffle: bool,
        first_batch: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[ClickBatch]:
        """Yield the batches of one epoch from `first_batch` on; of each, the rows of `rank`."""
        batches = self._batches(epoch, shuffle=shuffle)
        for number in range(first_batch, len(batches)):
            rng = np.random.default_rng([self._seed, epoch, number])
            yield self._gather(batches[number], rng, rank, world_size)

    def _batches(self, epoch: int, *, shuffle: bool) -> list[NDArray[np.int64]]:
        moments = self.moments
        rng = np.random.default_rng([self._seed, epoch]) if shuffle else None
        return length_sorted_batches(moments.ends - moments.starts, self._batch_size, rng)

    def _gather(
        self, chosen: NDArray[np.int64], rng: np.random.Generator, rank: int, world_size: int
    ) -> ClickBatch:
        items_BC, labels_BC, probabilities_BC = self._candidates(chosen, rng)
        n_samples = int((items_BC != PADDING_ITEM).sum())
        hidden_BC = rng.random(items_BC.shape) < self._unknown_rate
        behavior_seed = rng.integers(1 << 62, dtype=np.uint64)
        mine = slice(rank, None, world_size)
        if rank >= len(chosen):
            # Nothing is left for this process, but it must take part in the step: one row of
            # padding has no sample, no loss and no gradient.
            mine = slice(0, 1)
            items_BC = np.zeros_like(items_BC)
        chosen, items_BC, labels_BC = chosen[mine], items_BC[mine], labels_BC[mine]
        mask_BC = items_BC != PADDING_ITEM
        candidate_rows_BC = self._catalogue.rows(items_BC)
        candidate_rows_BC[hidden_BC[mine] & mask_BC] = UNKNOWN_ROW
        history_rows_BL, buckets_BLG = self._histories.gather(
            self.moments.starts[chosen],
            self.moments.ends[chosen],
            self.moments.times[chosen],
            behavior_seed,
        )
        return ClickBatch(
            inputs=ModelInputs(
                history_items=history_rows_BL,
                history_buckets=buckets_BLG,
                candidate_items=candidate_rows_BC,
            ),
            labels=labels_BC,
            mask=mask_BC,
            users=self.moments.users[chosen],
            probabilities=None if probabilities_BC is None else probabilities_BC[mine],
            n_samples=n_samples,
        )

    def _candidates(
        self, chosen: NDArray[np.int64], rng: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32] | None]:
        moments = self.moments
        first_B = moments.candidate_offsets[chosen]
        n_candidates_B = moments.candidate_offsets[chosen + 1] - first_B
        columns_C = np.arange(n_candidates_B.max())
        real_BC = columns_C < n_candidates_B[:, None]
        index_BC = np.where(real_BC, first_B[:, None] + columns_C, first_B[:, None])
        items_BC = np.where(real_BC, moments.candidate_items[index_BC], PADDING_ITEM)
        labels_BC = np.where(real_BC, moments.labels[index_BC], 0).astype(np.float32)
        if self._negatives is not None:
            drawn_BN = self._negatives.draw(
                moments.users[chosen], moments.times[chosen], self._n_negatives, rng
            )
            items_BC = np.concatenate([items_BC, drawn_BN], axis=1)
            labels_BC = np.pad(labels_BC, ((0, 0), (0, drawn_BN.shape[1])))
        probabilities_BC = (
            None if moments.probabilities is None else moments.probabilities[index_BC]
        )
        return items_BC, labels_BC, probabilities_BC
