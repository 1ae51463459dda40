"""Histories of many users, gathered with vectorised slices of the memory-mapped log.

Shapes: B histories, L history length, G granularities.
"""

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import UNKNOWN_ROW, Catalogue
from contract.encoding import history_buckets
from contract.features import FeatureSpec
from contract.records import PADDING_ITEM
from training.data.log import PreparedLog


class HistoryGatherer:
    """Gathers slices of a log's behaviors as model inputs.

    `unknown_rate`: share of behaviors that are shown as the unknown item, so that its row is
    trained.
    """

    def __init__(
        self, log: PreparedLog, catalogue: Catalogue, spec: FeatureSpec, *, unknown_rate: float
    ) -> None:
        self._log = log
        self._catalogue = catalogue
        self._spec = spec
        self._unknown_rate = unknown_rate

    def gather(
        self,
        starts_B: NDArray[np.int64],
        ends_B: NDArray[np.int64],
        times_B: NDArray[np.int64],
        seed: np.uint64,
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return rows [B, L] and time buckets [B, L, G] of behaviors[start:end], right-aligned.

        The newest `history_length` are kept; L is the longest of what is left, at least 1.
        `times_B`: the ranking times, unix seconds. `seed` decides which behaviors are hidden.
        """
        longest = int((ends_B - starts_B).max()) if len(starts_B) else 0
        length = max(1, min(self._spec.history_length, longest))
        index_BL = ends_B[:, None] + np.arange(-length, 0)
        valid_BL = index_BL >= starts_B[:, None]
        if not len(self._log.behaviors):
            rows_BL = np.zeros(index_BL.shape, dtype=np.int64)
            return rows_BL, np.zeros((*rows_BL.shape, len(self._spec.granularities)), np.int64)
        records_BL = self._log.behaviors.take(index_BL, mode="clip")
        rows_BL = self._catalogue.rows(np.where(valid_BL, records_BL["item"], PADDING_ITEM))
        if self._unknown_rate:
            hidden_BL = _hash_uniform(index_BL, seed) < self._unknown_rate
            rows_BL[hidden_BL & valid_BL] = UNKNOWN_ROW
        buckets_BLG = history_buckets(records_BL["time"], valid_BL, times_B, self._spec)
        return rows_BL, buckets_BLG


def _hash_uniform(index: NDArray[np.int64], seed: np.uint64) -> NDArray[np.float64]:
    """Return a number in [0, 1) for each index: the same in every process that shares a batch."""
    bits = (index.astype(np.uint64) ^ seed) * np.uint64(0x9E3779B97F4A7C15)
    bits = (bits ^ (bits >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
