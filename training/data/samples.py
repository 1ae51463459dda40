"""Click samples: moments of a user at which candidates were shown, with their labels.

A moment's history is what the user did strictly before it. Candidates that share a moment share
their history, so it is read, and encoded by a model, once for all of them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from training.data.log import PreparedLog
from training.data.splits import Part, Split


@dataclass(frozen=True, kw_only=True)
class Moments:
    """M moments with N candidates.

    `users` int32 [M]; `starts`, `ends` int64 [M]: the history is behaviors[starts:ends] of the
    log; `times` int64 [M] (unix seconds); `candidate_offsets` int64 [M + 1] into
    `candidate_items` int64 [N], `labels` uint8 [N] and `probabilities` float32 [N] (synthetic
    logs only).
    """

    users: NDArray[np.int32]
    starts: NDArray[np.int64]
    ends: NDArray[np.int64]
    times: NDArray[np.int64]
    candidate_offsets: NDArray[np.int64]
    candidate_items: NDArray[np.int64]
    labels: NDArray[np.uint8]
    probabilities: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.users)


def impression_moments(
    log: PreparedLog, split: Split, part: Part, *, max_candidates: int
) -> Moments:
    """Return the labelled impressions of one part, those of one user and second as one moment.

    A moment of more than `max_candidates` is cut into several with the same history.
    """
    chosen = np.flatnonzero(split.impressions == part)
    users = log.impression_users()[chosen]
    times = log.impressions["time"][chosen].astype(np.int64)
    first = np.flatnonzero(_starts_of_runs(users, times))
    position_in_run = np.arange(len(chosen)) - np.repeat(first, np.diff(first, append=len(chosen)))
    first = np.flatnonzero(position_in_run % max_candidates == 0)
    starts, ends = history_bounds(log, users[first], times[first])
    return Moments(
        users=users[first],
        starts=starts,
        ends=ends,
        times=times[first],
        candidate_offsets=np.append(first, len(chosen)).astype(np.int64),
        candidate_items=log.impressions["item"][chosen],
        labels=log.impressions["label"][chosen],
        probabilities=None if log.probabilities is None else log.probabilities[chosen],
    )


def behavior_moments(log: PreparedLog, split: Split, part: Part) -> Moments:
    """Return every behavior of one part as a moment with one positive candidate, to be completed
    by sampled negatives (`training.data.negatives`).
    """
    chosen = np.flatnonzero(split.behaviors == part)
    users = log.behavior_users()[chosen]
    times = log.behaviors["time"][chosen].astype(np.int64)
    starts, ends = history_bounds(log, users, times)
    return Moments(
        users=users,
        starts=starts,
        ends=ends,
        times=times,
        candidate_offsets=np.arange(len(chosen) + 1),
        candidate_items=log.behaviors["item"][chosen],
        labels=np.ones(len(chosen), dtype=np.uint8),
    )


def history_bounds(
    log: PreparedLog, users: NDArray[np.int32], times: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return start and end, within `log.behaviors`, of what users did strictly before times."""
    # One sorted key over all users turns M searches in M runs into one.
    keys = _keys(log.behavior_users(), log.behaviors["time"])
    ends = np.searchsorted(keys, _keys(users, times), side="left")
    return log.behavior_offsets[users], ends


def _keys(users: NDArray[np.int32], times: NDArray[np.generic]) -> NDArray[np.int64]:
    return (users.astype(np.int64) << 32) | times.astype(np.int64)


def _starts_of_runs(users: NDArray[np.int32], times: NDArray[np.int64]) -> NDArray[np.bool_]:
    starts = np.ones(len(users), dtype=np.bool_)
    starts[1:] = (users[1:] != users[:-1]) | (times[1:] != times[:-1])
    return starts
