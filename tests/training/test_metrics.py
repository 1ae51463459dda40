"""Metrics against counting pairs, and against numbers that a reader can work out."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.metrics import (
    auc,
    brier_score,
    calibration_ratio,
    click_metrics,
    expected_calibration_error,
    grouped_auc,
    log_loss,
)

# (user, label, score): few users and few scores, so that ties are common.
SAMPLES = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 1), st.sampled_from([-2.5, 0.0, 0.25, 0.5, 7.0])),
    min_size=1,
    max_size=40,
)


def arrays(samples):
    users, labels, scores = zip(*samples, strict=True)
    return (
        np.array(users, dtype=np.int32),
        np.array(labels, dtype=np.float32),
        np.array(scores, dtype=np.float32),
    )


def counted_auc(samples) -> float:
    """Return the share of (positive, negative) pairs in the right order; a tie is half right."""
    pairs = list(
        product([s for _, y, s in samples if y], [s for _, y, s in samples if not y], repeat=1)
    )
    if not pairs:
        return math.nan
    return sum(1.0 if p > n else 0.5 if p == n else 0.0 for p, n in pairs) / len(pairs)


class TestAuc:
    @settings(deadline=None, max_examples=60)
    @given(samples=SAMPLES)
    def test_equals_counting_pairs(self, samples):
        _, labels, scores = arrays(samples)
        assert auc(labels, scores) == pytest.approx(counted_auc(samples), nan_ok=True)

    @settings(deadline=None, max_examples=60)
    @given(samples=SAMPLES)
    def test_grouped_equals_counting_pairs_within_each_user(self, samples):
        """Weighted with the users' sample counts, users of one class left out."""
        users, labels, scores = arrays(samples)
        groups = [[s for s in samples if s[0] == user] for user in range(4)]
        counted = [(len(group), counted_auc(group)) for group in groups]
        counted = [(n, value) for n, value in counted if not math.isnan(value)]
        n_samples = sum(n for n, _ in counted)
        expected = sum(n * value for n, value in counted) / n_samples if counted else math.nan
        assert grouped_auc(users, labels, scores) == pytest.approx(expected, nan_ok=True)

    @pytest.mark.parametrize(
        ("labels", "scores", "expected"),
        [
            pytest.param([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8], 0.75, id="one pair of four wrong"),
            pytest.param([0, 1], [0.2, 0.3], 1.0, id="right"),
            pytest.param([1, 0], [0.2, 0.3], 0.0, id="wrong"),
            pytest.param([0, 1, 1, 0], [0.5, 0.5, 0.5, 0.5], 0.5, id="all tied"),
            pytest.param([1, 0, 0], [0.5, 0.5, 0.1], 0.75, id="one tie"),
        ],
    )
    def test_by_hand(self, labels, scores, expected):
        assert auc(np.array(labels), np.array(scores)) == expected

    def test_a_user_counts_with_all_samples_a_user_of_one_class_with_none(self):
        """User 7: 1.0 of three samples; user 8: 0.5 of two; user 9 has only negatives."""
        users = np.array([8, 7, 9, 7, 8, 7, 9], dtype=np.int32)
        labels = np.array([0, 1, 0, 0, 1, 0, 0])
        scores = np.array([0.5, 0.9, 0.99, 0.1, 0.5, 0.2, 0.98])
        assert grouped_auc(users, labels, scores) == pytest.approx((3 * 1.0 + 2 * 0.5) / 5)

    @pytest.mark.parametrize("labels", [[1, 1], [0, 0], []], ids=["positives", "negatives", "none"])
    def test_is_nan_without_both_classes(self, labels):
        scores = np.linspace(0, 1, len(labels))
        assert math.isnan(auc(np.array(labels), scores))

    def test_grouped_is_nan_when_no_user_has_both_classes(self):
        labels, scores = np.array([1, 0]), np.array([0.1, 0.9])
        assert math.isnan(grouped_auc(np.array([1, 2], dtype=np.int32), labels, scores))

    def test_a_million_ties_do_not_lose_precision(self):
        labels = np.tile([0, 1], 500_000)
        assert auc(labels, np.full(1_000_000, 0.3, dtype=np.float32)) == 0.5

    def test_scores_of_a_diverged_model_have_no_auc(self):
        assert math.isnan(auc(np.array([0, 1]), np.array([np.nan, np.nan])))


class TestLogLoss:
    def test_by_hand(self):
        labels, probabilities = np.array([1, 0, 1]), np.array([0.8, 0.4, 0.5])
        expected = -(math.log(0.8) + math.log(0.6) + math.log(0.5)) / 3
        assert log_loss(labels, probabilities) == pytest.approx(expected)

    def test_half_is_the_logarithm_of_two(self):
        assert log_loss(np.array([0, 1]), np.array([0.5, 0.5])) == pytest.approx(math.log(2))

    def test_certain_and_wrong_is_large_but_finite(self):
        found = log_loss(np.array([1, 0]), np.array([0.0, 1.0], dtype=np.float32))
        assert found == pytest.approx(-math.log(1e-12))

    def test_certain_and_right_is_zero(self):
        assert log_loss(np.array([1, 0]), np.array([1.0, 0.0])) == 0


class TestBrierScore:
    def test_by_hand(self):
        labels, probabilities = np.array([1, 0, 1]), np.array([0.75, 0.5, 1.0])
        assert brier_score(labels, probabilities) == pytest.approx((0.0625 + 0.25 + 0) / 3)

    def test_certain_and_wrong_is_one(self):
        assert brier_score(np.array([1, 0]), np.array([0.0, 1.0], dtype=np.float32)) == 1


class TestCalibration:
    @pytest.mark.parametrize(
        ("probabilities", "expected"),
        [
            pytest.param([0.5, 0.5, 0.5, 0.5], 1.0, id="calibrated"),
            pytest.param([1.0, 1.0, 0.5, 0.5], 1.5, id="promises too much"),
            pytest.param([0.25, 0.25, 0.25, 0.25], 0.5, id="promises too little"),
        ],
    )
    def test_ratio_is_predicted_over_actual_clicks(self, probabilities, expected):
        assert calibration_ratio(np.array([1, 0, 1, 0]), np.array(probabilities)) == expected

    def test_ratio_is_nan_without_clicks(self):
        assert math.isnan(calibration_ratio(np.array([0, 0]), np.array([0.5, 0.5])))

    def perfect(self):
        """Return labels and probabilities of 20 bins; in bin k, k of 40 samples are clicks."""
        labels = np.concatenate([[1] * k + [0] * (40 - k) for k in range(20)])
        order = np.random.default_rng(1).permutation(len(labels))
        return labels[order], np.repeat(np.arange(20) / 40, 40)[order]

    def test_error_is_zero_when_each_bin_clicks_as_often_as_predicted(self):
        assert expected_calibration_error(*self.perfect()) == pytest.approx(0.0, abs=1e-12)

    def test_error_is_the_shift_of_probabilities_that_are_off_everywhere(self):
        labels, probabilities = self.perfect()
        assert expected_calibration_error(labels, probabilities + 0.125) == pytest.approx(0.125)

    def test_error_does_not_cancel_between_bins(self):
        """Half of the samples promise too much, half too little: the ratio alone looks right."""
        labels = np.tile([0, 1], 200)
        probabilities = np.repeat([0.25, 0.75], 200)
        assert calibration_ratio(labels, probabilities) == 1
        assert expected_calibration_error(labels, probabilities) == pytest.approx(0.25)

    def test_error_of_fewer_samples_than_bins(self):
        labels, probabilities = np.array([1, 0, 1]), np.array([0.75, 0.5, 1.0])
        assert expected_calibration_error(labels, probabilities) == pytest.approx(0.25)


class TestClickMetrics:
    USERS = np.array([1, 1, 2, 2], dtype=np.int32)
    LABELS = np.array([1, 0, 0, 1], dtype=np.float32)
    SCORES = np.array([0.9, 0.2, 0.3, 0.1], dtype=np.float32)

    def test_probabilities_have_every_metric(self):
        found = click_metrics(self.USERS, self.LABELS, self.SCORES, are_probabilities=True)
        assert found == {
            "auc": pytest.approx(0.5),
            "gauc": pytest.approx(0.5),
            "log_loss": pytest.approx(log_loss(self.LABELS, self.SCORES)),
            "brier_score": pytest.approx((0.1**2 + 0.2**2 + 0.3**2 + 0.9**2) / 4),
            "calibration_ratio": pytest.approx(0.75),
            "expected_calibration_error": pytest.approx((0.1 + 0.2 + 0.3 + 0.9) / 4),
        }

    def test_a_negative_that_stands_for_three_counts_as_three(self):
        """In what is measured of probabilities; ranks know no weights."""
        repeats = np.where(self.LABELS > 0, 1, 3)
        expected = click_metrics(
            np.repeat(self.USERS, repeats),
            np.repeat(self.LABELS, repeats),
            np.repeat(self.SCORES, repeats),
            are_probabilities=True,
        )
        found = click_metrics(
            self.USERS, self.LABELS, self.SCORES, are_probabilities=True, weights_N=repeats * 1.0
        )
        # Four samples are four bins, of which each holds one score; eight are eight of those.
        assert found == {name: pytest.approx(expected[name]) for name in found}

    def test_of_affinities_only_the_order_counts(self):
        found = click_metrics(self.USERS, self.LABELS, 100 * self.SCORES, are_probabilities=False)
        assert found == {"auc": pytest.approx(0.5), "gauc": pytest.approx(0.5)}
