"""What a service must keep under load, how it is asked, and the verdict on what was measured.

The flags of all that are here too, one set for every open-loop command.
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from loadtest.api_key import api_key_headers
from loadtest.open_loop import LoadResult, ScheduleResult, Target, run_schedule

PASS, FAIL, INVALID = 0, 1, 3
_NAMES = {PASS: "PASS", FAIL: "FAIL", INVALID: "INVALID"}
# A request that left later than this was sent late.
LATE_S = 0.001


class RateError(ValueError):
    """Settings of a load that do not fit together, or a service that cannot be asked."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a service must keep, over all requests, failed ones too.

    `max_p99_s`: at most this p99. `min_share_within`: at least this share (0 .. 1) answered with
    200 within `within_s` seconds. `max_errors`: at most this share answered otherwise or not at
    all. `min_rate`: at least so many requests/s answered with 200; of a search, the rate found.
    Raises RateError.
    """

    max_p99_s: float = 0.030
    within_s: float = 0.030
    min_share_within: float = 0.99
    max_errors: float = 0.001
    min_rate: float = 0.0

    def __post_init__(self) -> None:
        for name in ("max_p99_s", "within_s"):
            if not getattr(self, name) > 0:
                raise RateError(f"{name} must be positive seconds, got {getattr(self, name):g}")
        for name in ("min_share_within", "max_errors"):
            if not 0 <= getattr(self, name) <= 1:
                raise RateError(
                    f"{name} must be a share within 0 .. 1, got {getattr(self, name):g}"
                )
        if not 0 <= self.min_rate < math.inf:
            raise RateError(f"min_rate must be 0 or more requests/s, got {self.min_rate:g}")

    def misses(self, result: LoadResult) -> list[str]:
        """Return what the result misses, each as "what was measured, and against what"."""
        p99_s = result.percentile_s(99)
        within, errors = result.share_within(self.within_s), error_share(result)
        rate = result.goodput(math.inf)
        found = []
        if p99_s > self.max_p99_s:
            found.append(f"p99 {latency_text(p99_s)} > {latency_text(self.max_p99_s)}")
        if within < self.min_share_within:
            found.append(
                f"{_percent(within)} within {latency_text(self.within_s)} < "
                f"{_percent(self.min_share_within)}"
            )
        if errors > self.max_errors:
            found.append(f"errors {_percent(errors)} > {_percent(self.max_errors)}")
        if rate < self.min_rate:
            found.append(f"{rate:,.1f} requests/s answered < {self.min_rate:,.1f}")
        return found


@dataclass(frozen=True, kw_only=True)
class Sending:
    """How requests are sent: as `run_schedule` says. `max_late_s`: a run in which one of a hundred
    requests left later than this is invalid.
    """

    target: Target
    timeout_s: float
    connections: int
    processes: int
    max_late_s: float

    def run(
        self,
        requests: Sequence[bytes],
        arrivals_s: np.ndarray[Any, np.dtype[np.float64]],
        duration_s: float,
    ) -> ScheduleResult:
        """Send whole requests when they are due; the first one opens the connections."""
        return run_schedule(
            (self.target.host, self.target.port),
            requests,
            arrivals_s,
            duration_s=duration_s,
            timeout_s=self.timeout_s,
            connections=self.connections,
            processes=self.processes,
            warm_up=requests[0],
        )

    def fell_behind(self, result: LoadResult) -> str | None:
        """Return how the generator fell behind its schedule in this result; None if it did not."""
        if result.late_sends_s <= self.max_late_s:
            return None
        return (
            f"the generator fell behind: p99 of its delays {latency_text(result.late_sends_s)} > "
            f"{latency_text(self.max_late_s)}; give it more --processes, or a machine of its own"
        )


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`code`: PASS, FAIL or INVALID. `reasons`: what a FAIL or INVALID is about. `found`: what
    was measured, in words.
    """

    code: int
    reasons: Sequence[str]
    found: str

    @property
    def name(self) -> str:
        """Return PASS, FAIL or INVALID."""
        return _NAMES[self.code]

    @property
    def line(self) -> str:
        """Return the verdict in one line."""
        said = f": {'; '.join(self.reasons)}" if self.reasons else f" {self.found}"
        return f"{self.name}{said}"


def judge(result: ScheduleResult, objective: Objective, sending: Sending) -> Verdict:
    """Return the verdict on one result: INVALID before all else, because a generator that is late
    has not offered what it says.
    """
    behind = sending.fell_behind(result)
    misses = [behind] if behind else objective.misses(result)
    code = INVALID if behind else FAIL if misses else PASS
    return Verdict(code=code, reasons=misses, found=found_text(result, objective))


def add_run_flags(parser: argparse.ArgumentParser) -> None:
    """Add what every open-loop command takes: where to, the objective, how to send, the folder."""
    parser.add_argument("--url", required=True, help="of the service: http://127.0.0.1:8000")
    objective = Objective()
    for name, unit in (
        ("max_p99_s", "seconds"),
        ("within_s", "seconds"),
        ("min_share_within", "0 .. 1, of all requests, answered within --within-s"),
        ("max_errors", "0 .. 1, of all requests"),
        ("min_rate", "requests/s answered; of a search, the rate found"),
    ):
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=float,
            default=getattr(objective, name),
            help=f"objective: {unit} (default %(default)s)",
        )
    parser.add_argument("--timeout-s", type=float, default=2.0, help="default %(default)s")
    parser.add_argument("--connections", type=int, default=256, help="most open at a time")
    parser.add_argument("--processes", type=int, default=1, help="that send")
    parser.add_argument(
        "--max-late-s",
        type=float,
        default=LATE_S,
        help="p99 of the generator's own delays above which a run is invalid (default %(default)s)",
    )
    parser.add_argument(
        "--deadline-ms", type=int, help="header X-Deadline-Ms (default: the service's own deadline)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="of this run, new or empty (default: runs/COMMAND-TIME)"
    )


def objective_of(options: argparse.Namespace) -> Objective:
    """Return the objective of the flags; raises RateError."""
    return Objective(
        max_p99_s=options.max_p99_s,
        within_s=options.within_s,
        min_share_within=options.min_share_within,
        max_errors=options.max_errors,
        min_rate=options.min_rate,
    )


def sending_of(options: argparse.Namespace) -> Sending:
    """Return how the flags have requests sent; raises RateError for another URL than http's."""
    try:
        url = urlsplit(options.url)
        port = url.port or 80
    except ValueError as error:
        raise RateError(f"--url {options.url}: {error}") from error
    if url.scheme != "http" or not url.hostname or url.query or url.fragment:
        raise RateError(f"--url {options.url}: expected http://HOST:PORT, of the service")
    deadline = {} if options.deadline_ms is None else {"X-Deadline-Ms": str(options.deadline_ms)}
    return Sending(
        target=Target(
            host=url.hostname,
            port=port,
            path=f"{url.path.rstrip('/')}/score",
            headers={"Content-Type": "application/json", **deadline, **api_key_headers()},
        ),
        timeout_s=options.timeout_s,
        connections=options.connections,
        processes=options.processes,
        max_late_s=options.max_late_s,
    )


def found_text(result: LoadResult, objective: Objective) -> str:
    """Return what was measured, in words."""
    return (
        f"p99 {latency_text(result.percentile_s(99))}, "
        f"{_percent(result.share_within(objective.within_s))} within "
        f"{latency_text(objective.within_s)}, errors {_percent(error_share(result))}, "
        f"{result.goodput(math.inf):,.1f} requests/s answered"
    )


def error_share(result: LoadResult) -> float:
    """Return the share of the requests that failed, 0 .. 1."""
    # Not 1 minus the others: 999 of 1,000 must not miss an objective of 0.001 by rounding.
    return int(np.isinf(result.latencies_s).sum()) / len(result.latencies_s)


def latency_text(seconds: float) -> str:
    """Return e.g. "30 ms"; "infinite" where there was no answer."""
    return f"{1000 * seconds:.4g} ms" if math.isfinite(seconds) else "infinite"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
