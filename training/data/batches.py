"""Which rows share a batch: rows of about the same length, in random order."""

import numpy as np
from numpy.typing import NDArray

# Rows are sorted by length within windows of so many batches: a batch of short histories is then
# as narrow as its longest one, and batches still come in random order.
_WINDOW_BATCHES = 50


def length_sorted_batches(
    lengths: NDArray[np.int64], batch_size: int, rng: np.random.Generator | None
) -> list[NDArray[np.int64]]:
    """Return the indices of rows, `batch_size` a batch; in order of length when `rng` is None."""
    order = np.arange(len(lengths))
    if not len(order):
        return []
    if rng is None:
        # Full windows would only cost memory here: sorting all by length is cheapest.
        order = np.argsort(lengths, kind="stable")
        return np.array_split(order, range(batch_size, len(order), batch_size))
    order = rng.permutation(order)
    batches: list[NDArray[np.int64]] = []
    for start in range(0, len(order), batch_size * _WINDOW_BATCHES):
        window = order[start : start + batch_size * _WINDOW_BATCHES]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.array_split(window, range(batch_size, len(window), batch_size))
    return [batches[i] for i in rng.permutation(len(batches))]


def equal_length_batches(
    lengths: NDArray[np.int64], batch_size: int, rng: np.random.Generator | None
) -> list[NDArray[np.int64]]:
    """Return batches whose rows have one length, at most `batch_size` each: nothing is padded."""
    order = np.arange(len(lengths)) if rng is None else rng.permutation(len(lengths))
    order = order[np.argsort(lengths[order], kind="stable")]
    groups = np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else []
    batches = [
        batch
        for group in groups
        for batch in np.array_split(group, range(batch_size, len(group), batch_size))
    ]
    return batches if rng is None else [batches[i] for i in rng.permutation(len(batches))]
