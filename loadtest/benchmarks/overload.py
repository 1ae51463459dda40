"""Up to three times the capacity: what is answered in time, and what is refused.

Goodput is the rate of requests answered within the deadline. Open loop, Poisson arrivals.
"""

from collections.abc import Sequence
from pathlib import Path

from loadtest.benchmarks.race import DEADLINE_S
from loadtest.benchmarks.stand import histories, make_requests, pinned, service, two_cores
from loadtest.bundles import make_bundle
from loadtest.open_loop import LoadResult, run_open_loop
from loadtest.results import milliseconds, table, write_section

_LENGTH = 1000
_SEARCH_S, _MEASURED_S = 6.0, 15.0
_SEARCHED_RATES = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1)
_MULTIPLES = (0.5, 1.0, 1.5, 2.0, 3.0)
# Far more than a core can score: what is answered of it in time is a first guess of capacity.
_FLOOD = 1000.0


def run(folder: Path, page: Path) -> None:
    """Measure goodput at multiples of the capacity; write a section of the results page."""
    bundle = make_bundle("imn-3p-plus", folder, history_length=_LENGTH)
    bodies = make_requests(bundle).bodies()
    served, measuring = two_cores()
    with (
        pinned(measuring),
        histories(bundle, _LENGTH) as redis_url,
        service(bundle, redis_url, cores=served, threads=1) as ours,
    ):

        def load(rate: float, seconds: float) -> LoadResult:
            return run_open_loop(
                ours.target,
                bodies,
                rate=rate,
                duration_s=seconds,
                seed=int(rate),
                cores=measuring,
            )

        guess = load(_FLOOD, _SEARCH_S).goodput(DEADLINE_S)
        capacity = max(
            load(share * guess, _SEARCH_S).goodput(DEADLINE_S) for share in _SEARCHED_RATES
        )
        capacity = max(capacity, guess)
        results = [(times, load(times * capacity, _MEASURED_S)) for times in _MULTIPLES]
    rows = [_row(times, result) for times, result in results]
    for row in rows:
        print(*row, sep="\t", flush=True)
    heads = (
        "offered",
        "requests/s",
        "goodput/s",
        "refused %",
        "accepted p50 ms",
        "accepted p99 ms",
    )
    (last,) = (result for times, result in results if times == _MULTIPLES[-1])
    write_section(
        page,
        title="Overload",
        command="python -m loadtest overload",
        text=(
            f"IMN 3P+, 100 candidates, L = {_LENGTH}, one core; capacity is the highest goodput "
            f"seen at any lower rate or in a flood: {capacity:.0f} requests/s.\n\n"
            + table(heads, rows)
        ),
        figures={
            "capacity_requests_per_s": capacity,
            "goodput_at_3x": last.goodput(DEADLINE_S) / capacity,
            "accepted_p99_ms_at_3x": 1000 * last.accepted_percentile_s(99),
        },
    )


def _row(times: float, result: LoadResult) -> Sequence[object]:
    n = len(result.latencies_s)
    refused = 1 - result.statuses.get(200, 0) / n
    return (
        *(f"{times:.1f} x capacity", f"{result.rate:.0f}", f"{result.goodput(DEADLINE_S):.0f}"),
        f"{100 * refused:.1f}",
        milliseconds(result.accepted_percentile_s(50)),
        milliseconds(result.accepted_percentile_s(99)),
    )
