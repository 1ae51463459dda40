"""`python -m loadtest soak`: half the capacity for half an hour, and what grows meanwhile."""

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from loadtest.benchmarks.stand import RunningService
from loadtest.chaos.bench import Bench, Watched
from loadtest.chaos.preparation import add_flags, make_bench
from loadtest.chaos.stores import single_store
from loadtest.results import milliseconds, table, write_section

TITLE = "Soak"

_MB = 1e6
_MINUTE_S = 60.0
_LEAST_MINUTES = 6
# What is allocated for the first requests is kept for all others.
_WARM_UP_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Minute:
    """What a minute of the soak showed; `rss_bytes` and `descriptors` at its end, of all processes
    of the service together.
    """

    requests: int
    refused: int
    failed: int
    wrong: int
    lost: int
    doubled: int
    p99_s: float
    rss_bytes: int
    descriptors: int
    processes: int


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `soak` to the commands of a program."""
    one = commands.add_parser("soak", help="half the capacity for long: memory, descriptors, p99")
    one.add_argument("--minutes", type=float, default=30.0, help="how long (default %(default)s)")
    one.add_argument("--workers", type=int, default=1, help="processes that serve")
    add_flags(one, share=0.5)
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Soak; return 0 when no score was wrong and no event lost. What grew is for the reader."""
    # A short soak has as many, and shorter ones.
    n = max(round(options.minutes), _LEAST_MINUTES)
    minute_s = _MINUTE_S * options.minutes / n
    with make_bench(options, seconds=minute_s, slow_clients=0) as bench:
        minutes = soak(bench, n, minute_s, workers=options.workers)
        rate, capacity = bench.rate, bench.capacity
    about = (
        f"{rate:.0f} requests/s, {rate / capacity:.2f} of the capacity of {capacity:.0f}, in "
        f"{n} parts of {minute_s:.0f} s; events are posted beside them. Memory and descriptors are "
        "those of all processes of the service; growth is the mean of the last third over that of "
        "the first, after a tenth of the time as warm-up."
    )
    found = figures(minutes)
    summary = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
    write_section(
        options.page,
        title=TITLE,
        command=f"python -m loadtest soak --minutes {options.minutes:g}",
        text=f"{about}\n\n{summary}\n\n{_table(minutes)}",
        figures=found,
    )
    sys.stdout.write(f"{summary}\n")
    return 1 if any(minute.wrong or minute.lost or minute.doubled for minute in minutes) else 0


def soak(bench: Bench, n: int, minute_s: float, *, workers: int) -> list[Minute]:
    """Return what n minutes of `minute_s` seconds under load showed."""
    minutes: list[Minute] = []
    with single_store() as store:
        bench.fill(store)
        with bench.serving(store.url, "--workers", str(workers)) as ours:
            for number in range(n):
                watched = bench.watch(
                    [ours], store, lambda _: time.sleep(minute_s), name=f"soak-{number}"
                )
                minutes.append(_minute(watched, ours))
                sys.stdout.write(f"{_table(minutes[-1:], first=number + 1)}\n")
                sys.stdout.flush()
    return minutes


def figures(minutes: Sequence[Minute]) -> dict[str, float]:
    """Return the figures of the page's JSON; growth of 0.01 is 1 %."""
    return {
        "soak_rss_growth": growth([minute.rss_bytes for minute in minutes]),
        "soak_descriptors_growth": growth([minute.descriptors for minute in minutes]),
        "soak_p99_growth": growth([minute.p99_s for minute in minutes]),
        "soak_requests": sum(minute.requests for minute in minutes),
        "soak_wrong_scores": sum(minute.wrong for minute in minutes),
        "soak_lost_events": sum(minute.lost for minute in minutes),
    }


def growth(values: Sequence[float]) -> float:
    """Return the mean of the last third over that of the first, less 1; a tenth at the start is
    left out. Needs six values at least.
    """
    warm = values[max(1, round(_WARM_UP_SHARE * len(values))) :]
    third = len(warm) // 3
    first, last = sum(warm[:third]), sum(warm[-third:])
    return last / first - 1


def _minute(watched: Watched, ours: RunningService) -> Minute:
    result = watched.result
    refused = sum(result.statuses.get(status, 0) for status in (429, 503))
    pids = ours.pids()
    return Minute(
        requests=len(result.codes),
        refused=refused,
        failed=len(result.codes) - refused - result.statuses.get(200, 0),
        wrong=watched.verdicts.count("wrong"),
        lost=watched.audit.lost,
        doubled=watched.audit.doubled,
        p99_s=result.accepted_percentile_s(99),
        rss_bytes=sum(map(_rss_bytes, pids)),
        descriptors=sum(map(_descriptors, pids)),
        processes=len(pids),
    )


def _rss_bytes(pid: int) -> int:
    with suppress(OSError):  # a process may have ended meanwhile
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _descriptors(pid: int) -> int:
    with suppress(OSError):
        return len(list(Path(f"/proc/{pid}/fd").iterdir()))
    return 0


def _table(minutes: Sequence[Minute], first: int = 1) -> str:
    heads = (
        *("minute", "requests", "refused", "failed", "wrong", "lost", "doubled"),
        *("p99 ms", "RSS MB", "descriptors", "processes"),
    )
    return table(
        heads,
        [
            (
                *(number, f"{minute.requests:,}", minute.refused, minute.failed, minute.wrong),
                *(minute.lost, minute.doubled, milliseconds(minute.p99_s)),
                *(f"{minute.rss_bytes / _MB:.1f}", minute.descriptors, minute.processes),
            )
            for number, minute in enumerate(minutes, start=first)
        ],
    )
