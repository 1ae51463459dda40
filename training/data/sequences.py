"""Batches for next-item models: rows of a user's history with the item after each position.

Shapes: B rows, L history length, G granularities.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from contract.catalogue import FIRST_ROW, PADDING_ROW, Catalogue
from contract.features import FeatureSpec
from training.data.batches import equal_length_batches, length_sorted_batches
from training.data.histories import HistoryGatherer
from training.data.log import PreparedLog
from training.data.splits import Part, Split

NO_TARGET = PADDING_ROW


@dataclass(frozen=True, kw_only=True)
class SequenceBatch:
    """One batch of rows.

    `history_items` int64 [B, L] (catalogue rows) and `history_buckets` int64 [B, L, G], measured
    back from the time of the row's last target; `targets` int64 [B, L]: the row of the item right
    after each position, NO_TARGET where there is none to learn from; `users` int64 [B], from 1.
    `n_samples`: targets of the whole batch, over all processes that share it; `weight`: that over
    the mean of all batches of the epoch. Rows of about the same length share a batch, so that
    batches differ in targets by an order of magnitude, and each target is to count alike.
    """

    history_items: NDArray[np.int64]
    history_buckets: NDArray[np.int64]
    targets: NDArray[np.int64]
    users: NDArray[np.int64]
    n_samples: int
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Rows:
    """M rows: behaviors[starts:ends] are read, behaviors[ends] is the last target."""

    users: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.users)


def training_rows(log: PreparedLog, split: Split, history_length: int, *, parts: bool) -> Rows:
    """Return one row a user: the newest `history_length` training behaviors before the last one.

    With `parts`, what is older makes further rows, so that every behavior is a target once.
    """
    starts, ends = _training_bounds(log, split)
    users = np.flatnonzero(ends - starts >= 2).astype(np.int32)
    starts, ends = starts[users], ends[users] - 1  # the last one is a target only
    if not parts:
        return Rows(users=users, starts=np.maximum(starts, ends - history_length), ends=ends)
    n_parts = -(-(ends - starts) // history_length)
    # The newest part is full; the oldest takes what is left.
    part = np.concatenate([np.arange(n) for n in n_parts]) if len(users) else np.zeros(0, np.int64)
    part_ends = np.repeat(ends, n_parts) - part * history_length
    return Rows(
        users=np.repeat(users, n_parts),
        starts=np.maximum(np.repeat(starts, n_parts), part_ends - history_length),
        ends=part_ends,
    )


def prefix_rows(
    log: PreparedLog,
    split: Split,
    history_length: int,
    *,
    per_user: int,
    rng: np.random.Generator,
) -> Rows:
    """Return prefixes of users' training behaviors, each with the item after it as its target.

    `per_user`: how many of a user's prefixes are drawn (those of users with fewer: all of them);
    0 takes every prefix.
    """
    starts, ends = _training_bounds(log, split)
    n_prefixes = np.maximum(ends - starts - 1, 0)
    users = np.repeat(np.arange(len(starts), dtype=np.int32), n_prefixes)
    first = np.repeat(np.cumsum(n_prefixes) - n_prefixes, n_prefixes)
    prefix_ends = starts[users] + 1 + (np.arange(len(users)) - first)
    if per_user:
        # The `per_user` smallest of random keys within each user.
        order = np.lexsort((rng.random(len(users)), users))
        chosen = np.sort(order[(np.arange(len(users)) - first) < per_user])
        users, prefix_ends = users[chosen], prefix_ends[chosen]
    return Rows(
        users=users,
        starts=np.maximum(starts[users], prefix_ends - history_length),
        ends=prefix_ends,
    )


def held_out_rows(log: PreparedLog, split: Split, part: Part, history_length: int) -> Rows:
    """Return one row for each behavior of a held-out part; all behaviors before it are read."""
    targets = np.flatnonzero(split.behaviors == part)
    users = log.behavior_users()[targets]
    starts = np.maximum(log.behavior_offsets[users], targets - history_length)
    return Rows(users=users, starts=starts, ends=targets)


class SequenceLoader:
    """Makes batches of `batch_size` rows.

    `per_user`: None yields `training_rows` with a target at every position; a number yields so many
    `prefix_rows` with the last target only, drawn anew each epoch. Everything random depends on
    `seed`, epoch and batch number alone, so that a loader that starts in the middle of an epoch
    goes on as one that was never stopped.
    """

    def __init__(
        self,
        log: PreparedLog,
        split: Split,
        catalogue: Catalogue,
        spec: FeatureSpec,
        *,
        batch_size: int,
        seed: int,
        per_user: int | None,
        parts: bool = False,
        same_length: bool = False,
        unknown_rate: float = 0.0,
    ) -> None:
        self._log, self._split, self._catalogue, self._spec = log, split, catalogue, spec
        self._histories = HistoryGatherer(log, catalogue, spec, unknown_rate=unknown_rate)
        self._batch_size, self._seed, self._per_user = batch_size, seed, per_user
        self._same_length = same_length
        self._rows: Rows | None = None
        if per_user is None:
            self._rows = training_rows(log, split, spec.history_length, parts=parts)

    def rows_of(self, epoch: int) -> Rows:
        """Return the rows of an epoch, in no order."""
        if self._rows is not None:
            return self._rows
        assert self._per_user is not None
        rng = np.random.default_rng([self._seed, epoch, 1 << 32])
        return prefix_rows(
            self._log, self._split, self._spec.history_length, per_user=self._per_user, rng=rng
        )

    def n_samples(self, epoch: int) -> int:
        """Return the number of targets of an epoch; some may be of items that are not learned."""
        return self._n_samples(self.rows_of(epoch))

    def epoch(
        self, epoch: int, *, first_batch: int = 0, rank: int = 0, world_size: int = 1
    ) -> Iterator[SequenceBatch]:
        """Yield the batches of one epoch from `first_batch` on; of each, the rows of `rank`."""
        rows = self.rows_of(epoch)
        rng = np.random.default_rng([self._seed, epoch])
        batched = equal_length_batches if self._same_length else length_sorted_batches
        batches = batched(rows.ends - rows.starts, self._batch_size, rng)
        mean_samples = self._n_samples(rows) / max(len(batches), 1)
        for number in range(first_batch, len(batches)):
            seed = np.random.default_rng([self._seed, epoch, number]).integers(
                1 << 62, dtype=np.uint64
            )
            batch = self._gather(rows, batches[number], seed, rank, world_size)
            yield replace(batch, weight=batch.n_samples / mean_samples)

    def _n_samples(self, rows: Rows) -> int:
        whole_rows = self._per_user is None
        return int((rows.ends - rows.starts).sum()) if whole_rows else len(rows)

    def _gather(
        self, rows: Rows, chosen: NDArray[np.int64], seed: np.uint64, rank: int, world_size: int
    ) -> SequenceBatch:
        targets_BL = self._targets(rows, chosen)
        n_samples = int((targets_BL != NO_TARGET).sum())
        mine = slice(rank, None, world_size)
        if rank >= len(chosen):
            # Nothing is left for this process, but it must take part in the step: a row without
            # a target has no loss and no gradient.
            mine = slice(0, 1)
            targets_BL = np.full_like(targets_BL, NO_TARGET)
        return _batch(
            self._log, self._histories, rows, chosen[mine], targets_BL[mine], n_samples, seed
        )

    def _targets(self, rows: Rows, chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        starts_B, ends_B = rows.starts[chosen], rows.ends[chosen]
        length = int((ends_B - starts_B).max())
        if self._per_user is not None:
            targets_BL = np.full((len(chosen), length), NO_TARGET, dtype=np.int64)
            targets_BL[:, -1] = self._catalogue.rows(self._items(ends_B))
        else:
            index_BL = ends_B[:, None] + np.arange(1 - length, 1)
            targets_BL = self._catalogue.rows(self._items(index_BL))
            targets_BL[index_BL <= starts_B[:, None]] = NO_TARGET
        targets_BL[targets_BL < FIRST_ROW] = NO_TARGET  # an unknown item is nothing to predict
        return targets_BL

    def _items(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        items = self._log.behaviors["item"].take(index, mode="clip")
        return np.ascontiguousarray(items, dtype=np.int64)


class HeldOutLoader:
    """Batches of a held-out part in order of length, the target in the last column."""

    def __init__(
        self,
        log: PreparedLog,
        split: Split,
        part: Part,
        catalogue: Catalogue,
        spec: FeatureSpec,
        *,
        batch_size: int,
    ) -> None:
        self._log, self._catalogue, self._batch_size = log, catalogue, batch_size
        self._histories = HistoryGatherer(log, catalogue, spec, unknown_rate=0.0)
        self.rows = held_out_rows(log, split, part, spec.history_length)
        items = log.behaviors["item"][self.rows.ends]
        self.targets = catalogue.rows(np.ascontiguousarray(items, dtype=np.int64))
        """The target's row of every row, int64; UNKNOWN_ROW where the catalogue has not got it."""

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self) -> Iterator[tuple[NDArray[np.int64], SequenceBatch]]:
        """Yield each batch with the indices of its rows."""
        rows = self.rows
        for chosen in length_sorted_batches(rows.ends - rows.starts, self._batch_size, None):
            longest = max(1, int((rows.ends - rows.starts)[chosen].max()))
            targets_BL = np.full((len(chosen), longest), NO_TARGET, dtype=np.int64)
            targets_BL[:, -1] = self.targets[chosen]
            yield (
                chosen,
                _batch(
                    self._log,
                    self._histories,
                    rows,
                    chosen,
                    targets_BL,
                    len(chosen),
                    np.uint64(0),
                ),
            )

    def past_rows(self, row: int) -> NDArray[np.int64]:
        """Return the rows of *all* that the user did before, however long ago."""
        user, end = self.rows.users[row], self.rows.ends[row]
        items = self._log.behaviors["item"][self._log.behavior_offsets[user] : end]
        return self._catalogue.rows(np.ascontiguousarray(items, dtype=np.int64))


def _batch(
    log: PreparedLog,
    histories: HistoryGatherer,
    rows: Rows,
    chosen: NDArray[np.int64],
    targets_BL: NDArray[np.int64],
    n_samples: int,
    seed: np.uint64,
) -> SequenceBatch:
    ends_B = rows.ends[chosen]
    times_B = log.behaviors["time"][ends_B].astype(np.int64)
    items_BL, buckets_BLG = histories.gather(rows.starts[chosen], ends_B, times_B, seed)
    return SequenceBatch(
        history_items=items_BL,
        history_buckets=buckets_BLG,
        targets=targets_BL[:, -items_BL.shape[1] :],
        users=rows.users[chosen].astype(np.int64) + 1,
        n_samples=n_samples,
    )


def _training_bounds(log: PreparedLog, split: Split) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    # Leave-one-out holds out each user's last behaviors, so what is left is one run a user.
    starts = log.behavior_offsets[:-1]
    n_train = np.bincount(
        log.behavior_users()[split.behaviors == Part.TRAIN], minlength=len(starts)
    )
    return starts, starts + n_train
