"""Counters and histograms that are written now and then.

Adding to a list costs a twentieth of adding to a metric that several processes share (a lock, a
search for the edge and two writes into mapped memory), and every request adds a dozen times.
"""

from collections.abc import Callable

import numpy as np
from prometheus_client import Counter, Histogram


class CounterTally:
    """A counter that counts what waits when it is told to."""

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._waiting: list[float] = []

    def inc(self, amount: float = 1) -> None:
        """Add an amount; from any thread."""
        self._waiting.append(amount)

    def flush(self) -> None:
        """Write what waits."""
        if taken := _take(self._waiting):
            self._counter.inc(sum(taken))


class HistogramTally:
    """A histogram that observes what waits when it is told to.

    `observe`: adds a value; from any thread.
    """

    def __init__(self, histogram: Histogram) -> None:
        self._histogram = histogram
        self._waiting: list[float] = []
        self.observe: Callable[[float], None] = self._waiting.append

    def flush(self) -> None:
        """Write what waits."""
        if not (taken := _take(self._waiting)):
            return
        # The library has no call for many values at once; this is what its `observe` does for one.
        edges, buckets = self._histogram._upper_bounds, self._histogram._buckets
        n_by_bucket = np.bincount(np.searchsorted(edges, taken), minlength=len(edges))
        for bucket in np.flatnonzero(n_by_bucket).tolist():
            buckets[bucket].inc(int(n_by_bucket[bucket]))
        self._histogram._sum.inc(sum(taken))


def _take(waiting: list[float]) -> list[float]:
    """Remove and return what is there; another thread may go on to append."""
    n = len(waiting)
    taken = waiting[:n]
    del waiting[:n]
    return taken
