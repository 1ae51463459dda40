"""Reloads and what they are compared with, short, and what is made of them."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from loadtest.chaos.reloads import Part, figures, measure


def part(condition, *latencies_s):
    return Part(
        condition=condition, latencies_s=latencies_s, failures=(), wrong=0, lost=0, reloads=2
    )


def test_a_ratio_is_the_median_of_the_rounds():
    """The second round ran on a machine that was ten times as slow; ratios do not know."""
    parts = []
    for slow, with_reload in ((1, 1.1), (10, 1.2), (1, 1.6)):
        parts += [
            part("without", slow * 0.01),
            part("a reload every 5 s", slow * with_reload * 0.01),
            part("an idle process beside it", slow * 0.015),
        ]
    found = figures(parts)
    assert found["reload_p99_ratio"] == pytest.approx(1.2)
    assert found["idle_neighbour_p99_ratio"] == pytest.approx(1.5)
    assert found["reloads"] == 18


def test_a_short_measurement_has_three_loads_a_round_and_reloads_in_one(bench):
    parts = measure(replace(bench, seconds=1.5), 1)
    assert [one.condition for one in parts] == [
        "without",
        "a reload every 5 s",
        "an idle process beside it",
    ]
    assert [one.reloads >= 1 for one in parts] == [False, True, False]
    for one in parts:
        assert len(one.latencies_s) > 20
        assert (one.wrong, one.lost) == (0, 0)


def test_the_idle_process_gives_way_and_ends_with_its_stdin():
    with subprocess.Popen(
        [sys.executable, "-m", "loadtest.chaos.neighbour", "0.02", "0.05"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert os.sched_getscheduler(process.pid) == os.SCHED_IDLE
        time.sleep(0.2)
        assert process.poll() is None
        process.communicate()
    assert process.returncode == 0
