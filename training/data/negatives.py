"""Sampled negatives: items that a user had not met when something else was chosen."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.data.log import PreparedLog
from training.errors import TrainingError

NegativeSampling = Literal["uniform", "popularity"]
# With half of the catalogue in a user's past, one draw in 2^20 is left over after as many rounds.
_MAX_ROUNDS = 20


class NegativeSampler:
    """Draws items of `pool` that are not in a user's past at a moment, nor chosen at it.

    `pool`: int64 item ids. `weights`: their relative frequencies; None draws uniformly.
    """

    def __init__(
        self, log: PreparedLog, pool: NDArray[np.int64], weights: NDArray[np.int64] | None = None
    ) -> None:
        if not pool.size:
            raise TrainingError("negatives cannot be drawn from an empty catalogue")
        self._pool = pool
        self._cumulative: NDArray[np.int64] | None = None
        if weights is not None:
            # Items that nobody chose keep one share, so that every item can be drawn.
            self._cumulative = np.cumsum(np.maximum(weights, 1))
        self._index_pasts(log)

    def draw(
        self,
        users: NDArray[np.int32],
        times: NDArray[np.int64],
        n_negatives: int,
        rng: np.random.Generator,
    ) -> NDArray[np.int64]:
        """Return item ids [B, n_negatives] for B (user, moment) pairs.

        An entry is 0 where a user's past leaves nothing to draw: it is padding, not a sample.
        """
        items_BN = self._sample((len(users), n_negatives), rng)
        met_BN = self.met(users[:, None], times[:, None], items_BN)
        for _ in range(_MAX_ROUNDS):
            rows, columns = np.nonzero(met_BN)
            if not rows.size:
                return items_BN
            drawn = self._sample((len(rows),), rng)
            items_BN[rows, columns] = drawn
            met_BN[rows, columns] = self.met(users[rows], times[rows], drawn)
        # Only users who met nearly everything are left: choose among what they did not meet.
        for b in np.unique(np.nonzero(met_BN)[0]):
            never_met = self._pool[~self.met(users[b], times[b], self._pool)]
            n_missing = int(met_BN[b].sum())
            items_BN[b, met_BN[b]] = rng.choice(never_met, n_missing) if never_met.size else 0
        return items_BN

    def met(
        self,
        users: NDArray[np.int32] | np.int32,
        times: NDArray[np.int64] | np.int64,
        items: NDArray[np.int64],
    ) -> NDArray[np.bool_]:
        """Return whether each user had chosen the item at or before the time, broadcast."""
        users, times, items = np.broadcast_arrays(users, times, items)
        keys = self._key(users, np.searchsorted(self._items, items))
        position = np.minimum(np.searchsorted(self._met_keys, keys), len(self._met_keys) - 1)
        found: NDArray[np.bool_] = self._met_keys[position] == keys
        return found & (self._met_since[position] <= times)

    def _sample(self, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.int64]:
        if self._cumulative is None:
            return self._pool[rng.integers(len(self._pool), size=shape)]
        ticket = rng.integers(self._cumulative[-1], size=shape)
        return self._pool[np.searchsorted(self._cumulative, ticket, side="right")]

    def _index_pasts(self, log: PreparedLog) -> None:
        self._items = log.items
        keys = self._key(log.behavior_users(), np.searchsorted(log.items, log.behaviors["item"]))
        # Each user's behaviors are in time order, so the first of equal keys is the earliest.
        self._met_keys, first = np.unique(keys, return_index=True)
        self._met_since = log.behaviors["time"][first].astype(np.int64)

    def _key(self, users: NDArray[np.int32], rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return users.astype(np.int64) * (len(self._items) + 1) + rows
