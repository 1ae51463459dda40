"""Which part of a log each of its rows belongs to: training, validation or test."""

import math
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from training.data.log import PreparedLog
from training.errors import TrainingError

SplitName = Literal["time", "leave-one-out"]
# Behind a user's test behavior: neither learned from nor a target of the ordinary metrics.
LATER = -1


class Part(IntEnum):
    """The parts of a split, as stored in its int8 arrays."""

    TRAIN = 0
    VALID = 1
    TEST = 2


@dataclass(frozen=True, kw_only=True)
class Split:
    """The part of every behavior and every impression, int8 (`Part`, or LATER: in none)."""

    behaviors: NDArray[np.int8]
    impressions: NDArray[np.int8]


def split_by_time(log: PreparedLog, *, test_fraction: float, valid_fraction: float) -> Split:
    """Split at two moments: the newest `test_fraction` of the rows are the test part (IMN: 0.2),
    the newest `valid_fraction` of the rest are the validation part.

    The rows are the impressions of a labelled log, the behaviors of any other. All rows of one
    second fall into one part; behaviors of a labelled log are split at the same two moments.
    """
    behavior_times = log.behaviors["time"]
    impression_times = log.impressions["time"]
    times = np.sort(impression_times if len(impression_times) else behavior_times)
    n_before_test = len(times) - _share(len(times), test_fraction)
    n_train = n_before_test - _share(n_before_test, valid_fraction)
    if not 0 < n_train < n_before_test < len(times):
        raise TrainingError(
            f"{len(times)} rows cannot be split with test_fraction={test_fraction} and "
            f"valid_fraction={valid_fraction}: a part would be empty"
        )
    boundaries = np.array([times[n_train], times[n_before_test]])
    if times[0] == boundaries[0] or boundaries[0] == boundaries[1]:
        raise TrainingError("the log has too few different times to be split by time")

    def parts(row_times: NDArray[np.uint32]) -> NDArray[np.int8]:
        return np.searchsorted(boundaries, row_times, side="right").astype(np.int8)

    return Split(behaviors=parts(behavior_times), impressions=parts(impression_times))


def leave_one_out(log: PreparedLog, holdout_steps: int = 1) -> Split:
    """Split off each user's last behavior as test and the last but one as validation.

    With more `holdout_steps`, the last so many behaviors are held out: the first of them is the
    test, the others are LATER, and validation is what comes right before them. Users with fewer
    than `holdout_steps` + 2 behaviors stay in the training part whole. Impressions have no part in
    this split: they all count as training.
    """
    parts = np.full(log.header.n_behaviors, Part.TRAIN, dtype=np.int8)
    lengths = np.diff(log.behavior_offsets)
    tests = log.behavior_offsets[1:][lengths >= holdout_steps + 2] - holdout_steps
    for step in range(1, holdout_steps):
        parts[tests + step] = LATER
    parts[tests] = Part.TEST
    parts[tests - 1] = Part.VALID
    return Split(
        behaviors=parts,
        impressions=np.full(log.header.n_impressions, Part.TRAIN, dtype=np.int8),
    )


def _share(n: int, fraction: float) -> int:
    """Return that fraction of n, rounded up; 0.2 of 10 is 2 although floats make it a bit more."""
    return math.ceil(n * fraction - 1e-9)
