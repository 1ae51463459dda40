"""The catalogue: the item ids that a model knows, each with its row in the embedding table.

Rows: 0 is padding, 1 the unknown item, 2.. the known ids in ascending order.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contract.errors import ContractError
from contract.records import MIN_ITEM

PADDING_ROW = 0
UNKNOWN_ROW = 1
FIRST_ROW = 2

# 2^64 divided by the golden ratio: multiplying by it spreads consecutive ids over the top bits.
_FIBONACCI = np.uint64(0x9E3779B97F4A7C15)


class Catalogue:
    """Maps item ids to embedding rows with an open-addressing hash table.

    A binary search over a large catalogue misses the cache at every step; the table needs one
    probe for most ids, and every probe is one vectorised pass over the ids not found so far.

    `item_ids`: int64 [N], strictly ascending, at least 1. Raises ContractError otherwise.
    """

    def __init__(self, item_ids: ArrayLike) -> None:
        ids_N = np.ascontiguousarray(item_ids)
        if ids_N.ndim != 1 or ids_N.dtype != np.int64:
            raise ContractError(
                f"a catalogue is a vector of int64, got {ids_N.dtype} of shape {ids_N.shape}"
            )
        if ids_N.size and ids_N[0] < MIN_ITEM:
            raise ContractError(f"a catalogue holds item id {ids_N[0]}, expected at least 1")
        if (ids_N[1:] <= ids_N[:-1]).any():
            raise ContractError("a catalogue must hold each item id once, in ascending order")
        self.item_ids = ids_N
        self._build()

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def n_rows(self) -> int:
        """Rows of an embedding table for this catalogue: its items, padding and unknown."""
        return FIRST_ROW + len(self.item_ids)

    def rows(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the embedding row of each id, any shape: 0 for padding, 1 for unknown ids."""
        flat = np.ascontiguousarray(items).reshape(-1)
        slots = self._slots(flat)
        keys = self._keys[slots]
        found = keys == flat
        rows = np.where(found, self._rows[slots], UNKNOWN_ROW).astype(np.int64)
        # What is neither found nor at an empty slot may sit further down its probe sequence.
        pending = np.flatnonzero(~found & (keys != 0))
        slots = slots[pending]
        while pending.size:
            slots = (slots + 1) & self._mask
            keys = self._keys[slots]
            found = keys == flat[pending]
            rows[pending[found]] = self._rows[slots[found]]
            open_ = ~found & (keys != 0)
            pending, slots = pending[open_], slots[open_]
        rows[flat == 0] = PADDING_ROW
        return rows.reshape(np.shape(items))

    def _slots(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((ids.view(np.uint64) * _FIBONACCI) >> self._shift).view(np.int64)

    def _build(self) -> None:
        n_bits = max(4, (4 * len(self.item_ids)).bit_length())  # at most a quarter full
        self._shift = np.uint64(64 - n_bits)
        self._mask = (1 << n_bits) - 1
        self._keys = np.zeros(1 << n_bits, dtype=np.int64)
        self._rows = np.zeros(1 << n_bits, dtype=np.int32)
        pending = np.arange(len(self.item_ids))
        slots = self._slots(self.item_ids)
        while pending.size:
            free = self._keys[slots] == 0
            # Of several ids that claim one free slot, the last write stays; the others go on.
            self._keys[slots[free]] = self.item_ids[pending[free]]
            placed = self._keys[slots] == self.item_ids[pending]
            self._rows[slots[placed]] = FIRST_ROW + pending[placed]
            pending, slots = pending[~placed], (slots[~placed] + 1) & self._mask
