"""Raw histories to model inputs."""

import struct

import numpy as np
import pytest

from contract.catalogue import Catalogue
from contract.encoding import encode, stack_candidates
from contract.features import AGE_SECONDS, HOURS, FeatureSpec, Granularity
from contract.records import encode_records
from tests.golden_rows import CATALOGUE, RANKING_TIME, ROWS, SPEC


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_golden_rows(row):
    inputs, corrupt = encode(
        [row.history], row.candidates[None], np.array([RANKING_TIME]), CATALOGUE, SPEC
    )
    assert inputs.history_items.tolist() == [row.history_items]
    assert inputs.history_buckets.tolist() == [row.history_buckets]
    assert inputs.candidate_items.tolist() == [row.candidate_items]
    assert not corrupt.any()


def test_a_batch_is_its_rows():
    """Whatever stands beside it, a request is encoded as if it were alone."""
    candidates = stack_candidates([row.candidates for row in ROWS])
    times = np.full(len(ROWS), RANKING_TIME)
    inputs, _ = encode([row.history for row in ROWS], candidates, times, CATALOGUE, SPEC)
    for b, row in enumerate(ROWS):
        assert inputs.history_items[b].tolist() == row.history_items
        assert inputs.history_buckets[b].tolist() == row.history_buckets
        width = len(row.candidate_items)
        assert inputs.candidate_items[b].tolist() == row.candidate_items + [0] * (3 - width)


def test_inputs_are_int64_and_contiguous():
    inputs, _ = encode(
        [ROWS[0].history], ROWS[0].candidates[None], np.array([RANKING_TIME]), CATALOGUE, SPEC
    )
    for name, array in inputs.as_feed().items():
        assert array.dtype == np.int64, name
        assert array.flags.c_contiguous, name


def test_a_shorter_length_keeps_the_newest():
    spec, catalogue = FeatureSpec(history_length=5), Catalogue(np.array([1, 2, 3]))
    raw = encode_records([1, 2, 3], [10, 20, 30])
    inputs, _ = encode([raw], np.array([[1]]), np.array([40]), catalogue, spec, length=2)
    assert inputs.history_items.tolist() == [[3, 4]]


@pytest.mark.parametrize("item", [0, -5], ids=["zero", "negative"])
def test_an_item_below_one_marks_its_row_alone_as_corrupt(item):
    broken = encode_records([1], [1]) + struct.pack("<qI", item, 2)
    whole = encode_records([1], [1])
    _, corrupt = encode(
        [whole, broken, b""], np.ones((3, 1), np.int64), np.full(3, 5), CATALOGUE, SPEC
    )
    assert corrupt.tolist() == [False, True, False]


def test_candidates_are_padded_on_the_right():
    stacked = stack_candidates([np.array([1, 2]), np.array([3])], width=3)
    assert stacked.tolist() == [[1, 2, 0], [3, 0, 0]]


class TestLinearScale:
    """Ages as they are, beside buckets."""

    SPEC = FeatureSpec(
        history_length=4,
        granularities=(
            AGE_SECONDS,
            HOURS,
            Granularity(name="minutes", unit_s=60, n_buckets=100, scale="linear"),
        ),
    )

    def buckets(self, times: list[int], now: int) -> list[list[int]]:
        raw = encode_records([1] * len(times), times)
        inputs, _ = encode([raw], np.array([[1]]), np.array([now]), CATALOGUE, self.SPEC)
        found: list[list[int]] = inputs.history_buckets[0].tolist()
        return found

    def test_tells_whole_units_up_to_the_last(self):
        now = 2**32 - 1
        assert self.buckets([0, now - 7_201, now - 59], now) == [
            [0, 0, 0],
            [now, 21, 99],
            [7_201, 2, 99],
            [59, 0, 0],
        ]

    def test_a_behavior_that_is_newer_than_now_was_just_done(self):
        assert self.buckets([50, 100], 70)[2:] == [[20, 0, 0], [0, 0, 0]]

    def test_differences_of_ages_are_those_of_times(self):
        times = [1_600_000_000, 1_600_000_001, 1_650_000_000]
        ages = [age for age, _, _ in self.buckets(times, 1_700_000_000)[1:]]
        assert np.diff(ages).tolist() == (-np.diff(times)).tolist()
