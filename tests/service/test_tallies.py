"""Tallies: what a metric says after a flush is what it would say had it been told at once."""

import random

import pytest
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest

from service.tallies import CounterTally, HistogramTally

EDGES = (0.001, 0.03, 1.0)


def histogram():
    registry = CollectorRegistry()
    return registry, Histogram("seconds", "Of anything.", buckets=EDGES, registry=registry)


@pytest.mark.parametrize(
    "values",
    [
        pytest.param([0.0, 0.02, 0.5, 7.0], id="one in each bucket"),
        pytest.param([0.001, 0.03, 0.030000001, 1.0], id="on an edge and just above"),
        pytest.param([random.Random(0).expovariate(20) for _ in range(1000)], id="many"),
        pytest.param([], id="none"),
    ],
)
def test_a_histogram_says_what_the_librarys_own_would(values):
    expected, direct = histogram()
    registry, tallied = histogram()
    tally = HistogramTally(tallied)
    for value in values:
        direct.observe(value)
        tally.observe(value)
    tally.flush()
    names = ("_bucket", "_sum", "_count")
    for family, other in zip(registry.collect(), expected.collect(), strict=True):
        for sample, wanted in zip(family.samples, other.samples, strict=True):
            if sample.name.endswith(names):
                assert (sample.name, sample.labels) == (wanted.name, wanted.labels)
                assert sample.value == pytest.approx(wanted.value)


def test_nothing_is_counted_twice_or_before_the_flush():
    registry = CollectorRegistry()
    tally = CounterTally(Counter("things", "Of any kind.", registry=registry))
    tally.inc()
    tally.inc(2)
    assert registry.get_sample_value("things_total") == 0
    for _ in range(2):
        tally.flush()
        assert registry.get_sample_value("things_total") == 3
    tally.inc(0.5)
    tally.flush()
    assert b"things_total 3.5" in generate_latest(registry)
