"""The prepared log: a history log with what training needs beside the histories.

impressions.bin           IMPRESSION records, user by user, each user's oldest first
impression_offsets.npy    int64 [users + 1]
probabilities.bin         float32, true click probability of each impression (synthetic logs)
items.npy                 int64 item ids, ascending
item_categories.npy       int32, category row of each item, 0 for none
"""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from contract.history_log import HistoryLog

# One row shown to a user: 13 bytes.
IMPRESSION = np.dtype([("item", "<i8"), ("time", "<u4"), ("label", "u1")])
IMPRESSIONS = "impressions.bin"
IMPRESSION_OFFSETS = "impression_offsets.npy"
PROBABILITIES = "probabilities.bin"
ITEMS = "items.npy"
ITEM_CATEGORIES = "item_categories.npy"


class PreparedLog(HistoryLog):
    """Memory-mapped arrays of a folder that `training.data.prepare` wrote."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.impressions: NDArray[np.void] = self._map(IMPRESSIONS, IMPRESSION)
        self.impression_offsets: NDArray[np.int64] = np.load(folder / IMPRESSION_OFFSETS)
        self.items: NDArray[np.int64] = np.load(folder / ITEMS)
        self.item_categories: NDArray[np.int32] = np.load(folder / ITEM_CATEGORIES)
        self.probabilities: NDArray[np.float32] | None = (
            self._map(PROBABILITIES, np.dtype(np.float32)).astype(np.float32, copy=False)
            if self.header.has_probabilities
            else None
        )

    def _map(self, name: str, dtype: np.dtype[np.generic]) -> NDArray[np.void]:
        if not self.header.n_impressions:
            return np.empty(0, dtype=dtype)
        return np.memmap(
            self.folder / name, dtype=dtype, mode="r", shape=(self.header.n_impressions,)
        )

    def behavior_users(self) -> NDArray[np.int32]:
        """Return the user index of every behavior, int32 [behaviors]."""
        return _repeat_users(self.behavior_offsets)

    def impression_users(self) -> NDArray[np.int32]:
        """Return the user index of every impression, int32 [impressions]."""
        return _repeat_users(self.impression_offsets)


def _repeat_users(offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))
