"""The rate search, on synthetic measurements whose threshold is known."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from loadtest.open_loop import LoadResult
from loadtest.rate_search import RateSearch, highest_rate


def result_at(rate: float, latency_s: float) -> LoadResult:
    one = np.zeros(1)
    return LoadResult(
        rate=rate,
        duration_s=1.0,
        arrivals_s=one,
        latencies_s=np.full(1, latency_s),
        send_delays_s=one,
        statuses={200: 1},
    )


def search(
    is_fast: Callable[[float], bool], low: float, high: float, precision: float = 0.05
) -> RateSearch:
    return highest_rate(
        lambda rate: result_at(rate, 0.01 if is_fast(rate) else math.inf),
        holds=lambda result: result.share_within(0.03) >= 0.99,
        low=low,
        high=high,
        precision=precision,
    )


def rates(found: RateSearch) -> list[float]:
    return [probe.rate for probe in found.probes]


@pytest.mark.parametrize("threshold", [100.0, 101.0, 730.0, 1599.0, 1600.0, 4999.0])
@pytest.mark.parametrize("precision", [0.01, 0.05, 0.5])
def test_the_threshold_is_found_within_the_precision(threshold, precision):
    found = search(lambda rate: rate <= threshold, low=100.0, high=5000.0, precision=precision)
    assert found.rate <= threshold < found.rate * (1 + precision)
    assert found.result is not None
    assert found.result.rate == found.rate
    assert found.rate == max(probe.rate for probe in found.probes if probe.held)


def test_rates_are_doubled_then_bisected_geometrically():
    found = search(lambda rate: rate <= 300.0, low=100.0, high=1000.0, precision=0.5)
    middle = math.sqrt(200.0 * 400.0)
    assert rates(found) == [100.0, 200.0, 400.0, 400.0, middle]
    assert [probe.held for probe in found.probes] == [True, True, False, False, True]
    assert found.rate == middle


def test_the_highest_rate_that_may_be_tried_ends_the_search():
    found = search(lambda _rate: True, low=100.0, high=500.0)
    assert rates(found) == [100.0, 200.0, 400.0, 500.0]
    assert found.rate == 500.0


def test_one_rate_can_be_all_that_is_asked():
    assert rates(search(lambda _rate: True, low=100.0, high=100.0)) == [100.0]


def test_a_single_noisy_failure_does_not_decide():
    """Every rate fails when it is tried first, and holds the second time below the threshold."""
    tried: set[float] = set()

    def is_fast(rate: float) -> bool:
        is_second = rate in tried
        tried.add(rate)
        return is_second and rate <= 730.0

    found = search(is_fast, low=100.0, high=5000.0)
    assert found.rate <= 730.0 < found.rate * 1.05
    assert all(rates(found).count(rate) == 2 for rate in rates(found))
    assert found.result is not None
    assert found.result.share_within(0.03) == 1.0, "the result is of the probe that held"


def test_a_low_that_fails_is_halved():
    found = search(lambda rate: rate <= 15.0, low=100.0, high=1000.0)
    assert rates(found)[:7] == [100.0, 100.0, 50.0, 50.0, 25.0, 25.0, 12.5]
    assert found.rate <= 15.0 < found.rate * 1.05


def test_where_nothing_holds_the_rate_is_zero():
    found = search(lambda _rate: False, low=64.0, high=1000.0)
    assert found.rate == 0.0
    assert found.result is None
    assert rates(found)[::2] == [64.0, 32.0, 16.0, 8.0, 4.0, 2.0, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "precision", "message"),
    [
        (0.0, 10.0, 0.05, "needs 0 < low <= high"),
        (20.0, 10.0, 0.05, "got low 20.0 and high 10.0"),
        (1.0, math.inf, 0.05, "both finite"),
        (1.0, 10.0, 0.0, "precision must be positive, got 0.0"),
    ],
)
def test_impossible_bounds_are_refused(low, high, precision, message):
    with pytest.raises(ValueError, match=message):
        search(lambda _rate: True, low=low, high=high, precision=precision)
