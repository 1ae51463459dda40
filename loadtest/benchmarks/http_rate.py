"""The service over HTTP at one rate, and the highest rate that holds the deadline.

Open loop, Poisson arrivals. Written for a machine with a GPU and many cores: a quarter of the cores
sends and holds Redis, the others serve.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from loadtest.benchmarks.race import DEADLINE_S, holds
from loadtest.benchmarks.stand import histories, make_requests, pinned, service
from loadtest.bundles import make_bundle
from loadtest.open_loop import LoadResult, run_open_loop
from loadtest.rate_search import highest_rate
from loadtest.results import milliseconds, table, write_section

_LENGTH = 1000
_MEASURED_S, _SEARCHED_S = 30.0, 10.0
_SENDERS = 4


def run(folder: Path, page: Path, *, provider: str, workers: int, rate: float) -> None:
    """Measure at `rate`, then search for the highest; write a section of the results page."""
    bundle = make_bundle("imn-3p-plus", folder, history_length=_LENGTH)
    bodies = make_requests(bundle).bodies()
    cores = sorted(os.sched_getaffinity(0))
    n_measuring = max(1, len(cores) // 4)
    measuring, serving = cores[:n_measuring], cores[n_measuring:] or cores
    flags = ["--provider", provider, "--workers", str(workers)]
    with (
        pinned(measuring),
        histories(bundle, _LENGTH) as redis_url,
        service(bundle, redis_url, cores=serving, threads=1, flags=flags) as ours,
    ):

        def load(offered: float, seconds: float = _SEARCHED_S) -> LoadResult:
            return run_open_loop(
                ours.target,
                bodies,
                rate=offered,
                duration_s=seconds,
                seed=int(offered),
                processes=min(_SENDERS, n_measuring),
                cores=measuring,
            )

        at_rate = load(rate, _MEASURED_S)
        found = highest_rate(load, holds=holds, low=rate / 2, high=64 * rate)
        results = [at_rate] if found.result is None else [at_rate, found.result]
    for result in results:
        print(*_row(result), sep="\t", flush=True)
    prefix = "gpu_" if provider == "cuda" else "cpu_"
    heads = ("requests/s", "share within 30 ms", "p50 ms", "p99 ms", "p99.9 ms", "client late ms")
    write_section(
        page,
        title=f"HTTP on {'a GPU' if provider == 'cuda' else 'the CPU'}",
        command=f"python -m loadtest http --provider {provider} --workers {workers} --rate {rate}",
        text=f"IMN 3P+, 100 candidates, L = {_LENGTH}; first at the rate asked for, then at the "
        "highest with p99 <= 30 ms. A refused request counts as never answered.\n\n"
        + table(heads, [_row(result) for result in results]),
        figures={
            f"{prefix}http_share_within_30ms_at_{rate:.0f}": at_rate.share_within(DEADLINE_S),
            f"{prefix}http_max_rate_p99_30ms": found.rate,
        },
    )


def _row(result: LoadResult) -> Sequence[object]:
    return (
        *(f"{result.rate:.0f}", f"{result.share_within(DEADLINE_S):.4%}"),
        *(milliseconds(result.percentile_s(q)) for q in (50, 99, 99.9)),
        milliseconds(result.late_sends_s),
    )
