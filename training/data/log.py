"""The prepared log: a history log with what training needs beside the histories.

impressions.bin           IMPRESSION records, user by user, each user's oldest first
impression_offsets.npy    int64 [users + 1]
probabilities.bin         float32, true click probability of each impression (synthetic logs)
items.npy                 int64 item ids, ascending
item_categories.npy       int32, category row of each item, 0 for none
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from contract.errors import HistoryLogError
from contract.history_log import HistoryLog, map_file, read_offsets

# One row shown to a user: 13 bytes.
IMPRESSION = np.dtype([("item", "<i8"), ("time", "<u4"), ("label", "u1")])
IMPRESSIONS = "impressions.bin"
IMPRESSION_OFFSETS = "impression_offsets.npy"
PROBABILITIES = "probabilities.bin"
ITEMS = "items.npy"
ITEM_CATEGORIES = "item_categories.npy"
_PROBABILITY = np.dtype("<f4")


class PreparedLog(HistoryLog):
    """Memory-mapped arrays of a folder that `training.data.prepare` wrote.

    Raises HistoryLogError when a file is missing or does not fit the header.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        header = self.header
        self.impressions: NDArray[np.void] = map_file(
            folder / IMPRESSIONS, IMPRESSION, IMPRESSION.itemsize * header.n_impressions
        )
        self.impression_offsets = read_offsets(
            folder / IMPRESSION_OFFSETS, header.n_users, header.n_impressions
        )
        self.items = _vector(folder / ITEMS, np.dtype(np.int64), header.n_items)
        self.item_categories = _vector(folder / ITEM_CATEGORIES, np.dtype(np.int32), header.n_items)
        self.probabilities: NDArray[Any] | None = None
        if header.has_probabilities:
            size_bytes = _PROBABILITY.itemsize * header.n_impressions
            self.probabilities = map_file(folder / PROBABILITIES, _PROBABILITY, size_bytes)

    def behavior_users(self) -> NDArray[np.int32]:
        """Return the user index of every behavior, int32 [behaviors]."""
        return _repeat_users(self.behavior_offsets)

    def impression_users(self) -> NDArray[np.int32]:
        """Return the user index of every impression, int32 [impressions]."""
        return _repeat_users(self.impression_offsets)


def _repeat_users(offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    return np.repeat(np.arange(len(offsets) - 1, dtype=np.int32), np.diff(offsets))


def _vector(path: Path, dtype: np.dtype[np.generic], length: int) -> NDArray[Any]:
    try:
        vector: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise HistoryLogError(f"{path} is not readable: {error}") from error
    if vector.dtype != dtype or vector.shape != (length,):
        raise HistoryLogError(
            f"{path} holds {vector.dtype} {vector.shape}, expected {dtype} ({length},)"
        )
    return vector
