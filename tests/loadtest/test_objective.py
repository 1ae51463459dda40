"""Verdicts on given results."""

import math
from dataclasses import replace

import numpy as np
import pytest

from loadtest.objective import FAIL, INVALID, PASS, Objective, RateError, judge
from tests.loadtest.given_results import SENDING, result_of


def test_a_result_that_keeps_the_objective_passes():
    verdict = judge(result_of([0.01] * 99 + [0.5]), Objective(max_errors=0.0), SENDING)
    assert verdict.code == PASS
    assert verdict.line == (
        "PASS p99 10 ms, 99 % within 30 ms, errors 0 %, 50.0 requests/s answered"
    )


def test_every_miss_is_named_with_its_number_and_its_limit():
    latencies_s = [0.01] * 90 + [0.0412] * 9 + [math.inf]
    verdict = judge(result_of(latencies_s), Objective(min_rate=1500.0), SENDING)
    assert verdict.code == FAIL
    assert verdict.line == (
        "FAIL: p99 41.2 ms > 30 ms; 90 % within 30 ms < 99 %; errors 1 % > 0.1 %; "
        "49.5 requests/s answered < 1,500.0"
    )


def test_a_p99_of_failed_requests_is_infinite():
    verdict = judge(result_of([0.01] * 90 + [math.inf] * 10), Objective(), SENDING)
    assert verdict.line.startswith("FAIL: p99 infinite > 30 ms;")


def test_an_objective_that_is_met_to_the_last_request_is_kept():
    """One of a thousand fails: 1 - 0.999 is more than 0.001 to a float."""
    latencies_s = [0.030] * 999 + [math.inf]
    assert judge(result_of(latencies_s), Objective(), SENDING).code == PASS


def test_a_generator_that_fell_behind_makes_a_run_invalid_whatever_it_measured():
    delays_s = np.array([0.0] * 98 + [0.0032] * 2)
    for latency_s in (0.01, 1.0):
        verdict = judge(result_of([latency_s] * 100, send_delays_s=delays_s), Objective(), SENDING)
        assert verdict.code == INVALID
        assert verdict.line.startswith(
            "INVALID: the generator fell behind: p99 of its delays 3.2 ms > 1 ms"
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_p99_s": 0.0}, "max_p99_s must be positive seconds, got 0"),
        ({"within_s": -1.0}, "within_s must be positive seconds, got -1"),
        ({"min_share_within": 99.0}, r"min_share_within must be a share within 0 \.\. 1, got 99"),
        ({"max_errors": -0.1}, r"max_errors must be a share within 0 \.\. 1, got -0.1"),
        ({"min_rate": math.inf}, "min_rate must be 0 or more requests/s, got inf"),
    ],
)
def test_impossible_objectives_are_refused(settings, message):
    with pytest.raises(RateError, match=message):
        Objective(**settings)


def test_the_sending_settings_reach_the_generator():
    with pytest.raises(ValueError, match=r"processes must be within 1 \.\. connections \(1\)"):
        replace(SENDING, processes=2).run([b"x"], np.zeros(1), 1.0)
