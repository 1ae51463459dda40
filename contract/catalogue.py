"""The catalogue: the item ids that a model knows, each with its row in the embedding table.

Rows: 0 is padding, 1 the unknown item, 2.. the known ids in ascending order.
"""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contract.errors import ContractError
from contract.records import MIN_ITEM, PADDING_ITEM

PADDING_ROW = 0
UNKNOWN_ROW = 1
FIRST_ROW = 2

# A table of all numbers up to the largest id may have so many entries in any case, and so many for
# each item.
_SMALL_TABLE = 1 << 16
_SPARSEST = 16
# What an empty slot of the hash table holds: the row of padding, whose id asks for nothing else.
_EMPTY = PADDING_ROW

# 2^64 divided by the golden ratio: multiplying by it spreads consecutive ids over the top bits.
_FIBONACCI = np.uint64(0x9E3779B97F4A7C15)


class Catalogue:
    """Maps item ids to embedding rows.

    Ids that lie close together, as a shop's running numbers do, index a table directly. Others
    stand in an open-addressing hash table: a binary search over a large catalogue misses the cache
    at every step; the table needs one probe for most ids, and every probe is one vectorised pass
    over the ids not found so far.

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
        largest = int(ids_N[-1]) if ids_N.size else 0
        self._table: _DirectTable | _HashTable
        if largest < max(_SMALL_TABLE, _SPARSEST * ids_N.size):
            self._table = _DirectTable(ids_N, largest)
        else:
            self._table = _HashTable(ids_N)

    def __len__(self) -> int:
        return len(self.item_ids)

    @property
    def n_rows(self) -> int:
        """Rows of an embedding table for this catalogue: its items, padding and unknown."""
        return FIRST_ROW + len(self.item_ids)

    def rows(self, items: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the embedding row of each id, any shape: 0 for padding, 1 for unknown ids."""
        flat = np.ascontiguousarray(items).reshape(-1)
        return self._table.rows(flat).reshape(np.shape(items))


class _DirectTable:
    """The row of every number up to the largest id."""

    def __init__(self, item_ids: NDArray[np.int64], largest: int) -> None:
        # One entry more, for whatever lies beyond.
        self._table = np.full(largest + 2, UNKNOWN_ROW, dtype=np.int32)
        self._table[PADDING_ITEM] = PADDING_ROW
        self._table[item_ids] = np.arange(FIRST_ROW, FIRST_ROW + len(item_ids))
        self._beyond = np.uint64(largest + 1)

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each id."""
        # Without a sign, what is below 0 lies far beyond too.
        entries = np.minimum(ids.view(np.uint64), self._beyond).view(np.int64)
        return self._table[entries].astype(np.int64)


class _HashTable:
    """Open addressing with linear probing, at most an eighth full: few ids need a second probe."""

    def __init__(self, item_ids: NDArray[np.int64]) -> None:
        n_bits = max(4, (8 * len(item_ids)).bit_length())
        self._shift = np.uint64(64 - n_bits)
        self._mask = (1 << n_bits) - 1
        # Rows only: what is compared is the id of the row, so that a probe touches few bytes.
        self._table = np.full(1 << n_bits, _EMPTY, dtype=np.int32)
        self._id_of_row = np.concatenate([np.full(FIRST_ROW, PADDING_ITEM), item_ids])
        pending = np.arange(len(item_ids))
        slots = self._slots(item_ids)
        while pending.size:
            free = self._table[slots] == _EMPTY
            # Of several ids that claim one free slot, the last write stays; the others go on.
            self._table[slots[free]] = FIRST_ROW + pending[free]
            placed = self._table[slots] == FIRST_ROW + pending
            pending, slots = pending[~placed], (slots[~placed] + 1) & self._mask

    def rows(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the row of each id."""
        slots = self._slots(ids)
        rows = self._table[slots].astype(np.int64)
        # Most ids stand where they belong. Padding and unknown ids do not, nor does what sits
        # further down its probe sequence.
        elsewhere = np.flatnonzero(self._id_of_row[rows] != ids)
        if elsewhere.size:
            rows[elsewhere] = self._probe(ids[elsewhere], slots[elsewhere], rows[elsewhere])
        return rows

    def _probe(
        self, ids: NDArray[np.int64], slots: NDArray[np.int64], met: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """Return the rows of ids that are not at their first slot, where `met` was met."""
        rows = np.where(ids == PADDING_ITEM, PADDING_ROW, UNKNOWN_ROW).astype(np.int64)
        # An empty slot ends the search.
        pending = np.flatnonzero((met != _EMPTY) & (ids != PADDING_ITEM))
        while pending.size:
            slots[pending] = (slots[pending] + 1) & self._mask
            met = self._table[slots[pending]].astype(np.int64)
            found = self._id_of_row[met] == ids[pending]
            rows[pending[found]] = met[found]
            pending = pending[~found & (met != _EMPTY)]
        return rows

    def _slots(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return ((ids.view(np.uint64) * _FIBONACCI) >> self._shift).view(np.int64)
