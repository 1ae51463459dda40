"""The prepared log: a history log with what training needs beside the histories.

impressions.bin           IMPRESSION records, user by user, each user's oldest first
impression_offsets.npy    int64 [users + 1]
probabilities.bin         float32, true click probability of each impression (synthetic logs)
items.npy                 int64 item ids, ascending
item_categories.npy       int32, category row of each item, 0 for none
item_features.npy         one int32 field for each further feature of items, with rows alike;
                          left out where there are none
"""

from collections.abc import Iterable
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
ITEM_FEATURES = "item_features.npy"
CATEGORY = "category"
FEATURE_NAME = r"^[a-z][a-z0-9_]*$"
_ROW = np.dtype("<i4")
_PROBABILITY = np.dtype("<f4")


class PreparedLog(HistoryLog):
    """Memory-mapped arrays of a folder that `training.data.prepare` wrote.

    `item_features`: by name, int32 [items], the row that each of `items` has in a feature's table,
    0 for none; among them "category" where the log has categories.

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
        categories = _vector(folder / ITEM_CATEGORIES, _ROW, header.n_items)
        self.item_features: dict[str, NDArray[np.int32]] = {}
        if header.has_categories:
            self.item_features[CATEGORY] = categories
        # Logs without further features have no such file, nor have those from before them.
        if (folder / ITEM_FEATURES).exists():
            self.item_features |= _fields(folder / ITEM_FEATURES, header.n_items)
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


def _fields(path: Path, length: int) -> dict[str, NDArray[np.int32]]:
    table = _load(path)
    names = table.dtype.names or ()
    expected = features_dtype(names)
    if table.dtype != expected or table.shape != (length,):
        raise HistoryLogError(
            f"{path} holds {table.dtype} {table.shape}, expected fields of {_ROW} ({length},)"
        )
    return {name: table[name] for name in names}


def features_dtype(names: Iterable[str]) -> np.dtype[np.void]:
    """Return the type of an entry of item_features.npy."""
    return np.dtype([(name, _ROW) for name in names])


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, EOFError, ValueError) as error:
        raise HistoryLogError(f"{path} is not readable: {error}") from error
    return array


def _vector(path: Path, dtype: np.dtype[np.generic], length: int) -> NDArray[Any]:
    vector = _load(path)
    if vector.dtype != dtype or vector.shape != (length,):
        raise HistoryLogError(
            f"{path} holds {vector.dtype} {vector.shape}, expected {dtype} ({length},)"
        )
    return vector
