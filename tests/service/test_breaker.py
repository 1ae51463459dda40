"""What opens a circuit breaker, what closes it, and what passes meanwhile."""

import time

import pytest

from service.breaker import MAX_FAILURES, BreakerState, CircuitBreaker

OPEN_S = 0.05


@pytest.fixture
def told() -> list[tuple[BreakerState, str]]:
    return []


@pytest.fixture
def breaker(told) -> CircuitBreaker:
    return CircuitBreaker(
        on_change=lambda state, reason: told.append((state, reason)), max_failures=3, open_s=OPEN_S
    )


def open_it(breaker: CircuitBreaker) -> None:
    for _ in range(3):
        assert breaker.allows()
        breaker.failed("TimeoutError")


def wait_for_the_probe(breaker: CircuitBreaker) -> None:
    deadline = time.monotonic() + 30.0
    while not breaker.allows():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_it_opens_by_failures_in_a_row_and_says_why(breaker, told):
    open_it(breaker)
    assert not breaker.allows()
    assert told == [(BreakerState.OPEN, "TimeoutError")]


def test_a_success_between_failures_keeps_it_closed(breaker, told):
    for _ in range(5):
        breaker.failed("TimeoutError")
        breaker.failed("TimeoutError")
        breaker.succeeded()
    assert breaker.allows()
    assert told == []


def test_calls_that_say_nothing_are_not_counted(breaker):
    for _ in range(10):
        assert breaker.allows()
        breaker.gave_up()
    assert breaker.state is BreakerState.CLOSED


def test_after_a_pause_one_call_probes(breaker):
    open_it(breaker)
    wait_for_the_probe(breaker)
    assert breaker.state is BreakerState.HALF_OPEN
    assert not breaker.allows()


def test_a_probe_that_succeeds_closes_it(breaker, told):
    open_it(breaker)
    wait_for_the_probe(breaker)
    breaker.succeeded()
    assert [breaker.allows() for _ in range(3)] == [True] * 3
    assert [state for state, _ in told] == [
        BreakerState.OPEN,
        BreakerState.HALF_OPEN,
        BreakerState.CLOSED,
    ]


def test_a_probe_that_fails_opens_it_for_another_pause(breaker):
    open_it(breaker)
    wait_for_the_probe(breaker)
    breaker.failed("ConnectionError")
    assert not breaker.allows()
    wait_for_the_probe(breaker)


def test_after_a_probe_that_was_given_up_the_next_call_is_one(breaker):
    open_it(breaker)
    wait_for_the_probe(breaker)
    breaker.gave_up()
    assert breaker.allows()
    assert breaker.state is BreakerState.HALF_OPEN


def test_failures_from_before_it_closed_are_forgotten(breaker):
    open_it(breaker)
    wait_for_the_probe(breaker)
    breaker.succeeded()
    breaker.failed("TimeoutError")
    breaker.failed("TimeoutError")
    assert breaker.allows()


def test_a_call_that_began_before_it_opened_may_close_it(breaker):
    open_it(breaker)
    breaker.succeeded()
    assert breaker.allows()


def test_the_usual_one_stands_several_failures():
    breaker = CircuitBreaker(on_change=lambda *_: None)
    for _ in range(MAX_FAILURES - 1):
        breaker.failed("TimeoutError")
    assert breaker.allows()
    breaker.failed("TimeoutError")
    assert not breaker.allows()
