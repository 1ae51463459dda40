"""Welch's t-test against closed forms, tables and a case computed by hand."""

import math

import pytest

from training.comparison.significance import two_sided_p, welch_t_test


@pytest.mark.parametrize(
    ("t", "degrees", "p_value"),
    [
        pytest.param(0.0, 5.0, 1.0, id="no difference"),
        pytest.param(3.0, 1.0, 2 / math.pi * math.atan(1 / 3.0), id="one degree, closed form"),
        pytest.param(-2.5, 2.0, 1 - 2.5 / math.sqrt(2 + 2.5**2), id="two degrees, closed form"),
        pytest.param(2.228139, 10.0, 0.05, id="table, ten degrees"),
        pytest.param(3.182446, 3.0, 0.05, id="table, three degrees"),
        pytest.param(1.3, 1.5, 0.3580294, id="between degrees"),
        pytest.param(1.962339, 1000.0, 0.05, id="table, a thousand degrees"),
    ],
)
def test_p_is_the_probability_of_both_tails(t, degrees, p_value):
    assert two_sided_p(t, degrees) == pytest.approx(p_value, abs=2e-6)


def test_a_case_computed_by_hand():
    """Means 4 and 2; squared errors 1 / 3 and 4 / 3, so t = 2 / sqrt(5 / 3)."""
    test = welch_t_test([3.0, 4.0, 5.0], [0.0, 2.0, 4.0])
    assert test is not None
    assert test.t == pytest.approx(2 / math.sqrt(5 / 3))
    assert test.degrees == pytest.approx((5 / 3) ** 2 / ((1 / 9) / 2 + (16 / 9) / 2))
    assert test.p_value == two_sided_p(test.t, test.degrees)


def test_the_sign_tells_which_mean_is_larger():
    one, other = [0.1, 0.2], [0.4, 0.6]
    up, down = welch_t_test(other, one), welch_t_test(one, other)
    assert up is not None
    assert down is not None
    assert up.t == -down.t > 0
    assert up.p_value == down.p_value


def test_samples_that_do_not_vary_allow_no_test():
    assert welch_t_test([0.5, 0.5], [0.4, 0.4]) is None
