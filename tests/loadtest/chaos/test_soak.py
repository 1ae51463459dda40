"""The soak, short, and what is made of its minutes."""

import pytest

from loadtest.chaos.soak import figures, growth, soak


def test_growth_is_of_the_last_third_over_the_first_after_a_tenth():
    """Ten values: the first is warm-up, thirds are of three."""
    assert growth([50, 100, 100, 100, 0, 0, 0, 110, 110, 110]) == pytest.approx(0.1)


def test_what_is_flat_does_not_grow():
    assert growth([7.0] * 6) == 0


def test_a_short_soak_has_a_row_a_part_and_its_figures(bench):
    minutes = soak(bench, 6, 1.0, workers=1)
    assert len(minutes) == 6
    for minute in minutes:
        assert minute.requests > 20
        assert (minute.wrong, minute.lost, minute.doubled, minute.failed) == (0, 0, 0, 0)
        assert minute.rss_bytes > 10_000_000
        assert minute.descriptors > 10
        assert minute.processes >= 1
    found = figures(minutes)
    assert found["soak_requests"] == sum(minute.requests for minute in minutes)
    assert found["soak_wrong_scores"] == found["soak_lost_events"] == 0
    assert -0.5 < found["soak_rss_growth"] < 0.5
