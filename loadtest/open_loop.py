"""An open-loop HTTP load client: requests leave when they are due, however the server does.

A closed-loop client (send, wait, send again) slows down together with the server that it measures,
so the requests that would have suffered are never sent (*coordinated omission*; Schroeder,
Wierman and Harchol-Balter, "Open Versus Closed: A Cautionary Tale", NSDI 2006). Here all arrival
times are drawn beforehand, and a latency runs from the *scheduled* arrival to the last byte of the
answer: what a stall, a full connection pool or the client itself adds is in the number.

Child processes send, on uvloop, so that the caller's event loop, garbage collector and affinity
stay out of the measurement. Linux only: arrivals wait on a timerfd, because timers of the event
loop tick in milliseconds, and a median answer may take no longer than that.
"""

import asyncio
import ctypes
import gc
import json
import math
import os
import pickle
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import compress
from typing import IO, Any, cast

import httptools
import numpy as np
import uvloop
from numpy.typing import NDArray

from loadtest.schedules import Arrivals, draw_arrivals, steady

_OK = 200
_NO_ANSWER = 0
_NO_TICKET = -1
_WARM_UP_REQUESTS = 16
# From the moment that every process is ready to the first arrival: all must have read the time.
_LEAD_S = 0.05
_SWEEP_S = 0.02
_TFD_NONBLOCK = os.O_NONBLOCK
_TFD_TIMER_ABSTIME = 1


class LoadError(RuntimeError):
    """A sending process ended before it had sent everything."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """Where requests go: `POST path` to `host`:`port`, with `headers` beside Host and
    Content-Length, which are added.
    """

    host: str
    port: int
    path: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # a key may be in them

    def request(self, body: bytes) -> bytes:
        """Return the whole request, head and body."""
        length = str(len(body))
        host = f"[{self.host}]" if ":" in self.host else self.host
        headers = {"Host": f"{host}:{self.port}", **self.headers, "Content-Length": length}
        fields = (f"{name}: {value}" for name, value in headers.items())
        lines = [f"POST {self.path} HTTP/1.1", *fields]
        return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadResult:
    """What became of N scheduled requests.

    `rate`: offered requests a second. `duration_s`: requests were scheduled in [0, duration_s).
    All arrays are float64 [N], one entry per scheduled request, in order of arrival:
    `arrivals_s` when it was due, counted from the start; `latencies_s` from then to the last byte
    of its answer, `inf` for anything other than a 200 within the timeout; `send_delays_s` how
    late the client came to it. `statuses`: number of requests by HTTP status, 0 where no answer
    came within the timeout or the connection failed. `queued`: requests that found all allowed
    connections busy and had to wait for one; their wait is in the latency. There are some where
    the server is slow for its number of connections, or the client too busy to read its answers.
    `unsent`: requests that never left, because no connection came free within the timeout or none
    could be opened.
    """

    rate: float
    duration_s: float
    arrivals_s: NDArray[np.float64]
    latencies_s: NDArray[np.float64]
    send_delays_s: NDArray[np.float64]
    statuses: dict[int, int]
    queued: int = 0
    unsent: int = 0

    def __post_init__(self) -> None:
        n = len(self.latencies_s)
        if n == 0:
            raise ValueError("a result needs at least one request")
        if len(self.arrivals_s) != n or len(self.send_delays_s) != n:
            raise ValueError(
                f"{n} latencies, but {len(self.arrivals_s)} arrivals and "
                f"{len(self.send_delays_s)} send delays"
            )

    @property
    def late_sends_s(self) -> float:
        """The p99 of `send_delays_s`: how far the client itself fell behind its schedule.

        A client with CPU to spare stays well below a millisecond; more means that the latencies
        are partly its own. A wait for a free connection is not in here (see `queued`), because a
        slow server causes it too.
        """
        return _nearest_rank(self.send_delays_s, 99.0)

    def percentile_s(self, q: float) -> float:
        """Return the latency that q percent (0 .. 100) of ALL requests did not exceed, in seconds.

        A refused or failed request counts as inf, it is never left out: a server must not look
        faster by refusing more. Nearest rank, so the value is one that was measured.
        """
        return _nearest_rank(self.latencies_s, q)

    def accepted_percentile_s(self, q: float) -> float:
        """Return the same over the requests answered with 200 only; inf when there are none."""
        return _nearest_rank(self._accepted_s, q)

    def share_within(self, limit_s: float) -> float:
        """Return the share (0 .. 1) of all requests that were answered with 200 within limit_s."""
        return self._n_within(limit_s) / len(self.latencies_s)

    def goodput(self, limit_s: float) -> float:
        """Return how many requests a second were answered with 200 within limit_s."""
        return self._n_within(limit_s) / self.duration_s

    @property
    def _accepted_s(self) -> NDArray[np.float64]:
        return self.latencies_s[np.isfinite(self.latencies_s)]

    def _n_within(self, limit_s: float) -> int:
        return int(np.count_nonzero(self._accepted_s <= limit_s))


@dataclass(frozen=True, kw_only=True, eq=False)
class ScheduleResult(LoadResult):
    """The same, request by request: `codes` int16 [N], the HTTP status, 0 where no answer came;
    `waited` bool [N], whether it is counted as queued; `sent` bool [N], whether it left;
    `timed_out` bool [N], whether it was given up: what was sent, has no status and was not given up
    has lost its connection. `answers`: the bodies of the N answers, b"" where none came; empty
    unless they were kept.
    """

    codes: NDArray[np.int16]
    waited: NDArray[np.bool_]
    sent: NDArray[np.bool_]
    timed_out: NDArray[np.bool_]
    answers: Sequence[bytes] = ()

    def select(self, chosen: NDArray[np.bool_], duration_s: float) -> "ScheduleResult":
        """Return the result of the chosen requests (bool [N]) alone, which were due within
        `duration_s` seconds. Raises ValueError when none is chosen.
        """
        return _schedule_result(
            duration_s=duration_s,
            arrivals_s=self.arrivals_s[chosen],
            latencies_s=self.latencies_s[chosen],
            send_delays_s=self.send_delays_s[chosen],
            codes=self.codes[chosen],
            waited=self.waited[chosen],
            sent=self.sent[chosen],
            timed_out=self.timed_out[chosen],
            answers=list(compress(self.answers, chosen)),
        )


class RunningLoad:
    """A load on its way. `started_s`: when its schedule began, on the clock of time.monotonic."""

    def __init__(
        self,
        children: Sequence["subprocess.Popen[bytes]"],
        arrivals_s: NDArray[np.float64],
        duration_s: float,
        started_s: float,
        *,
        keep_answers: bool,
    ) -> None:
        self._keep_answers = keep_answers
        self._children = children
        self._arrivals_s = arrivals_s
        self._duration_s = duration_s
        self.started_s = started_s

    def move(self, address: tuple[str, int]) -> None:
        """Send what is due from now on to another address (host, port), as a load balancer does.

        What is in flight is awaited where it is; a connection is closed when it has no request.
        """
        self._tell({"move": address})

    def stop(self) -> None:
        """Send nothing more; the result is that of what was due until now."""
        self._duration_s = min(self._duration_s, time.monotonic() - self.started_s)
        self._tell({"stop": True})

    def _tell(self, command: Mapping[str, object]) -> None:
        for child in self._children:
            # One that has sent everything may be gone already. Not buffered: what a pipe refuses
            # would be written once more when it is closed.
            with suppress(BrokenPipeError):
                os.write(_pipe(child.stdin).fileno(), json.dumps(command).encode() + b"\n")

    def result(self) -> ScheduleResult:
        """Wait until all requests are resolved; raises LoadError when a sending process fails."""
        n, processes = len(self._arrivals_s), len(self._children)
        latencies_s, send_delays_s = np.empty(n), np.empty(n)
        codes, waited, sent = np.empty(n, np.int16), np.empty(n, np.bool_), np.empty(n, np.bool_)
        timed_out = np.empty(n, np.bool_)
        answers = [b""] * n
        was_due = np.zeros(n, np.bool_)
        for first, child in enumerate(self._children):
            written = _pipe(child.stdout).read()
            if child.wait():
                raise LoadError(f"a sending process ended with status {child.returncode}")
            outcome: _Outcome = pickle.loads(written)  # noqa: S301 # written by this very module
            own = slice(first, first + processes * len(outcome.statuses), processes)
            latencies_s[own] = outcome.latencies_s
            send_delays_s[own] = outcome.send_delays_s
            codes[own] = outcome.statuses
            waited[own] = outcome.waited
            sent[own] = outcome.sent
            timed_out[own] = outcome.timed_out
            was_due[own] = True
            if self._keep_answers:
                answers[own] = outcome.answers
        result = _schedule_result(
            duration_s=self._duration_s,
            arrivals_s=self._arrivals_s,
            latencies_s=latencies_s,
            send_delays_s=send_delays_s,
            codes=codes,
            waited=waited,
            sent=sent,
            timed_out=timed_out,
            answers=answers if self._keep_answers else (),
        )
        return result if was_due.all() else result.select(was_due, self._duration_s)


def run_open_loop(
    target: Target,
    bodies: Sequence[bytes],
    *,
    rate: float,
    duration_s: float,
    arrivals: Arrivals = "poisson",
    seed: int,
    timeout_s: float = 2.0,
    connections: int = 256,
    processes: int = 1,
    cores: Sequence[int] | None = None,
) -> LoadResult:
    """Offer `rate` requests a second for `duration_s` seconds; blocks until all are resolved.

    Request i carries `bodies[i % len(bodies)]`. The traffic depends on `seed`, not on `processes`.
    All else is as `run_schedule` says. Raises ValueError for impossible arguments, LoadError when a
    sending process fails (its traceback goes to stderr).
    """
    for name, value in {"rate": rate, "duration_s": duration_s}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not bodies:
        raise ValueError("bodies must not be empty")
    result = run_schedule(
        (target.host, target.port),
        [target.request(body) for body in bodies],
        draw_arrivals(steady(rate, duration_s), arrivals, seed),
        duration_s=duration_s,
        timeout_s=timeout_s,
        connections=connections,
        processes=processes,
        cores=cores,
    )
    return replace(result, rate=rate)


def run_schedule(
    address: tuple[str, int],
    requests: Sequence[bytes],
    arrivals_s: NDArray[np.float64],
    *,
    duration_s: float,
    timeout_s: float = 2.0,
    connections: int = 256,
    processes: int = 1,
    cores: Sequence[int] | None = None,
    warm_up: bytes | None = None,
) -> ScheduleResult:
    """Send requests to `address` when they are due; blocks until all are resolved.

    All is as `running_schedule` says.
    """
    with running_schedule(
        address,
        requests,
        arrivals_s,
        duration_s=duration_s,
        timeout_s=timeout_s,
        connections=connections,
        processes=processes,
        cores=cores,
        warm_up=warm_up,
    ) as load:
        return load.result()


@contextmanager
def running_schedule(
    address: tuple[str, int],
    requests: Sequence[bytes],
    arrivals_s: NDArray[np.float64],
    *,
    duration_s: float,
    timeout_s: float = 2.0,
    connections: int = 256,
    processes: int = 1,
    cores: Sequence[int] | None = None,
    warm_up: bytes | None = None,
    keep_answers: bool = False,
) -> Iterator[RunningLoad]:
    """Send requests to `address` (host, port) when they are due, while the block runs.

    `requests`: whole ones, head and body; number i % len(requests) is due at `arrivals_s[i]`,
    seconds from the start, ascending, float64 [N]; they are dealt out to the processes in turn.
    `duration_s`: of the schedule. Every request is sent once and never again, not even when the
    server closes the connection under it. An answer needs a Content-Length or chunks: one that
    only the end of the connection delimits counts as none.

    `timeout_s`: counts from the scheduled arrival, like the latency; the connection is closed then,
    as a client would that gives up. `connections`: most open at a time, in all processes together.
    A few unmeasured requests open connections first: `warm_up`, or the last of `requests`.
    `cores`: what the sending processes pin themselves to. `keep_answers`: bring the bodies of the
    answers back, which costs the generator time.

    A server that is not there is a result like any other: every status is 0. Raises ValueError for
    impossible arguments, LoadError when a sending process fails (its traceback goes to stderr).
    """
    for name, value in {"duration_s": duration_s, "timeout_s": timeout_s}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")
    if not requests:
        raise ValueError("requests must not be empty")
    if not 1 <= processes <= connections:
        raise ValueError(
            f"processes must be within 1 .. connections ({connections}), got {processes}"
        )
    if not len(arrivals_s) or (np.diff(arrivals_s) < 0).any():
        raise ValueError("arrivals must be ascending, and one at least")

    processes = min(processes, len(arrivals_s))
    jobs = [
        _Job(
            address=address,
            requests=list(requests),
            warm_up=list(requests[-_WARM_UP_REQUESTS:]) if warm_up is None else [warm_up],
            order=np.arange(first, len(arrivals_s), processes) % len(requests),
            arrivals_s=arrivals_s[first::processes],
            timeout_s=timeout_s,
            connections=connections // processes + (first < connections % processes),
            cores=None if cores is None else list(cores),
            keep_answers=keep_answers,
        )
        for first in range(processes)
    ]
    with ExitStack() as stack:
        children = [stack.enter_context(_child()) for _ in jobs]
        for child, job in zip(children, jobs, strict=True):
            _write(child, pickle.dumps(job))
        for child in children:
            if not _pipe(child.stdout).readline():
                raise LoadError(f"a sending process ended with status {child.wait()}")
        # CLOCK_MONOTONIC is one clock for all processes.
        start_s = time.monotonic() + _LEAD_S
        for child in children:
            _write(child, f"{start_s!r}\n".encode())
        yield RunningLoad(children, arrivals_s, duration_s, start_s, keep_answers=keep_answers)


def _schedule_result(
    *,
    duration_s: float,
    arrivals_s: NDArray[np.float64],
    latencies_s: NDArray[np.float64],
    send_delays_s: NDArray[np.float64],
    codes: NDArray[np.int16],
    waited: NDArray[np.bool_],
    sent: NDArray[np.bool_],
    timed_out: NDArray[np.bool_],
    answers: Sequence[bytes] = (),
) -> ScheduleResult:
    """Count what LoadResult counts; rate: the mean of what was due."""
    return ScheduleResult(
        rate=len(arrivals_s) / duration_s,
        duration_s=duration_s,
        arrivals_s=arrivals_s,
        latencies_s=latencies_s,
        send_delays_s=send_delays_s,
        statuses=dict(sorted(Counter(codes.tolist()).items())),
        queued=int(waited.sum()),
        unsent=int((~sent).sum()),
        codes=codes,
        waited=waited,
        sent=sent,
        timed_out=timed_out,
        answers=answers,
    )


def _nearest_rank(values: NDArray[np.float64], q: float) -> float:
    # Interpolating, as numpy.percentile does, makes NaN out of infinities.
    if not 0 <= q <= 100:
        raise ValueError(f"q must be within 0 .. 100, got {q}")
    if len(values) == 0:
        return math.inf
    # The subtrahend keeps 99.9 % of 1,000 at rank 999 whatever the product's last bit is.
    rank = max(math.ceil(q * len(values) / 100 - 1e-9), 1)
    return float(np.partition(values, rank - 1)[rank - 1])


# Processes: the caller deals out jobs, waits until all are warm, and names one moment to start.


@dataclass(frozen=True, kw_only=True, eq=False)
class _Job:
    """One process's part; n is its number of requests. `order`, int64 [n]: which of `requests`.
    `warm_up`: what opens connections, the last one first.
    """

    address: tuple[str, int]
    requests: list[bytes]
    warm_up: list[bytes]
    order: NDArray[np.int64]
    arrivals_s: NDArray[np.float64]
    timeout_s: float
    connections: int
    cores: list[int] | None
    keep_answers: bool


class _Outcome:
    """What became of n requests, by their tickets 0 .. n-1. Nothing has, at first."""

    def __init__(self, n: int, *, keep_answers: bool) -> None:
        self.answers = [b""] * n if keep_answers else []
        self.latencies_s = [math.inf] * n
        self.send_delays_s = [0.0] * n
        self.statuses = [_NO_ANSWER] * n
        self.waited = [False] * n
        self.sent = [True] * n
        self.timed_out = [False] * n
        self.unresolved = n

    def drop_last(self, n: int) -> None:
        """Forget the last `n` requests, of which nothing has become."""
        arrays: tuple[list[Any], ...] = (
            *(self.answers, self.latencies_s, self.send_delays_s),
            *(self.statuses, self.waited, self.sent, self.timed_out),
        )
        for array in arrays:
            del array[-n:]
        self.unresolved -= n


@contextmanager
def _child() -> Iterator["subprocess.Popen[bytes]"]:
    """Run a sending process, and end it with the block."""
    # Not by multiprocessing: that imports the caller's main module again, whatever it drags in.
    with subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import _child_main; _child_main()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # Ctrl-C in the terminal must reach the parent alone, which then ends its children.
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _write(child: "subprocess.Popen[bytes]", message: bytes) -> None:
    # Buffered, so that all of it is written.
    _pipe(child.stdin).write(message)
    _pipe(child.stdin).flush()


def _pipe(file: IO[bytes] | None) -> IO[bytes]:
    assert file is not None
    return file


def _child_main() -> None:
    job: _Job = pickle.load(sys.stdin.buffer)  # noqa: S301 # written by this very module
    if job.cores is not None:
        os.sched_setaffinity(0, job.cores)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(_send(job))
    # Not sys.stdout.buffer: where PYTHONUNBUFFERED is set that is a raw file, which may write less
    # than it is given, and pickle does not look.
    with os.fdopen(sys.stdout.fileno(), "wb", closefd=False) as stdout:
        pickle.dump(outcome, stdout)


async def _send(job: _Job) -> _Outcome:
    with closing(_Sender(job)) as sender:
        n_warm_up = min(_WARM_UP_REQUESTS, job.connections)
        warm_up = [job.warm_up[-1 - i % len(job.warm_up)] for i in range(n_warm_up)]
        await sender.send(warm_up, [time.monotonic()] * n_warm_up)
        requests = [job.requests[i] for i in job.order.tolist()]
        # A collection would hold back sends and answers for milliseconds.
        gc.collect()
        gc.freeze()
        gc.disable()
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
        )
        sys.stdout.buffer.write(b"ready\n")
        sys.stdout.buffer.flush()
        start_s = float(await lines.readline())
        commands = asyncio.create_task(_follow(lines, sender))
        outcome = await sender.send(requests, (start_s + job.arrivals_s).tolist())
        commands.cancel()
        return outcome


async def _follow(lines: asyncio.StreamReader, sender: "_Sender") -> None:
    while line := await lines.readline():
        command = json.loads(line)
        if "move" in command:
            sender.move(tuple(command["move"]))
        else:
            sender.stop()


class _Sender:
    """The connections of one process, and the requests that it still has to see through.

    An idle connection is taken from a stack: the one used last is the least likely to be closed
    by the server meanwhile. Where none is idle the request waits in line, and a new connection is
    opened, up to the limit; whichever connection is free first takes the head of the line.
    """

    def __init__(self, job: _Job) -> None:
        self._address = job.address
        self._limit = job.connections
        self._timeout_s = job.timeout_s
        self._keep_answers = job.keep_answers
        self._loop = asyncio.get_running_loop()
        self._open: set[_Connection] = set()
        self._idle: list[_Connection] = []
        self._connecting: set[asyncio.Task[None]] = set()
        self._waiting: deque[int] = deque()
        self._alarm = _Alarm(self._loop, self._send_due)

    async def send(self, requests: list[bytes], due_s: list[float]) -> _Outcome:
        """Send each request when it is due (CLOCK_MONOTONIC); return when all are resolved."""
        self._requests, self._due_s = requests, due_s
        self._outcome = _Outcome(len(due_s), keep_answers=self._keep_answers)
        self._next = 0
        self._finished = self._loop.create_future()
        self._alarm.set(due_s[0])
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)
        await self._finished
        self._sweeper.cancel()
        return self._outcome

    def move(self, address: tuple[str, int]) -> None:
        """Send to `address` from now on; what is in flight is awaited where it is."""
        self._address = address
        for connection in self._idle:
            connection.close()
        self._idle.clear()

    def stop(self) -> None:
        """Send nothing more, and be done with what was due."""
        n_dropped = len(self._due_s) - self._next
        if n_dropped:
            del self._due_s[self._next :]
            self._outcome.drop_last(n_dropped)
            if self._outcome.unresolved == 0:
                self._finished.set_result(None)

    def close(self) -> None:
        self._alarm.close()
        for task in self._connecting:
            task.cancel()
        for connection in self._open:
            connection.abort()

    def _send_due(self) -> None:
        due_s, ticket = self._due_s, self._next
        # Fixed for this wake-up: however late the client is, answers must be read in between.
        now_s = time.monotonic()
        while ticket < len(due_s) and due_s[ticket] <= now_s:
            self._dispatch(ticket)
            ticket += 1
        self._next = ticket
        if ticket < len(due_s):
            self._alarm.set(due_s[ticket])

    def _dispatch(self, ticket: int) -> None:
        self._outcome.send_delays_s[ticket] = time.monotonic() - self._due_s[ticket]
        while self._idle:
            connection = self._idle.pop()
            if not connection.is_closing():
                connection.send(ticket, self._requests[ticket])
                return
        if len(self._open) + len(self._connecting) >= self._limit:
            self._outcome.waited[ticket] = True
        self._waiting.append(ticket)
        self._connect_if_needed()

    def _connect_if_needed(self) -> None:
        while (
            len(self._connecting) < len(self._waiting)
            and len(self._open) + len(self._connecting) < self._limit
        ):
            task = self._loop.create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connected)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                address = self._address
                await self._loop.create_connection(
                    lambda: _Connection(self, address, keep_answers=self._keep_answers), *address
                )
        except OSError:
            # Each attempt is one request's, so a server that is away is not asked in a tight loop.
            if self._waiting:
                self._drop()

    def _connected(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        self._connect_if_needed()

    def _drop(self) -> None:
        """Give up the head of the line, which has not been sent."""
        self._outcome.sent[self._waiting.popleft()] = False
        self._resolve()

    def _resolve(self) -> None:
        self._outcome.unresolved -= 1
        if self._outcome.unresolved == 0:
            self._finished.set_result(None)

    def _sweep(self) -> None:
        """Give up the requests whose time is over."""
        overdue_s = time.monotonic() - self._timeout_s
        while self._waiting and self._due_s[self._waiting[0]] < overdue_s:
            self._outcome.timed_out[self._waiting[0]] = True
            self._drop()
        for connection in self._open:
            ticket = connection.ticket
            if ticket != _NO_TICKET and self._due_s[ticket] < overdue_s:
                self._outcome.timed_out[ticket] = True
                connection.abort()
        self._sweeper = self._loop.call_later(_SWEEP_S, self._sweep)

    # What connections report.

    def made(self, connection: "_Connection") -> None:
        self._open.add(connection)
        self._use(connection)

    def answered(self, connection: "_Connection", ticket: int, status: int, answer: bytes) -> None:
        latency_s = time.monotonic() - self._due_s[ticket]
        if latency_s <= self._timeout_s:
            self._outcome.statuses[ticket] = status
            if self._keep_answers:
                self._outcome.answers[ticket] = answer
            if status == _OK:
                self._outcome.latencies_s[ticket] = latency_s
        else:
            self._outcome.timed_out[ticket] = True
        self._resolve()
        if not connection.is_closing():
            self._use(connection)

    def lost(self, connection: "_Connection") -> None:
        self._open.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.ticket != _NO_TICKET:
            self._resolve()
        self._connect_if_needed()

    def _use(self, connection: "_Connection") -> None:
        if connection.address != self._address:
            connection.close()
        elif self._waiting:
            ticket = self._waiting.popleft()
            connection.send(ticket, self._requests[ticket])
        else:
            self._idle.append(connection)


class _Connection(asyncio.Protocol):
    """One keep-alive connection; `ticket` is the request in flight on it."""

    _transport: asyncio.Transport

    def __init__(self, sender: _Sender, address: tuple[str, int], *, keep_answers: bool) -> None:
        self._sender = sender
        self.address = address
        self._answer: list[bytes] = []
        if keep_answers:  # the parser calls what is there when it is made
            self.on_body = self._answer.append
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._keep_alive = True
        self.ticket = _NO_TICKET

    def send(self, ticket: int, request: bytes) -> None:
        self.ticket = ticket
        self._transport.write(request)

    def is_closing(self) -> bool:
        return self._transport.is_closing()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._sender.made(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self.abort()
            return
        if not self._status:
            return
        status, ticket, answer = self._status, self.ticket, b"".join(self._answer)
        self._status, self.ticket = 0, _NO_TICKET
        self._answer.clear()
        if ticket == _NO_TICKET:  # an answer that nobody asked for
            self.abort()
            return
        if not self._keep_alive:
            self._transport.close()
        self._sender.answered(self, ticket, status, answer)

    def on_message_complete(self) -> None:
        # Only notes: the parser disguises errors of its callbacks as errors of the server.
        status = self._parser.get_status_code()
        if self._status:  # a second answer to one request
            self._keep_alive = False
        elif status >= _OK:  # 1xx only announce the answer
            self._status = status
            self._keep_alive = self._parser.should_keep_alive()

    def connection_lost(self, _exc: Exception | None) -> None:
        self._sender.lost(self)


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


class _Itimerspec(ctypes.Structure):
    _fields_ = [("interval", _Timespec), ("value", _Timespec)]


class _Alarm:
    """Calls back once at a set time, to some tens of microseconds: timerfd_create(2).

    Python 3.13 has os.timerfd_create; until that is the oldest one supported, it is called in libc.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, ring: Callable[[], None]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._fd: int = libc.timerfd_create(time.CLOCK_MONOTONIC, _TFD_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create failed")
        self._spec = _Itimerspec()
        self._spec_pointer = ctypes.byref(self._spec)
        self._loop, self._ring = loop, ring
        loop.add_reader(self._fd, self._on_readable)

    def set(self, at_s: float) -> None:
        """Ring at a time of CLOCK_MONOTONIC; at once where it has passed."""
        seconds = int(at_s)
        self._spec.value.seconds = seconds
        self._spec.value.nanoseconds = int((at_s - seconds) * 1e9)
        self._settime(self._fd, _TFD_TIMER_ABSTIME, self._spec_pointer, None)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        os.close(self._fd)

    def _on_readable(self) -> None:
        os.read(self._fd, 8)
        self._ring()
