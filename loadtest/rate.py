"""`python -m loadtest rate`: an open-loop load, and whether the service kept its objective.

Requests leave when they are due, and latencies run from then (see loadtest/open_loop.py); failed
requests count as infinitely slow. A run is a folder: settings.json, requests.parquet (a row a
request: stage, due_s, latency_s, status, send_delay_s, queued, sent), report.json and report.md. In
the JSON a latency of null is an infinite one: more requests failed than that percentile leaves out.

The exit code says what the verdict says: 0 the objective is kept, 1 it is missed, 3 the run is
invalid, because the generator itself fell behind. 2 is an error; nothing was measured then.
"""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import replace

import httpx
import numpy as np

from loadtest.objective import (
    FAIL,
    INVALID,
    PASS,
    Objective,
    RateError,
    Sending,
    Verdict,
    add_run_flags,
    found_text,
    judge,
    objective_of,
    sending_of,
)
from loadtest.open_loop import LoadResult, ScheduleResult, Target
from loadtest.rate_search import RateSearch, highest_rate
from loadtest.run_folder import Part, Run, chosen_part, conclude, open_run
from loadtest.schedules import ARRIVALS, Bursts, Stage, draw_arrivals, parse_stages, steady
from loadtest.traffic import add_flags, traffic_of

_PREFLIGHT_TIMEOUT_S = 10.0
# A service that is there, but has no room just now.
_BUSY = (408, 429)


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `rate` to the command line."""
    one = commands.add_parser(
        "rate",
        help="an open-loop load with a verdict: a rate, stages, or the highest rate that holds",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    load = one.add_mutually_exclusive_group(required=True)
    load.add_argument("--rate", type=float, help="requests/s, for --duration-s")
    load.add_argument(
        "--stages",
        help="RATExSECONDS, RATE-RATExSECONDS for a ramp: 100x10,100-500x20,2000x2,500x10",
    )
    load.add_argument(
        "--search", action="store_true", help="the highest rate that keeps the objective"
    )
    one.add_argument(
        "--duration-s", type=float, help="of --rate (default 30), or of each probe of --search (10)"
    )
    one.add_argument("--lowest", type=float, default=50.0, help="rate at which a search begins")
    one.add_argument("--highest", type=float, default=10_000.0, help="rate that it never exceeds")
    one.add_argument(
        "--precision", type=float, default=0.05, help="of the search (default %(default)s)"
    )
    one.add_argument("--arrivals", choices=ARRIVALS, default="poisson")
    bursts = Bursts()
    one.add_argument(
        "--burst-factor",
        type=float,
        default=bursts.factor,
        help="bursty: rate in a burst over the stated rate (default %(default)s)",
    )
    one.add_argument(
        "--burst-share",
        type=float,
        default=bursts.share,
        help="bursty: share of the time that is burst (default %(default)s)",
    )
    one.add_argument(
        "--burst-s",
        type=float,
        default=bursts.length_s,
        help="bursty: mean length of a burst (default %(default)s)",
    )
    one.add_argument("--bodies", type=int, default=2000, help="different ones (default 2000)")
    add_flags(one)
    add_run_flags(one)
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code. Raises ValueError for what cannot be run."""
    folder, started = open_run(options.folder, "rate")
    objective, sending = objective_of(options), sending_of(options)
    bursts = Bursts(
        factor=options.burst_factor, share=options.burst_share, length_s=options.burst_s
    )
    if options.bodies < 1:
        raise RateError(f"at least one body is needed, got --bodies {options.bodies}")
    stages = None if options.search else _stages(options)
    bodies = traffic_of(options).bodies(
        options.bodies, seed=options.seed, now=int(started.timestamp())
    )
    requests = [sending.target.request(body) for body in bodies]
    preflight(sending.target, bodies[0])

    def offer(stages: Sequence[Stage], seed: int) -> ScheduleResult:
        arrivals_s = draw_arrivals(stages, options.arrivals, seed, bursts)
        return sending.run(requests, arrivals_s, sum(stage.duration_s for stage in stages))

    if stages is None:
        probe_s = 10.0 if options.duration_s is None else options.duration_s
        done = search(
            lambda rate, seed: offer(steady(rate, probe_s), seed),
            objective,
            sending,
            lowest=options.lowest,
            highest=options.highest,
            precision=options.precision,
            seed=options.seed,
        )
    else:
        result = offer(stages, options.seed)
        done = Run(
            verdict=judge(result, objective, sending), judged=result, parts=_parts(result, stages)
        )
    return conclude(folder, options, started, objective, done)


def _stages(options: argparse.Namespace) -> tuple[Stage, ...]:
    if options.stages is None:
        if not options.rate > 0:
            raise RateError(f"--rate must be positive requests/s, got {options.rate:g}")
        return steady(options.rate, 30.0 if options.duration_s is None else options.duration_s)
    if options.duration_s is not None:
        raise RateError("--stages say how long they last: leave --duration-s out")
    return parse_stages(options.stages)


def _parts(result: ScheduleResult, stages: Sequence[Stage]) -> list[Part]:
    ends_s = np.cumsum([stage.duration_s for stage in stages])
    # A due time may be rounded up to the very end of the last stage.
    stage_N = np.minimum(np.searchsorted(ends_s, result.arrivals_s, side="right"), len(stages) - 1)
    return [
        Part(name=str(stage), result=chosen_part(result, stage_N == number, stage.duration_s))
        for number, stage in enumerate(stages)
    ]


def search(
    offer: Callable[[float, int], ScheduleResult],
    objective: Objective,
    sending: Sending,
    *,
    lowest: float,
    highest: float,
    precision: float,
    seed: int,
) -> Run:
    """Find the highest rate that keeps the objective; every probe is a part of the run.

    `offer`: sends at a rate (requests/s), with a seed. Bounds and precision are those of
    `highest_rate`, which raises ValueError for impossible ones. A search that the generator itself
    ended is invalid where it found less than the objective asks for, and warns where not.
    """
    results: list[ScheduleResult] = []
    of_probe = replace(objective, min_rate=0.0)

    def measure(rate: float) -> LoadResult:
        results.append(offer(rate, seed + len(results)))
        return results[-1]

    def holds(result: LoadResult) -> bool:
        return sending.fell_behind(result) is None and not of_probe.misses(result)

    found: RateSearch = highest_rate(
        measure,
        holds=holds,
        low=lowest,
        high=highest,
        precision=precision,
    )
    parts = [
        Part(name=f"{probe.rate:,.1f}/s, {'held' if probe.held else 'not held'}", result=result)
        for probe, result in zip(found.probes, results, strict=True)
    ]
    # What ended the search: of the failed probes, the one of the lowest rate.
    failed = min((p for p in found.probes if not p.held), key=lambda p: p.rate, default=None)
    limit = None if failed is None else sending.fell_behind(failed.result)
    at_best = next((result for result in results if result is found.result), results[-1])
    said = f"highest rate {found.rate:,.1f} requests/s; {found_text(at_best, objective)}"
    if found.rate == 0 and limit is None:
        verdict = Verdict(code=FAIL, reasons=of_probe.misses(results[-1]), found=said)
    elif limit is not None and (found.rate == 0 or found.rate < objective.min_rate):
        verdict = Verdict(code=INVALID, reasons=[limit], found=said)
    elif found.rate < objective.min_rate:
        reason = f"highest rate {found.rate:,.1f} requests/s < {objective.min_rate:,.1f}"
        verdict = Verdict(code=FAIL, reasons=[reason], found=said)
    else:
        verdict = Verdict(code=PASS, reasons=(), found=said)
    warnings = []
    if limit is not None and verdict.code == PASS:
        warnings.append(f"the search ended at the generator's own limit: {limit}")
    if found.rate == highest:
        warnings.append(f"the highest rate that may be tried held: raise --highest {found.rate:g}")
    return Run(
        verdict=verdict,
        judged=at_best,
        parts=parts,
        warnings=warnings,
        figures={"highest_rate": found.rate},
    )


def preflight(target: Target, body: bytes) -> None:
    """Send one request; raises RateError when the service is not there, or does not understand it.

    A service that is overloaded or not ready is left to the measurement.
    """
    host = f"[{target.host}]" if ":" in target.host else target.host
    url = f"http://{host}:{target.port}{target.path}"
    try:
        answer = httpx.post(
            url, content=body, headers=dict(target.headers), timeout=_PREFLIGHT_TIMEOUT_S
        )
    except httpx.ConnectError as error:
        raise RateError(f"nothing answers at {url}: {error}") from error
    except httpx.TransportError:
        return
    if 300 <= answer.status_code < 500 and answer.status_code not in _BUSY:
        raise RateError(f"POST {url} answers {answer.status_code}: {answer.text[:300]}")
