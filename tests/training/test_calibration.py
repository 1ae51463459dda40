"""Calibrations against known distortions, literal re-derivations and the order of scores."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from training.calibration import (
    MAX_KNOTS,
    MAX_SLOPE,
    Calibration,
    fit,
    negative_sampling_rate,
    unchanged,
)
from training.errors import TrainingError
from training.metrics import (
    auc,
    brier_score,
    calibration_ratio,
    expected_calibration_error,
    log_loss,
)

Floats = NDArray[np.float32]
both_methods = pytest.mark.parametrize("method", ["platt", "isotonic"])


def sigmoid(logits: Any) -> Any:
    return np.exp(-np.logaddexp(0, -logits))


def clicks(logits_N: Any, seed: int = 2) -> Floats:
    """Draw labels whose true logits are these."""
    rng = np.random.default_rng(seed)
    drawn: Floats = (rng.random(len(logits_N)) < sigmoid(logits_N)).astype(np.float32)
    return drawn


def true_logits(n: int, seed: int = 1) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(-1.0, 1.5, n)


def applied(calibration: Calibration, logits_N: Any) -> Floats:
    logits: Floats = calibration(torch.from_numpy(np.float32(logits_N))).numpy()
    return logits


class TestPlatt:
    @pytest.mark.parametrize(
        ("slope", "offset"),
        [
            pytest.param(0.25, -0.5, id="promises too much"),
            pytest.param(4.0, 2.0, id="promises too little"),
            pytest.param(1.0, -3.0, id="shifted"),
            pytest.param(1.0, 0.0, id="calibrated"),
        ],
    )
    def test_recovers_a_logit_that_was_scaled_and_shifted(self, slope, offset):
        """Within four standard errors: the inverse of the Fisher information has their squares."""
        truth_N = true_logits(30_000)
        logits_N = (truth_N - offset) / slope
        found = fit("platt", clicks(truth_N), logits_N.astype(np.float32)).as_fields()
        variance_N = sigmoid(truth_N) * (1 - sigmoid(truth_N))
        design_N2 = np.stack([logits_N, np.ones_like(logits_N)], axis=1)
        covariance = np.linalg.inv(design_N2.T @ (variance_N[:, None] * design_N2))
        errors = 4 * np.sqrt(np.diag(covariance))
        assert found["knots"] == [0.0]
        assert found["slope"] == pytest.approx(slope, abs=errors[0])
        assert found["values"] == [pytest.approx(offset, abs=errors[1])]

    def test_is_where_the_smoothed_log_loss_is_flat(self):
        """The gradient, written literally, of ten samples: 4 clicks have target 5/6, 6 have 1/8."""
        labels = [0, 0, 1, 0, 0, 1, 0, 1, 0, 1]
        logits = [-3.0, -2.5, -2.0, -1.0, 0.0, 0.5, 1.0, 3.0, 3.5, 9.0]
        found = fit("platt", np.array(labels), np.array(logits)).as_fields()
        slope, (offset,) = found["slope"], found["values"]
        errors = [
            1 / (1 + math.exp(-(slope * x + offset))) - (5 / 6 if y else 1 / 8)
            for y, x in zip(labels, logits, strict=True)
        ]
        assert sum(errors) == pytest.approx(0, abs=1e-9)
        assert sum(e * x for e, x in zip(errors, logits, strict=True)) == pytest.approx(0, abs=1e-9)

    @pytest.mark.parametrize("scale", [0.1, 1e6])
    def test_of_scaled_logits_is_scaled(self, scale):
        truth_N = true_logits(500)
        one, other = (fit("platt", clicks(truth_N), k * truth_N).as_fields() for k in (1, scale))
        assert other["slope"] * scale == pytest.approx(one["slope"], rel=1e-6)
        assert other["values"] == pytest.approx(one["values"], rel=1e-6)

    def test_of_labels_that_a_logit_separates_is_finite(self):
        logits_N = np.linspace(-10, 10, 1000)
        found = fit("platt", np.repeat([0, 1], 500), logits_N)
        assert np.isfinite(applied(found, logits_N)).all()
        assert found.as_fields()["slope"] > 1


class TestIsotonic:
    def test_recovers_a_bent_logit_where_a_line_does_not(self):
        truth_N = true_logits(100_000)
        logits_N = np.cbrt(truth_N).astype(np.float32)
        labels_N = clicks(truth_N)
        errors = {
            method: np.abs(
                sigmoid(applied(fit(method, labels_N, logits_N), logits_N)) - sigmoid(truth_N)
            ).mean()
            for method in ("platt", "isotonic")
        }
        assert errors["isotonic"] < 0.01
        assert errors["platt"] > 3 * errors["isotonic"]

    @pytest.mark.parametrize("seed", range(5))
    def test_pools_as_the_min_max_formula_says(self, seed):
        """Of up to 64 logits, each is a bin; the rate of bin k is the largest, over all i <= k, of
        the smallest mean, over all j >= k, of bins i .. j (Barlow et al. 1972).
        """
        rng = np.random.default_rng(seed)
        logits = np.sort(rng.choice(np.arange(-30, 30), 40, replace=False) / 4)
        labels = clicks(logits / 3, seed)
        line = fit("platt", labels, logits).as_fields()
        rates = (labels + sigmoid(line["slope"] * logits + line["values"][0])) / 2
        n = len(rates)
        pooled = [
            max(min(rates[i : j + 1].mean() for j in range(k, n)) for i in range(k + 1))
            for k in range(n)
        ]
        values = sorted({round(float(rate), 9) for rate in pooled})
        knots = [logits[np.isclose(pooled, value, atol=1e-8)].mean() for value in values]
        assert 3 < len(values) < n

        found = fit("isotonic", labels, logits).as_fields()
        np.testing.assert_allclose(found["knots"], knots)
        np.testing.assert_allclose(sigmoid(np.array(found["values"])), values, atol=1e-7)
        assert found["slope"] == line["slope"]

    def test_is_linear_between_knots_and_beyond_them_has_the_slope_of_the_line(self):
        curve = Calibration("isotonic", slope=0.5, knots=[-1.0, 0.0, 2.0], values=[-4.0, 0.0, 1.0])
        logits = [-3.0, -1.0, -0.25, 0.0, 1.0, 2.0, 12.0]
        expected = [-5.0, -4.0, -1.0, 0.0, 0.5, 1.0, 6.0]
        np.testing.assert_allclose(applied(curve, logits), expected, rtol=1e-6)

    @settings(deadline=None, max_examples=60)
    @given(
        n=st.integers(2, 3000),
        spread=st.sampled_from([1e-4, 0.05, 1.0, 30.0, 1000.0]),
        step=st.sampled_from([0.0, 0.5]),
        sharpness=st.sampled_from([0.3, 1.0, 50.0]),
        seed=st.integers(0, 1000),
    )
    def test_whatever_the_samples_is_finite_increasing_and_not_too_steep(
        self, n, spread, step, sharpness, seed
    ):
        """Spread and step make clusters and ties; sharpness separates labels."""
        rng = np.random.default_rng(seed)
        logits = (rng.standard_t(2, n) * spread).astype(np.float32)
        logits = np.round(logits / step) * step if step else logits
        labels = clicks(sharpness * logits / spread, seed)
        try:
            curve = fit("isotonic", labels, logits)
        except TrainingError:
            return
        fields = curve.as_fields()
        knots, values = np.array(fields["knots"]), np.array(fields["values"])
        assert 1 <= len(knots) <= MAX_KNOTS
        assert np.isfinite([*knots, *values]).all()
        assert (np.diff(values) > 0).all()
        assert (np.diff(knots) >= 0.01).all()
        assert (np.diff(values) <= MAX_SLOPE * np.diff(knots) * (1 + 1e-9)).all()
        assert 0 < fields["slope"] <= MAX_SLOPE

    def test_of_few_samples_believes_no_rate_of_0_or_1(self):
        labels, logits = np.array([0, 0, 0, 1, 1, 1]), np.array([-3.0, -2, -1, 1, 2, 3])
        probabilities = sigmoid(applied(fit("isotonic", labels, logits), logits))
        assert probabilities.min() > 0.01
        assert probabilities.max() < 0.99


class TestRanking:
    @both_methods
    @pytest.mark.parametrize("seed", range(3))
    def test_stays(self, method, seed):
        """No two logits change places; ties are those that there were, to rounding."""
        truth = true_logits(5_000, seed)
        logits = (0.2 * truth + 0.1 * truth**3 + 1).astype(np.float32)
        labels = clicks(truth, seed)
        calibrated = applied(fit(method, labels, logits), logits)
        order = np.argsort(logits, kind="stable")
        assert (np.diff(calibrated[order]) >= 0).all()
        assert len(np.unique(calibrated)) > 0.99 * len(np.unique(logits))
        assert auc(labels, calibrated) == pytest.approx(auc(labels, logits), abs=1e-6)

    @both_methods
    def test_stays_far_outside_of_what_was_seen(self, method):
        truth = true_logits(1_000)
        found = applied(fit(method, clicks(truth), truth), [-90.0, -60.0, -30.0, 30.0, 60.0, 90.0])
        assert (np.diff(found) > 1).all()

    @both_methods
    def test_equal_logits_stay_equal(self, method):
        truth = np.repeat([-2.0, -1.0, 0.5, 2.0], 200)
        found = applied(fit(method, clicks(truth), truth), truth)
        assert len(np.unique(found)) == 4


class TestQuality:
    @both_methods
    @pytest.mark.parametrize(
        "distort",
        [
            pytest.param(lambda x: 3 * x + 1, id="overconfident"),
            pytest.param(lambda x: x / 3 - 1, id="timid"),
            pytest.param(lambda x: x + 0.1 * x**3 + 2, id="bent"),
        ],
    )
    def test_of_other_samples_is_better_in_every_metric(self, method, distort):
        valid, test = true_logits(20_000, 1), true_logits(20_000, 5)
        labels = clicks(test, 6)
        before = distort(test).astype(np.float32)
        found = fit(method, clicks(valid, 3), distort(valid).astype(np.float32))
        plain, calibrated = sigmoid(before), sigmoid(applied(found, before))
        for metric in (log_loss, brier_score, expected_calibration_error):
            assert metric(labels, calibrated) < metric(labels, plain), metric
        assert log_loss(labels, calibrated) == pytest.approx(
            log_loss(labels, sigmoid(test)), abs=0.01
        )
        assert calibration_ratio(labels, calibrated) == pytest.approx(1, abs=0.05)

    @both_methods
    def test_of_a_calibrated_model_is_about_the_same(self, method):
        valid, test = true_logits(20_000, 1), true_logits(20_000, 5)
        labels = clicks(test, 6)
        found = applied(fit(method, clicks(valid, 3), valid), test)
        assert log_loss(labels, sigmoid(found)) == pytest.approx(
            log_loss(labels, sigmoid(test)), abs=1e-3
        )


class TestSampledNegatives:
    def test_rate_is_what_was_kept_of_the_negatives_of_a_click(self):
        assert negative_sampling_rate(0.02, 7) == pytest.approx(7 / 49)
        assert negative_sampling_rate(0.5, 1) == 1

    @both_methods
    def test_the_shift_makes_probabilities_of_the_traffic(self, method):
        """A model that knows the samples to be 1 click in 4 promises as much too much."""
        rng = np.random.default_rng(8)
        truth = rng.normal(-4.0, 1.0, 200_000)
        labels = clicks(truth)
        is_click = labels > 0
        rate = negative_sampling_rate(is_click.mean(), 3)
        kept = is_click | (rng.random(len(truth)) < rate)
        assert labels[kept].mean() == pytest.approx(1 / 4, abs=0.01)
        sampled = fit(method, labels[kept], truth[kept])
        assert calibration_ratio(labels, sigmoid(applied(sampled, truth))) > 5
        found = applied(sampled.shifted(math.log(rate)), truth)
        assert calibration_ratio(labels, sigmoid(found)) == pytest.approx(1, abs=0.03)
        assert expected_calibration_error(labels, sigmoid(found)) < 0.002

    def test_alone_moves_every_logit_by_as_much(self):
        found = unchanged().shifted(-2.5)
        np.testing.assert_allclose(applied(found, [-3.0, 0.0, 40.0]), [-5.5, -2.5, 37.5])
        assert found.method == "none"


class TestRefused:
    @both_methods
    @pytest.mark.parametrize(
        ("labels", "logits", "reason"),
        [
            pytest.param([1, 1], [0.0, 1.0], "one label only", id="positives"),
            pytest.param([0, 0], [0.0, 1.0], "one label only", id="negatives"),
            pytest.param([0, 1], [2.0, 2.0], "all equal", id="equal"),
            pytest.param([0, 1], [2.0, math.nan], "not finite", id="not a number"),
            pytest.param([1, 1, 0, 0], [0.0, 1.0, 2.0, 3.0], "than at random", id="upside down"),
            pytest.param([0, 1] * 9, [0.0, 1e-3] * 9, "stretched by", id="nearly equal"),
        ],
    )
    def test_what_tells_nothing(self, method, labels, logits, reason):
        with pytest.raises(TrainingError, match=reason):
            fit(method, np.array(labels), np.array(logits))


def test_no_method_leaves_logits_as_they_are():
    """To the last bit, whatever the samples."""
    logits = true_logits(100).astype(np.float32)
    found = fit("none", np.ones(100), logits)
    assert np.array_equal(applied(found, logits), logits)


def test_any_shape_will_do():
    curve = Calibration("isotonic", slope=0.5, knots=[-1.0, 2.0], values=[-4.0, 1.0])
    logits = torch.linspace(-3, 3, 12)
    torch.testing.assert_close(curve(logits.view(3, 4)), curve(logits).view(3, 4))


@both_methods
def test_its_fields_make_it_again_to_the_last_bit(method):
    truth = true_logits(3_000)
    found = fit(method, clicks(truth), truth).shifted(-1.0)
    again = Calibration(**found.as_fields())
    assert again.method == method
    assert np.array_equal(applied(again, truth), applied(found, truth))
