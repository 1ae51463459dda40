"""The load generator itself: whether it tells the truth, and how fast it is.

Honesty: against a server that stalls, whose latencies are known beforehand. A request that is due
within a stall of S seconds is answered at its end, and stalls come every T seconds, so for arrivals
that do not wait P(latency > x) = (S - x) / T, and the p99 is S - T / 100: 0.9 s for one second
every ten. A closed loop sends one request into the stall, where an open loop has hundreds
(Schroeder, Wierman and Harchol-Balter, "Open Versus Closed: A Cautionary Tale", NSDI 2006).

Speed: the highest rate at which the generator, on one core, keeps its schedule against a server
that does nothing. Locust's fastest user stands beside it, on the same core.

Run as a program, `python -m loadtest.benchmarks.honesty PORT STALL_S EVERY_S`, this file is that
server; it never stalls when EVERY_S is 0.
"""

import argparse
import asyncio
import csv
import http.client
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import cast

import httptools
import numpy as np
import uvloop

from loadtest.benchmarks.stand import CANDIDATES, StandError, pinned, two_cores
from loadtest.open_loop import LoadResult, Target, run_open_loop
from loadtest.rate_search import highest_rate
from loadtest.redis_server import free_port
from loadtest.results import milliseconds, table, write_section
from loadtest.traffic import Traffic, Uniform

_STALL_S, _EVERY_S = 1.0, 10.0
_RATE = 200.0
# A stall must find a connection for each request that is due in it, and room to be accepted.
_CONNECTIONS = 1024
_BACKLOG = 4096
_LOWEST, _HIGHEST = 500.0, 50_000.0
_ON_TIME_S = 0.001
_LOCUST_USERS = 32
_LOCUSTFILE = Path(__file__).parent.parent / "locustfile.py"
_ANSWER = (
    b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 13\r\n\r\n{"scores":[]}'
)
# Of a shop whose ids have 13 digits.
_ITEM_IDS = (10**12, 10**13 - 1)


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `honesty` to the command line."""
    one = commands.add_parser("honesty", help="whether the load generator is honest, and how fast")
    one.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of each of the two loads that meet stalls; a probe of speed takes a tenth",
    )
    one.add_argument(
        "--page",
        type=Path,
        default=Path("docs/results/ab.md"),
        help="where the sections are written, with their figures beside it as .json",
    )
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure both; write two sections of the results page. Raises ValueError or StandError."""
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"--seconds must be positive, got {options.seconds:g}")
    served, measuring = two_cores()
    command = f"python -m loadtest honesty --seconds {options.seconds:g}"
    with pinned(measuring):
        # Whole periods: every load meets its share of stalls.
        seconds = _EVERY_S * math.ceil(options.seconds / _EVERY_S)
        with trivial_server(stall_s=_STALL_S, every_s=_EVERY_S, cores=served) as target:
            opened = run_open_loop(
                target,
                make_bodies(),
                rate=_RATE,
                duration_s=seconds,
                seed=1,
                connections=_CONNECTIONS,
            )
            closed_s = closed_loop(target, make_bodies(), seconds)
        _write_honesty(options.page, command, opened, closed_s)

        probe_s = options.seconds / 10
        with trivial_server(stall_s=0, every_s=0, cores=served) as target:
            rate = generator_rate(target, probe_s)
            locust_rate = locust_speed(target, probe_s)
        _write_speed(options.page, command, rate, locust_rate)
    return 0


def analytic_percentile_s(q: float, stall_s: float, every_s: float) -> float:
    """Return the latency that q percent of requests do not exceed, in seconds, when they are due
    at any time and the server is idle but for its stalls: max(0, S - (1 - q / 100) T).
    """
    return max(0.0, stall_s - (1 - q / 100) * every_s)


def closed_loop(
    target: Target, bodies: Sequence[bytes], seconds: float
) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Have one client send, wait and send again; return its latencies in seconds, float64 [N]."""
    latencies_s: list[float] = []
    with closing(http.client.HTTPConnection(target.host, target.port)) as connection:
        end_s = time.monotonic() + seconds
        while (sent_s := time.monotonic()) < end_s:
            connection.request("POST", target.path, bodies[len(latencies_s) % len(bodies)])
            connection.getresponse().read()
            latencies_s.append(time.monotonic() - sent_s)
    return np.array(latencies_s)


def generator_rate(target: Target, probe_s: float, *, highest: float = _HIGHEST) -> float:
    """Return the highest rate, requests/s, at which this process's core keeps the schedule."""
    bodies = make_bodies()

    def measure(rate: float) -> LoadResult:
        return run_open_loop(target, bodies, rate=rate, duration_s=probe_s, seed=int(rate))

    return highest_rate(measure, holds=keeps_schedule, low=_LOWEST, high=highest).rate


def keeps_schedule(result: LoadResult) -> bool:
    """Return whether 99 of 100 requests left within a millisecond, and each one was answered."""
    return result.late_sends_s < _ON_TIME_S and math.isfinite(result.percentile_s(100))


def locust_speed(target: Target, seconds: float) -> float:
    """Return the requests/s of Locust's FastHttpUser on this process's cores, as fast as it can.

    Raises StandError with what Locust said when it fails.
    """
    with tempfile.TemporaryDirectory(prefix="mneme-locust-") as folder:
        prefix = Path(folder) / "run"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "locust", "-f", str(_LOCUSTFILE), "--headless"),
                *("--host", f"http://{target.host}:{target.port}", "--csv", str(prefix)),
                *("--users", str(_LOCUST_USERS), "--spawn-rate", str(_LOCUST_USERS)),
                *("--run-time", f"{max(1, math.ceil(seconds))}s", "--candidates", str(CANDIDATES)),
                *("--item-ids", "-".join(map(str, _ITEM_IDS)), "--only-summary"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if done.returncode:
            raise StandError(f"locust ended with status {done.returncode}:\n{done.stdout}")
        with prefix.with_name("run_stats.csv").open(newline="") as file:
            (total,) = (row for row in csv.DictReader(file) if row["Name"] == "Aggregated")
    return float(total["Requests/s"])


def make_bodies(n: int = 500) -> list[bytes]:
    """Return bodies with 100 candidates of 13 digits each."""
    traffic = Traffic(
        population=500,
        user_id="user-{}",
        zipf=0.0,
        candidates=Uniform(least=CANDIDATES, most=CANDIDATES),
        history=None,
        item_ids=_ITEM_IDS,
    )
    return traffic.bodies(n, seed=1, now=0)


@contextmanager
def trivial_server(
    *, stall_s: float, every_s: float, cores: Sequence[int] | None = None
) -> Iterator[Target]:
    """Run a server that answers a constant, and stalls for `stall_s` seconds every `every_s` (0:
    never), until the block ends. Raises StandError when it does not start.
    """
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "loadtest.benchmarks.honesty", *map(str, (port, stall_s, every_s))],
        stdout=subprocess.PIPE,
        process_group=0,
        preexec_fn=None if cores is None else lambda: os.sched_setaffinity(0, cores),
    )
    assert process.stdout is not None
    try:
        if not process.stdout.readline():
            raise StandError(f"the trivial server ended with status {process.wait()}")
        yield Target(host="127.0.0.1", port=port, path="/score")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _write_honesty(
    page: Path,
    command: str,
    opened: LoadResult,
    closed_s: np.ndarray[tuple[int], np.dtype[np.float64]],
) -> None:
    analytic_s = [analytic_percentile_s(q, _STALL_S, _EVERY_S) for q in (50.0, 99.0, 99.9)]
    closed_p = [_percentile_s(closed_s, q) for q in (50.0, 99.0, 99.9)]
    opened_p = [opened.percentile_s(q) for q in (50.0, 99.0, 99.9)]
    rows = [
        ("computed", "", *map(milliseconds, analytic_s)),
        ("open loop", f"{len(opened.latencies_s):,}", *map(milliseconds, opened_p)),
        ("closed loop, one client", f"{len(closed_s):,}", *map(milliseconds, closed_p)),
    ]
    text = table(("", "requests", "p50 ms", "p99 ms", "p99.9 ms"), rows)
    sys.stdout.write(f"{text}\n")
    write_section(
        page,
        title="The generator's honesty",
        command=command,
        text=f"A server that stalls for {_STALL_S:g} s every {_EVERY_S:g} s. Open loop: "
        f"{_RATE:g} requests/s, Poisson arrivals, latency from the moment that a request was due. "
        "Closed loop: send, wait, send again; one request of thousands meets each stall."
        f"\n\n{text}",
        figures={
            "honesty_p99_s": opened_p[1],
            "honesty_analytic_p99_s": analytic_s[1],
            "honesty_closed_loop_p99_s": closed_p[1],
        },
    )


def _write_speed(page: Path, command: str, rate: float, locust_rate: float) -> None:
    heads = ("generator", "requests/s on one core", "")
    rows = [
        ("python -m loadtest rate", f"{rate:,.0f}", "on schedule: 99 of 100 within a millisecond"),
        (
            "Locust, FastHttpUser",
            f"{locust_rate:,.0f}",
            f"closed loop of {_LOCUST_USERS} users, no schedule",
        ),
    ]
    text = table(heads, rows)
    sys.stdout.write(f"{text}\n")
    write_section(
        page,
        title="The generator's speed",
        command=command,
        text=f"{CANDIDATES} candidates of 13 digits, a server on another core that answers a "
        f"constant, Poisson arrivals; nothing unsent.\n\n{text}",
        figures={
            "generator_requests_per_s_per_core": rate,
            "locust_requests_per_s_per_core": locust_rate,
        },
    )


def _percentile_s(latencies_s: np.ndarray[tuple[int], np.dtype[np.float64]], q: float) -> float:
    return float(np.percentile(latencies_s, q, method="inverted_cdf"))


# The server, a program of its own.


class _Constant(asyncio.Protocol):
    """Answers every request with the same bytes."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.abort()

    def on_message_complete(self) -> None:
        self._transport.write(_ANSWER)


async def _serve(port: int, stall_s: float, every_s: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Constant, "127.0.0.1", port, backlog=_BACKLOG)
    began_s = loop.time()

    def stall(number: int) -> None:
        time.sleep(stall_s)
        # On a grid, so that each period has one stall however long it really took.
        loop.call_at(began_s + (number + 1) * every_s, stall, number + 1)

    sys.stdout.write("listening\n")
    sys.stdout.flush()
    if every_s:
        loop.call_at(began_s + every_s, stall, 1)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as _runner:
        _runner.run(_serve(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
