"""The open-loop client, against a small real server whose every answer is chosen by the test."""

import asyncio
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import httptools
import numpy as np
import pytest

from loadtest.open_loop import (
    LoadError,
    LoadResult,
    ScheduleResult,
    Target,
    run_open_loop,
    run_schedule,
    running_schedule,
)
from loadtest.redis_server import free_port
from loadtest.schedules import draw_arrivals, steady

# Body i tells the server that this is request i. More than any run here sends: the warm-up takes
# the last ones, so that whatever the server does to request i, the warm-up is spared.
BODIES = [b"%d" % i for i in range(1000)]
N_WARM_UP = 16
EMPTY_200 = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
EMPTY_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
CLOSING_200 = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n"


@dataclass(frozen=True, kw_only=True)
class Reply:
    """Pieces of an answer, `delay_s` before each; `close`: end the connection after the last."""

    pieces: tuple[bytes, ...] = (EMPTY_200,)
    delay_s: float = 0.0
    close: bool = False


Behavior = Callable[[int], Reply]


@dataclass(frozen=True, kw_only=True)
class SmallServer:
    """Where it listens, the bodies that it received, and how many connections it accepted."""

    port: int
    bodies: list[bytes]
    connections: list[object]

    @property
    def target(self) -> Target:
        return Target(host="127.0.0.1", port=self.port, path="/score")

    def run(self, **options: Any) -> LoadResult:
        options = {"rate": 500.0, "duration_s": 0.1, "arrivals": "constant", "seed": 1, **options}
        return run_open_loop(self.target, BODIES, **options)

    def run_at(self, arrivals_s: list[float], **options: Any) -> ScheduleResult:
        """Send request i when it is due, in a schedule of a second."""
        requests = [self.target.request(body) for body in BODIES]
        address = (self.target.host, self.target.port)
        options = {"duration_s": 1.0, **options}
        return run_schedule(address, requests, np.array(arrivals_s), **options)


class _Conversation(asyncio.Protocol):
    def __init__(self, behavior: Behavior, server: SmallServer) -> None:
        self.behavior, self.server = behavior, server
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.server.connections.append(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.server.bodies.append(self.body)
        reply = self.behavior(int(self.body))
        self.body = b""
        self.answer(reply, 0)

    def answer(self, reply: Reply, piece: int) -> None:
        if piece == len(reply.pieces):
            if reply.close:
                self.transport.close()
        elif reply.delay_s:
            loop = asyncio.get_running_loop()
            loop.call_later(reply.delay_s, self.write, reply, piece)
        else:
            self.write(reply, piece)

    def write(self, reply: Reply, piece: int) -> None:
        self.transport.write(reply.pieces[piece])
        self.answer(reply, piece + 1)


@contextmanager
def small_server(behavior: Behavior | Reply) -> Iterator[SmallServer]:
    """Serve from a thread until the block ends; behaviors get the number of the request."""
    behave = behavior if callable(behavior) else lambda _i: behavior
    listening = socket.create_server(("127.0.0.1", 0))
    server = SmallServer(port=listening.getsockname()[1], bodies=[], connections=[])
    # Not uvloop: its timers ring up to a millisecond early, and tests rely on the delays.
    loop = asyncio.SelectorEventLoop()
    listener = loop.run_until_complete(
        loop.create_server(lambda: _Conversation(behave, server), sock=listening)
    )
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        listener.close()
        for conversation in server.connections:
            cast(_Conversation, conversation).transport.abort()
        loop.run_until_complete(listener.wait_closed())
        loop.close()


def result_of(latencies_s: list[float], **fields: Any) -> LoadResult:
    zeros = np.zeros(len(latencies_s))
    return LoadResult(
        **{
            "rate": 10.0,
            "duration_s": 2.0,
            "arrivals_s": zeros,
            "latencies_s": np.array(latencies_s),
            "send_delays_s": zeros,
            "statuses": {},
            **fields,
        }
    )


# The result.


@pytest.mark.parametrize(
    ("q", "expected_s"),
    [(0, 0.1), (25, 0.1), (25.1, 0.2), (50, 0.2), (75, 0.4), (75.1, math.inf), (100, math.inf)],
)
def test_a_percentile_counts_failed_requests_as_infinitely_slow(q, expected_s):
    assert result_of([0.4, 0.1, math.inf, 0.2]).percentile_s(q) == expected_s


@pytest.mark.parametrize(("q", "expected_s"), [(33, 0.1), (34, 0.2), (66.7, 0.4), (100, 0.4)])
def test_an_accepted_percentile_leaves_failed_requests_out(q, expected_s):
    assert result_of([0.4, 0.1, math.inf, 0.2]).accepted_percentile_s(q) == expected_s


def test_a_percentile_takes_the_rank_that_a_decimal_percentage_means():
    """99.9 % of 1,000 is rank 999, though 99.9 has no exact float."""
    assert result_of([float(i) for i in range(1, 1001)]).percentile_s(99.9) == 999.0


def test_without_any_accepted_request_their_percentile_is_infinite():
    assert result_of([math.inf, math.inf]).accepted_percentile_s(50) == math.inf


def test_a_percentage_beyond_a_hundred_is_refused():
    with pytest.raises(ValueError, match=r"within 0 \.\. 100, got 101"):
        result_of([0.1]).percentile_s(101)


@pytest.mark.parametrize(
    ("limit_s", "share", "goodput"),
    [(0.05, 0.0, 0.0), (0.1, 0.25, 0.5), (0.3, 0.5, 1.0), (math.inf, 0.75, 1.5)],
)
def test_share_and_goodput_count_what_was_answered_in_time(limit_s, share, goodput):
    result = result_of([0.4, 0.1, math.inf, 0.2])
    assert result.share_within(limit_s) == share
    assert result.goodput(limit_s) == goodput


def test_late_sends_are_the_p99_of_the_send_delays():
    delays_s = np.arange(1, 201) / 1000
    assert result_of([0.1] * 200, send_delays_s=delays_s).late_sends_s == 0.198


def test_a_result_without_requests_is_refused():
    with pytest.raises(ValueError, match="at least one request"):
        result_of([])


def test_a_result_whose_arrays_differ_is_refused():
    with pytest.raises(ValueError, match="1 latencies, but 2 arrivals and 1 send delays"):
        result_of([0.1], arrivals_s=np.zeros(2))


# The traffic.


def test_a_request_is_prebuilt_byte_by_byte():
    target = Target(host="::1", port=80, path="/score?v=2", headers={"X-Deadline-Ms": "30"})
    assert target.request(b"{}") == (
        b"POST /score?v=2 HTTP/1.1\r\nHost: [::1]:80\r\nX-Deadline-Ms: 30\r\n"
        b"Content-Length: 2\r\n\r\n{}"
    )


# Sending.


@pytest.mark.parametrize("processes", [1, 3])
def test_every_scheduled_request_is_sent_exactly_once(processes):
    with small_server(Reply()) as server:
        result = server.run(rate=2000.0, arrivals="poisson", processes=processes)
    n = len(result.latencies_s)
    expected_s = draw_arrivals(steady(2000.0, 0.1), "poisson", 1)
    assert result.arrivals_s.tolist() == expected_s.tolist()
    n_warm_up = len(server.bodies) - n
    assert n_warm_up == N_WARM_UP * processes
    assert sorted(server.bodies[n_warm_up:], key=int) == BODIES[:n]
    assert set(server.bodies[:n_warm_up]) == set(BODIES[-N_WARM_UP:])
    assert result.statuses == {200: n}
    assert np.isfinite(result.latencies_s).all()
    assert (result.latencies_s > result.send_delays_s).all()
    assert result.send_delays_s.min() >= 0


def test_merged_processes_keep_the_order_of_arrival():
    slow = [3, 4, 5, 20, 37]
    with small_server(lambda i: Reply(delay_s=0.2 if i in slow else 0.0)) as server:
        result = server.run(processes=2)
    assert sorted(np.argsort(result.latencies_s)[-len(slow) :].tolist()) == slow
    assert (result.latencies_s[slow] >= 0.2).all()


def test_a_slow_server_yields_its_time_as_latency():
    with small_server(Reply(delay_s=0.05)) as server:
        result = server.run()
    assert result.percentile_s(0) >= 0.05
    assert result.statuses == {200: 50}


def test_latency_runs_to_the_last_byte():
    pieces = (
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n",
        b"0\r\n\r\n",
    )
    with small_server(Reply(pieces=pieces, delay_s=0.03)) as server:
        result = server.run()
    assert result.percentile_s(0) >= 0.09
    assert result.statuses == {200: 50}


def test_a_stall_is_in_the_latency_of_all_requests_that_were_due_in_it():
    """A closed-loop client would have sent one request into the stall, and reported one."""

    def stall_once(i):
        if i == 50:
            time.sleep(0.3)
        return Reply()

    with small_server(stall_once) as server:
        result = server.run(rate=200.0, duration_s=0.5)
    assert result.latencies_s[50] >= 0.3
    # Request 50 came at its time or later, so nothing behind it was answered until the stall ended.
    # Its very next ones may have come together with it, and have been answered first.
    answered_s = result.arrivals_s + result.latencies_s
    assert (answered_s[55:] >= result.arrivals_s[50] + 0.3).all()


def test_requests_that_wait_for_a_connection_have_the_wait_in_their_latency():
    """20 at once over 2 connections, 50 ms each: the last pair has waited nine times."""
    with small_server(Reply(delay_s=0.05)) as server:
        result = server.run(rate=20_000.0, duration_s=0.001, connections=2)
    assert len(result.latencies_s) == 20
    assert result.queued == 18
    assert (result.latencies_s >= 0.05 * (1 + np.arange(20) // 2) - 0.001).all()
    assert len(server.connections) == 2


def test_idle_connections_are_used_again():
    """One request at a time needs no more than the warm-up has opened."""
    with small_server(Reply()) as server:
        server.run(rate=50.0, duration_s=0.2)
    assert len(server.connections) == N_WARM_UP


def test_busy_connections_are_joined_by_new_ones():
    """All 50 requests are in flight at once, more than the warm-up has opened."""
    with small_server(lambda i: Reply(delay_s=1.0 if i < 50 else 0.0)) as server:
        result = server.run()
    assert len(server.connections) == 50
    assert result.queued == 0


# Schedules.


def test_requests_leave_when_a_schedule_has_them_due():
    """Ten at once, a pause, one more: the server sees them in that order, and not before."""
    seen_s: dict[int, float] = {}

    def note(i):
        seen_s[i] = time.monotonic()
        return Reply()

    with small_server(note) as server:
        result = server.run_at([0.0] * 10 + [0.4])
    assert result.rate == 11.0
    assert result.statuses == {200: 11}
    assert seen_s[10] - min(seen_s[i] for i in range(10)) > 0.2
    assert result.arrivals_s.tolist() == [0.0] * 10 + [0.4]


@pytest.mark.parametrize("processes", [1, 3])
def test_every_request_keeps_its_own_status(processes):
    with small_server(lambda i: Reply(pieces=(EMPTY_503 if i % 3 == 0 else EMPTY_200,))) as server:
        result = server.run_at(np.linspace(0.0, 0.2, 30).tolist(), processes=processes)
    assert result.codes.tolist() == [503, 200, 200] * 10
    assert result.sent.all()
    assert not result.waited.any()


def test_the_chosen_requests_are_counted_alone():
    with small_server(lambda i: Reply(pieces=(EMPTY_503 if i < 10 else EMPTY_200,))) as server:
        result = server.run_at(np.linspace(0.0, 0.2, 30).tolist())
    chosen = np.arange(30) >= 5
    part = result.select(chosen, 0.5)
    assert part.statuses == {200: 20, 503: 5}
    assert part.rate == 50.0
    assert part.duration_s == 0.5
    assert part.latencies_s.tolist() == result.latencies_s[5:].tolist()
    with pytest.raises(ValueError, match="at least one request"):
        result.select(np.zeros(30, np.bool_), 0.5)


def test_what_never_left_is_counted_as_unsent():
    """Two connections hold a request each until their time is over; all others wait for them."""
    with small_server(lambda i: Reply(delay_s=60.0 if i < 20 else 0.0)) as server:
        result = server.run_at([0.0] * 20, timeout_s=0.3, connections=2)
    assert result.statuses == {0: 20}
    assert result.queued == 18
    # Whether those that waited were swept before or after a connection came free is chance.
    assert 0 < result.unsent <= 18
    assert result.unsent == np.count_nonzero(~result.sent)
    assert result.sent[:2].all()


def test_without_a_server_nothing_is_sent():
    target = Target(host="127.0.0.1", port=free_port(), path="/")
    result = run_schedule((target.host, target.port), [b"x"], np.zeros(5), duration_s=1.0)
    assert result.unsent == 5
    assert result.queued == 0


def test_connections_can_be_opened_by_another_request():
    with small_server(Reply()) as server:
        server.run_at([0.0], warm_up=server.target.request(b"777"))
    assert server.bodies == [b"777"] * N_WARM_UP + [b"0"]


@pytest.mark.parametrize("arrivals_s", [[], [0.2, 0.1]], ids=["none", "descending"])
def test_a_schedule_without_order_is_refused(arrivals_s):
    with pytest.raises(ValueError, match="arrivals must be ascending, and one at least"):
        run_schedule(("127.0.0.1", 1), [b"x"], np.array(arrivals_s), duration_s=1.0)


# What goes wrong.


def test_statuses_other_than_200_count_as_infinitely_slow():
    with small_server(lambda i: Reply(pieces=(EMPTY_503 if i % 5 == 0 else EMPTY_200,))) as server:
        result = server.run()
    assert result.statuses == {200: 40, 503: 10}
    assert np.flatnonzero(np.isinf(result.latencies_s)).tolist() == list(range(0, 50, 5))


@pytest.mark.parametrize("close", [True, False], ids=["by the server", "by the client"])
def test_a_connection_that_was_announced_to_close_is_not_used_again(close):
    with small_server(Reply(pieces=(CLOSING_200,), close=close)) as server:
        result = server.run()
    assert result.statuses == {200: 50}
    assert len(server.connections) == N_WARM_UP + 50


def test_an_answer_that_breaks_off_costs_that_request_alone():
    broken = [
        Reply(pieces=(), close=True),
        Reply(pieces=(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab",), close=True),
        Reply(
            pieces=(b"HTTP/1.1 200 OK\r\n\r\nonly the end of the connection ends it",), close=True
        ),
        Reply(pieces=(b"SSH-2.0-OpenSSH\r\n",)),
    ]
    with small_server(lambda i: Reply() if i % 5 == 0 else broken[i % 5 - 1]) as server:
        result = server.run()
    assert result.statuses == {0: 40, 200: 10}
    assert np.flatnonzero(np.isfinite(result.latencies_s)).tolist() == list(range(0, 50, 5))
    assert len(server.bodies) == N_WARM_UP + 50, "nothing is sent twice"


@pytest.mark.parametrize(
    "reply",
    [
        Reply(pieces=(EMPTY_200 + EMPTY_503,)),
        Reply(pieces=(EMPTY_200, EMPTY_503), delay_s=0.001),
    ],
    ids=["at once", "a moment later"],
)
def test_an_answer_that_nobody_asked_for_is_not_taken_for_that_of_the_next_request(reply):
    with small_server(reply) as server:
        result = server.run(rate=10.0, duration_s=0.3, connections=1)
    assert result.statuses == {200: 3}
    assert len(server.connections) == 4


def test_a_server_that_is_not_there_fails_every_request():
    target = Target(host="127.0.0.1", port=free_port(), path="/")
    result = run_open_loop(target, [b""], rate=200.0, duration_s=0.2, seed=1, connections=4)
    assert result.statuses == {0: len(result.latencies_s)}
    assert np.isinf(result.latencies_s).all()


def test_what_is_not_answered_within_the_timeout_is_given_up():
    """Four connections hold a request each; the others wait for one until their time is over."""
    with small_server(lambda i: Reply(delay_s=60.0 if i < 50 else 0.0)) as server:
        began_s = time.monotonic()
        result = server.run(timeout_s=0.2, connections=4)
        took_s = time.monotonic() - began_s
    assert result.statuses == {0: 50}
    assert took_s < 10.0
    assert len(server.connections) > 4, "what was given up has left its connection"


def test_an_answer_after_the_timeout_does_not_count():
    """Answers come 5 ms late: sooner than the client looks around for what is overdue."""
    with small_server(lambda i: Reply(delay_s=0.105 if i < 50 else 0.0)) as server:
        result = server.run(timeout_s=0.1)
    assert result.statuses == {0: 50}


def test_a_client_that_falls_behind_says_so():
    with small_server(Reply()) as server:
        result = server.run(rate=500_000.0, duration_s=0.01, timeout_s=10.0)
    assert result.late_sends_s > 0.001
    assert result.statuses == {200: 5000}


def test_outcomes_larger_than_a_pipe_come_back_whole_however_python_buffers(monkeypatch):
    """Without a buffer, what a full pipe does not take at once would be lost unnoticed."""
    monkeypatch.setenv("PYTHONUNBUFFERED", "1")
    with small_server(Reply()) as server:
        result = server.run(rate=100_000.0, duration_s=0.08, timeout_s=30.0)
    assert result.statuses == {200: 8000}


def test_the_caller_keeps_its_own_affinity():
    own = os.sched_getaffinity(0)
    with small_server(Reply()) as server:
        result = server.run(cores=[min(own)])
    assert result.statuses == {200: 50}
    assert os.sched_getaffinity(0) == own


def test_a_sending_process_that_fails_is_an_error(capfd):
    with small_server(Reply()) as server, pytest.raises(LoadError, match="ended with status 1"):
        server.run(cores=[100_000])
    assert "sched_setaffinity" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rate": 0.0}, "rate must be positive and finite, got 0.0"),
        ({"rate": math.inf}, "rate must be positive and finite, got inf"),
        ({"duration_s": -1.0}, "duration_s must be positive"),
        ({"timeout_s": math.nan}, "timeout_s must be positive"),
        ({"processes": 0}, "processes must be within"),
        ({"processes": 3, "connections": 2}, r"processes must be within 1 \.\. connections \(2\)"),
        ({"rate": 0.001}, "no request falls into"),
        ({"bodies": []}, "bodies must not be empty"),
    ],
)
def test_impossible_arguments_are_refused_by_name(options, message):
    target = Target(host="127.0.0.1", port=1, path="/")
    defaults = {"bodies": [b""], "rate": 10.0, "duration_s": 1.0, "seed": 1}
    with pytest.raises(ValueError, match=message):
        run_open_loop(target, **{**defaults, **options})


def text_200(text: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(text), text)


@pytest.mark.parametrize("processes", [1, 2])
def test_answers_come_back_with_their_requests_when_they_are_kept(processes):
    """Request 2 is broken off, request 3 is answered in pieces."""

    def behavior(i: int) -> Reply:
        if i == 2:
            return Reply(pieces=(text_200(b"half an answer")[:-5],), close=True)
        whole = text_200(b"answer %d" % i)
        return Reply(pieces=(whole[:-4], whole[-4:]) if i == 3 else (whole,), delay_s=0.01)

    with small_server(behavior) as server:
        requests = [server.target.request(body) for body in BODIES]
        with running_schedule(
            ("127.0.0.1", server.port),
            requests,
            np.arange(5) / 50,
            duration_s=1.0,
            processes=processes,
            keep_answers=True,
        ) as load:
            result = load.result()
    assert result.answers == [b"answer 0", b"answer 1", b"", b"answer 3", b"answer 4"]
    chosen = result.select(np.array([False, True, False, True, False]), 1.0)
    assert chosen.answers == [b"answer 1", b"answer 3"]


def test_a_load_that_moves_awaits_what_is_in_flight_where_it_is():
    """Request 0 takes 1.0 s; the move is at about 0.3 s, between requests 1 and 2."""
    slow = Reply(pieces=(text_200(b"old"),), delay_s=1.0)
    with (
        small_server(lambda i: slow if i == 0 else Reply(pieces=(text_200(b"old"),))) as old,
        small_server(Reply(pieces=(text_200(b"new"),))) as new,
        running_schedule(
            ("127.0.0.1", old.port),
            [old.target.request(body) for body in BODIES],
            np.array([0.0, 0.05, 1.2, 1.4]),
            duration_s=1.5,
            keep_answers=True,
        ) as load,
    ):
        time.sleep(max(0.0, load.started_s + 0.3 - time.monotonic()))
        load.move(("127.0.0.1", new.port))
        result = load.result()
    assert result.answers == [b"old", b"old", b"new", b"new"]
    assert new.bodies == [b"2", b"3"]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_load_that_is_stopped_has_the_requests_that_were_due(processes):
    """Every request takes 0.2 s: some are in flight when the load is stopped."""
    with (
        small_server(Reply(delay_s=0.2)) as server,
        running_schedule(
            ("127.0.0.1", server.port),
            [server.target.request(body) for body in BODIES],
            np.arange(1000) / 100,
            duration_s=10.0,
            processes=processes,
        ) as load,
    ):
        time.sleep(max(0.0, load.started_s + 0.5 - time.monotonic()))
        load.stop()
        result = load.result()
    assert 40 < len(result.arrivals_s) < 200
    assert result.statuses == {200: len(result.arrivals_s)}
    assert (np.diff(result.arrivals_s) > 0).all()
    assert 0.4 < result.duration_s < 2.0
    assert len(server.bodies) == len(result.arrivals_s) + N_WARM_UP * processes


def test_a_load_that_has_sent_everything_can_be_stopped():
    with (
        small_server(Reply()) as server,
        running_schedule(
            ("127.0.0.1", server.port), [server.target.request(b"0")], np.zeros(1), duration_s=0.1
        ) as load,
    ):
        time.sleep(0.5)
        load.stop()
        result = load.result()
    assert result.statuses == {200: 1}
    assert result.duration_s == 0.1


def test_what_is_given_up_is_told_from_what_is_broken_off():
    """Request 1 is never answered, the connection of request 2 breaks off."""

    def behavior(i: int) -> Reply:
        if i == 1:
            return Reply(pieces=(EMPTY_200[:10],))
        return Reply(pieces=(), close=True) if i == 2 else Reply()

    with small_server(behavior) as server:
        result = server.run_at([0.0, 0.1, 0.2, 0.3], timeout_s=0.5)
    assert result.codes.tolist() == [200, 0, 0, 200]
    assert result.timed_out.tolist() == [False, True, False, False]
    assert result.sent.all()
