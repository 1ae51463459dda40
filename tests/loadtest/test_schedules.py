"""Arrival times, against what their process promises."""

import math

import numpy as np
import pytest

from loadtest.schedules import Bursts, ScheduleError, Stage, draw_arrivals, parse_stages, steady


def stage(first: float, last: float, duration_s: float) -> Stage:
    return Stage(first_rate=first, last_rate=last, duration_s=duration_s)


# The notation.


def test_stages_are_read_in_order():
    assert parse_stages("100x10, 100-500x20,2000x0.5,0x5") == (
        stage(100, 100, 10),
        stage(100, 500, 20),
        stage(2000, 2000, 0.5),
        stage(0, 0, 5),
    )


def test_a_stage_is_written_as_it_is_read():
    text = "100x10,100-500x20,0.5x0.25"
    assert ",".join(map(str, parse_stages(text))) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "stage '' is not RATExSECONDS"),
        ("100x10,fast", "stage 'fast' is not RATExSECONDS"),
        ("100", "stage '100' is not"),
        ("-5x10", "stage '-5x10' is not"),
        ("1e3x5", "stage '1e3x5' is not"),
        ("100x0", "must last more than 0 seconds"),
    ],
)
def test_what_is_no_stage_is_refused_by_name(text, message):
    with pytest.raises(ScheduleError, match=message):
        parse_stages(text)


@pytest.mark.parametrize("rate", [-1.0, math.inf, math.nan])
def test_impossible_rates_are_refused(rate):
    with pytest.raises(ScheduleError, match="0 or more and finite"):
        stage(rate, 1.0, 1.0)


# Arrivals.


def test_constant_arrivals_are_evenly_spaced_from_zero():
    assert draw_arrivals(steady(10.0, 0.5), "constant", 1).tolist() == [0.0, 0.1, 0.2, 0.3, 0.4]


def test_constant_arrivals_follow_a_ramp():
    """From 0 to 100/s in 2 s: the k-th comes where 25 t^2 = k."""
    arrivals_s = draw_arrivals((stage(0, 100, 2),), "constant", 1)
    assert len(arrivals_s) == 100
    assert arrivals_s == pytest.approx(np.sqrt(np.arange(100) / 25))


def test_constant_arrivals_follow_a_ramp_down():
    """From 100/s to 0 in 2 s: the same, seen from its end."""
    arrivals_s = draw_arrivals((stage(100, 0, 2),), "constant", 1)
    assert 2 - arrivals_s == pytest.approx(np.sqrt((100 - np.arange(100)) / 25))


def test_each_stage_has_its_own_arrivals_and_a_pause_none():
    arrivals_s = draw_arrivals(parse_stages("10x1,0x1,20x1,10-30x2"), "constant", 1)
    counts, _ = np.histogram(arrivals_s, [0, 1, 2, 3, 5])
    assert counts.tolist() == [10, 0, 20, 40]
    assert (np.diff(arrivals_s) >= 0).all()


def test_poisson_arrivals_have_exponential_gaps_and_end_with_the_duration():
    arrivals_s = draw_arrivals(steady(1000.0, 20.0), "poisson", 1)
    gaps_s = np.diff(arrivals_s)
    assert len(arrivals_s) == pytest.approx(20_000, abs=5 * math.sqrt(20_000))
    assert arrivals_s[0] > 0
    assert 19.9 < arrivals_s[-1] < 20.0
    assert gaps_s.min() >= 0
    assert gaps_s.std() == pytest.approx(gaps_s.mean(), rel=0.05)
    assert np.mean(gaps_s > gaps_s.mean()) == pytest.approx(math.exp(-1), abs=0.02)


def test_poisson_arrivals_follow_a_ramp():
    """From 0 to 2,000/s: a quarter of all arrivals falls into the first half."""
    arrivals_s = draw_arrivals((stage(0, 2000, 20),), "poisson", 1)
    assert np.mean(arrivals_s < 10) == pytest.approx(0.25, abs=0.02)
    assert len(arrivals_s) == pytest.approx(20_000, abs=5 * math.sqrt(20_000))


@pytest.mark.parametrize("arrivals", ["poisson", "bursty"])
def test_arrivals_follow_the_seed(arrivals):
    first, again, other = (draw_arrivals(steady(100.0, 1.0), arrivals, s) for s in (1, 1, 2))
    assert first.tolist() == again.tolist()
    assert first[:10].tolist() != other[:10].tolist()


@pytest.mark.parametrize("seed", range(5))
def test_bursty_arrivals_keep_the_stated_mean(seed):
    arrivals_s = draw_arrivals(steady(1000.0, 20.0), "bursty", seed)
    assert len(arrivals_s) == pytest.approx(20_000, abs=5 * math.sqrt(20_000))
    assert (np.diff(arrivals_s) >= 0).all()
    assert 0 <= arrivals_s[0] <= arrivals_s[-1] <= 20.0


def test_bursty_arrivals_swing_as_the_process_does():
    """Counts of windows much shorter than a burst: their variance over their mean is 1 for Poisson
    arrivals, and m (E[r^2] - 1) more for a rate that swings, where m is the mean count.
    """
    bursts = Bursts(factor=5.0, share=0.1, length_s=0.5)
    width_s, rate, duration_s = 0.01, 1000.0, 1000.0
    arrivals_s = draw_arrivals(steady(rate, duration_s), "bursty", 1, bursts)
    counts, _ = np.histogram(arrivals_s, np.arange(0, duration_s + width_s / 2, width_s))
    squares = bursts.share * bursts.factor**2 + (1 - bursts.share) * bursts.calm_factor**2
    expected = 1 + rate * width_s * (squares - 1)
    assert counts.var() / counts.mean() == pytest.approx(expected, rel=0.1)
    poisson_s = draw_arrivals(steady(rate, duration_s), "poisson", 1)
    counts, _ = np.histogram(poisson_s, np.arange(0, duration_s + width_s / 2, width_s))
    assert counts.var() / counts.mean() == pytest.approx(1.0, rel=0.05)


def test_bursts_and_calm_average_to_the_stated_rate():
    bursts = Bursts(factor=4.0, share=0.2, length_s=0.5)
    assert bursts.share * bursts.factor + (1 - bursts.share) * bursts.calm_factor == 1.0
    assert bursts.length_s / (bursts.length_s + bursts.calm_length_s) == pytest.approx(0.2)


def test_bursty_arrivals_keep_pauses_and_ramps():
    arrivals_s = draw_arrivals(parse_stages("0x5,0-1000x5"), "bursty", 3)
    assert arrivals_s.min() >= 5
    assert np.mean(arrivals_s < 7.5) < 0.45


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"factor": 11.0, "share": 0.1}, r"within 1 \.\. 1 / share \(10\), got 11"),
        ({"factor": 0.5}, "factor of bursts must be within 1"),
        ({"share": 0.0}, "share of bursts must be within 0"),
        ({"length_s": 0.0}, "mean length of a burst must be positive"),
    ],
)
def test_impossible_bursts_are_refused(settings, message):
    with pytest.raises(ScheduleError, match=message):
        Bursts(**settings)


@pytest.mark.parametrize("arrivals", ["poisson", "bursty", "constant"])
def test_a_schedule_without_any_request_is_refused(arrivals):
    with pytest.raises(ScheduleError, match="no request falls into the schedule 0x5"):
        draw_arrivals(parse_stages("0x5"), arrivals, 1)
