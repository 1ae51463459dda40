"""The generator's honesty and speed, measured small: short stalls, low rates."""

import argparse
import json

import httpx
import numpy as np
import pytest

from loadtest.benchmarks import honesty
from loadtest.benchmarks.honesty import (
    add_command,
    analytic_percentile_s,
    closed_loop,
    generator_rate,
    keeps_schedule,
    locust_speed,
    make_bodies,
    trivial_server,
)
from loadtest.benchmarks.stand import StandError
from loadtest.open_loop import LoadResult, Target, run_open_loop
from loadtest.redis_server import free_port

STALL_S, EVERY_S = 0.2, 2.0


@pytest.mark.parametrize(
    ("q", "expected_s"), [(50, 0.0), (90, 0.0), (95, 0.5), (99, 0.9), (99.9, 0.99), (100, 1.0)]
)
def test_the_percentile_of_a_stall_is_computed(q, expected_s):
    assert analytic_percentile_s(q, 1.0, 10.0) == pytest.approx(expected_s)


@pytest.mark.alone
def test_the_open_loop_reports_the_stalls_and_the_closed_loop_hides_them():
    with trivial_server(stall_s=STALL_S, every_s=EVERY_S) as target:
        opened = run_open_loop(
            target, make_bodies(50), rate=200.0, duration_s=2 * EVERY_S, seed=1, connections=256
        )
        closed_s = closed_loop(target, make_bodies(50), 2 * EVERY_S)
    expected_s = analytic_percentile_s(99, STALL_S, EVERY_S)
    assert opened.statuses == {200: len(opened.latencies_s)}
    assert 0.9 * expected_s < opened.percentile_s(99) < 1.5 * expected_s
    assert np.percentile(closed_s, 99) < 0.9 * expected_s
    assert closed_s.max() > 0.9 * STALL_S, "it met a stall, too"


def test_the_trivial_server_answers_every_request_on_one_connection_and_ends():
    with trivial_server(stall_s=0, every_s=0) as target:
        url = f"http://{target.host}:{target.port}/score"
        with httpx.Client() as client:
            assert [client.post(url, json={}).json() for _ in range(3)] == [{"scores": []}] * 3
    with pytest.raises(httpx.ConnectError):
        httpx.post(url)


def test_a_server_that_does_not_start_is_an_error(monkeypatch, capfd):
    with trivial_server(stall_s=0, every_s=0) as target:
        monkeypatch.setattr(honesty, "free_port", lambda: target.port)
        with (
            pytest.raises(StandError, match="ended with status 1"),
            trivial_server(stall_s=0, every_s=0),
        ):
            pass
    assert "address already in use" in capfd.readouterr().err


def test_bodies_have_a_hundred_ids_of_thirteen_digits():
    bodies = [json.loads(body) for body in make_bodies(20)]
    assert all(len(body["candidates"]) == 100 for body in bodies)
    assert {len(str(item)) for body in bodies for item in body["candidates"]} == {13}


@pytest.mark.parametrize(
    ("delay_s", "latency_s", "keeps"),
    [(0.0005, 0.01, True), (0.0011, 0.01, False), (0.0005, float("inf"), False)],
    ids=["on time", "late", "unanswered"],
)
def test_a_schedule_is_kept_when_all_is_on_time_and_answered(delay_s, latency_s, keeps):
    result = LoadResult(
        rate=2.0,
        duration_s=1.0,
        arrivals_s=np.zeros(2),
        latencies_s=np.array([0.01, latency_s]),
        send_delays_s=np.full(2, delay_s),
        statuses={},
    )
    assert keeps_schedule(result) == keeps


def test_both_generators_are_measured_against_the_trivial_server():
    with trivial_server(stall_s=0, every_s=0) as target:
        rate = generator_rate(target, 0.2, highest=500.0)
        locust_rate = locust_speed(target, 1.0)
    # Zero where a busy machine let no probe be on time.
    assert 0 <= rate <= 500.0
    assert locust_rate > 0


def test_a_locust_that_cannot_run_is_an_error_with_what_it_said(monkeypatch, tmp_path):
    monkeypatch.setattr(honesty, "_LOCUSTFILE", tmp_path / "none.py")
    target = Target(host="127.0.0.1", port=free_port(), path="/score")
    with pytest.raises(StandError, match="Could not find"):
        locust_speed(target, 1.0)


def test_seconds_that_are_none_are_refused():
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["honesty", "--seconds", "0"])
    with pytest.raises(ValueError, match="--seconds must be positive, got 0"):
        options.run(options)
