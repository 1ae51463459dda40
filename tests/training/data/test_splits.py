"""Splits by time and by leaving one out: no row of a part is older than one of the part before."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.splits import LATER, Part, leave_one_out, split_by_time
from training.errors import TrainingError


def behaviors_at(make_log, times):
    n = len(times)
    return make_log({"user": [1] * n, "item": list(range(1, n + 1)), "timestamp": times})


class TestByTime:
    def test_fractions_by_hand(self, make_log):
        """Of ten rows the newest two are the test part; of the eight left, a quarter is valid."""
        log = behaviors_at(make_log, list(range(100, 110)))
        split = split_by_time(log, test_fraction=0.2, valid_fraction=0.25)
        assert split.behaviors.tolist() == [Part.TRAIN] * 6 + [Part.VALID] * 2 + [Part.TEST] * 2
        assert split.behaviors.dtype == np.int8
        assert split.impressions.tolist() == []

    def test_a_boundary_is_the_same_moment_for_every_user(self, make_log):
        log = make_log(
            {
                "user": [1, 1, 1, 1, 1, 2, 2, 2, 2, 2],
                "item": [1] * 10,
                "timestamp": [1, 2, 3, 9, 10, 4, 5, 6, 7, 8],
            }
        )
        split = split_by_time(log, test_fraction=0.2, valid_fraction=0.25)
        assert split.behaviors.tolist() == [0, 0, 0, 2, 2, 0, 0, 0, 1, 1]

    def test_rows_of_a_second_that_the_boundary_would_cut_are_all_newer(self, make_log):
        log = behaviors_at(make_log, [1, 2, 3, 4, 5, 6, 7, 8, 8, 9])
        split = split_by_time(log, test_fraction=0.2, valid_fraction=0.25)
        assert split.behaviors.tolist() == [0] * 6 + [1] + [2] * 3

    def test_a_labelled_log_is_split_by_its_impressions(self, make_log):
        """Four old behaviors without label do not move the boundaries of the five impressions."""
        log = make_log(
            {
                "user": [1] * 9,
                "item": list(range(1, 10)),
                "timestamp": [1, 2, 3, 4, 11, 12, 13, 14, 15],
                "label": [None] * 4 + [0, 1, 0, 1, 1],
            }
        )
        split = split_by_time(log, test_fraction=0.2, valid_fraction=0.25)
        assert split.impressions.tolist() == [0, 0, 0, 1, 2]
        assert split.behaviors.tolist() == [0, 0, 0, 0, 0, 1, 2]  # items 1-4, 6, 8, 9

    @settings(deadline=None, max_examples=30)
    @given(
        rows=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 3)), min_size=1, max_size=40),
        test_fraction=st.sampled_from([0.125, 0.25, 0.5]),
        valid_fraction=st.sampled_from([0.125, 0.25, 0.5]),
    )
    def test_parts_follow_each_other_in_whole_seconds(
        self, make_log, rows, test_fraction, valid_fraction
    ):
        """Or, exactly where one of them would be empty, an error."""
        times, users = zip(*rows, strict=True)
        n = len(rows)
        log = make_log({"user": users, "item": [1] * n, "timestamp": times})
        n_before_test = math.floor(n * (1 - test_fraction))
        test_from = sorted(times)[n_before_test]
        valid_from = sorted(times)[math.floor(n_before_test * (1 - valid_fraction))]
        if not min(times) < valid_from < test_from:
            with pytest.raises(
                TrainingError, match=r"cannot be split with|too few different times"
            ):
                split_by_time(log, test_fraction=test_fraction, valid_fraction=valid_fraction)
            return
        split = split_by_time(log, test_fraction=test_fraction, valid_fraction=valid_fraction)
        row_times = log.behaviors["time"]
        train, valid, test = (np.sort(row_times[split.behaviors == part]) for part in Part)
        assert train[-1] < valid[0] <= valid[-1] < test[0]
        assert (valid[0], test[0]) == (valid_from, test_from)
        # The test part has its share, and without its oldest second it would not.
        assert len(test) >= test_fraction * n > (test > test[0]).sum()

    @pytest.mark.parametrize(
        "times",
        [
            pytest.param([5] * 10, id="one time"),
            pytest.param([5] * 5 + [6] * 5, id="two times"),
            pytest.param([5] + [6] * 8 + [7], id="validation and test would start together"),
            pytest.param([5] * 9 + [6], id="training would be empty"),
        ],
    )
    def test_too_few_different_times(self, make_log, times):
        with pytest.raises(TrainingError, match="too few different times to be split by time"):
            split_by_time(behaviors_at(make_log, times), test_fraction=0.2, valid_fraction=0.25)

    @pytest.mark.parametrize("n_rows", [1, 2])
    def test_too_few_rows_name_the_fractions(self, make_log, n_rows):
        log = behaviors_at(make_log, list(range(n_rows)))
        with pytest.raises(
            TrainingError,
            match=rf"{n_rows} rows cannot be split with test_fraction=0\.2 and valid_fraction=0\.1",
        ):
            split_by_time(log, test_fraction=0.2, valid_fraction=0.1)


class TestLeaveOneOut:
    def test_by_hand(self, make_log):
        """The last behavior is test, the last but one validation; users 1 and 2 are too short."""
        log = make_log(
            {
                "user": [1, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4],
                "item": list(range(1, 12)),
                "timestamp": list(range(11)),
            }
        )
        split = leave_one_out(log)
        assert split.behaviors.tolist() == [0, 0, 0, *(0, 1, 2), *(0, 0, 0, 1, 2)]
        assert split.behaviors.dtype == np.int8

    def test_ties_are_broken_by_the_order_column(self, make_log):
        log = make_log(
            {
                "user": [1] * 4,
                "item": [10, 20, 30, 40],
                "timestamp": [7] * 4,
                "order": [4, 1, 3, 2],
            }
        )
        split = leave_one_out(log)
        items = log.behaviors["item"]
        assert items[split.behaviors == Part.TEST].tolist() == [10]
        assert items[split.behaviors == Part.VALID].tolist() == [30]

    def test_more_held_out_steps_by_hand(self, make_log):
        """Three are held out, the first is the test; user 2 has one behavior too few for that."""
        log = make_log(
            {
                "user": [1] * 6 + [2] * 4 + [3] * 5,
                "item": list(range(1, 16)),
                "timestamp": list(range(15)),
            }
        )
        split = leave_one_out(log, holdout_steps=3)
        assert split.behaviors.tolist() == [
            *(0, 0, Part.VALID, Part.TEST, LATER, LATER),
            *(0, 0, 0, 0),
            *(0, Part.VALID, Part.TEST, LATER, LATER),
        ]

    def test_one_held_out_step_is_the_split_without_steps(self, make_log):
        log = make_log({"user": [1, 1, 2, 2, 2], "item": [1] * 5, "timestamp": [1, 2, 3, 4, 5]})
        assert leave_one_out(log, 1).behaviors.tolist() == [0, 0, 0, 1, 2]
        assert leave_one_out(log).behaviors.tolist() == [0, 0, 0, 1, 2]

    def test_what_lies_behind_the_test_is_in_no_part(self, make_log):
        log = make_log({"user": [1] * 9, "item": [1] * 9, "timestamp": list(range(9))})
        split = leave_one_out(log, holdout_steps=4)
        assert [int((split.behaviors == part).sum()) for part in Part] == [4, 1, 1]

    def test_impressions_all_stay_in_training(self, make_log):
        log = make_log(
            {"user": [1] * 3, "item": [1, 2, 3], "timestamp": [1, 2, 3], "label": [1, 1, 1]}
        )
        split = leave_one_out(log)
        assert split.impressions.tolist() == [Part.TRAIN] * 3
        assert split.behaviors.tolist() == [Part.TRAIN, Part.VALID, Part.TEST]
