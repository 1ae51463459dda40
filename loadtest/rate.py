"""`python -m loadtest rate`: an open-loop load, and whether the service kept its objective.

Requests leave when they are due, and latencies run from then (see loadtest/open_loop.py); failed
requests count as infinitely slow. A run is a folder: settings.json, requests.parquet (a row a
request: stage, due_s, latency_s, status, send_delay_s, queued, sent), report.json and report.md. In
the JSON a latency of null is an infinite one: more requests failed than that percentile leaves out.

The exit code says what the verdict says: 0 the objective is kept, 1 it is missed, 3 the run is
invalid, because the generator itself fell behind. 2 is an error; nothing was measured then.
"""

import argparse
import datetime
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import polars as pl

from loadtest.machine import describe_machine
from loadtest.open_loop import LoadResult, ScheduleResult, Target, run_schedule
from loadtest.rate_search import RateSearch, highest_rate
from loadtest.results import table
from loadtest.schedules import ARRIVALS, Bursts, Stage, draw_arrivals, parse_stages, steady
from loadtest.traffic import add_flags, traffic_of

PASS, FAIL, INVALID = 0, 1, 3
_NAMES = {PASS: "PASS", FAIL: "FAIL", INVALID: "INVALID"}
_PERCENTILES = {"p50_s": 50.0, "p90_s": 90.0, "p99_s": 99.0, "p999_s": 99.9}
_PREFLIGHT_TIMEOUT_S = 10.0
# A request that left later than this was sent late.
_LATE_S = 0.001
# A service that is there, but has no room just now.
_BUSY = (408, 429)

_LEGEND = (
    "Latencies run from the moment that a request was due; a dash is infinite: more requests "
    "failed than that percentile leaves out. Of what is judged:"
)

Report = dict[str, Any]


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
        within, errors = result.share_within(self.within_s), _error_share(result)
        rate = result.goodput(math.inf)
        found = []
        if p99_s > self.max_p99_s:
            found.append(f"p99 {_latency(p99_s)} > {_latency(self.max_p99_s)}")
        if within < self.min_share_within:
            found.append(
                f"{_percent(within)} within {_latency(self.within_s)} < "
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
            f"the generator fell behind: p99 of its delays {_latency(result.late_sends_s)} > "
            f"{_latency(self.max_late_s)}; give it more --processes, or a machine of its own"
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
    def line(self) -> str:
        """Return the verdict in one line."""
        said = f": {'; '.join(self.reasons)}" if self.reasons else f" {self.found}"
        return f"{_NAMES[self.code]}{said}"


@dataclass(frozen=True, kw_only=True, eq=False)
class Part:
    """A row of the report's table: a stage, or a probe of a search; `result` is None where no
    request was due.
    """

    name: str
    result: ScheduleResult | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Run:
    """What came of a load. `judged`: the result that the verdict is about; `parts`: all requests.
    `figures`: what else the report says, by name.
    """

    verdict: Verdict
    judged: ScheduleResult
    parts: Sequence[Part]
    warnings: Sequence[str] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


def judge(result: ScheduleResult, objective: Objective, sending: Sending) -> Verdict:
    """Return the verdict on one result: INVALID before all else, because a generator that is late
    has not offered what it says.
    """
    behind = sending.fell_behind(result)
    misses = [behind] if behind else objective.misses(result)
    code = INVALID if behind else FAIL if misses else PASS
    return Verdict(code=code, reasons=misses, found=_found(result, objective))


# The command.


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
        default=_LATE_S,
        help="p99 of the generator's own delays above which a run is invalid (default %(default)s)",
    )
    parser.add_argument(
        "--deadline-ms", type=int, help="header X-Deadline-Ms (default: the service's own deadline)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="of this run, new or empty (default: runs/COMMAND-TIME)"
    )


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


def chosen_part(
    result: ScheduleResult, chosen: np.ndarray[Any, np.dtype[np.bool_]], duration_s: float
) -> ScheduleResult | None:
    """Return the result of the chosen requests (bool [N]); None where there are none."""
    return result.select(chosen, duration_s) if chosen.any() else None


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
    said = f"highest rate {found.rate:,.1f} requests/s; {_found(at_best, objective)}"
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


# What `rate` and `replay` share.


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
            headers={"Content-Type": "application/json", **deadline},
        ),
        timeout_s=options.timeout_s,
        connections=options.connections,
        processes=options.processes,
        max_late_s=options.max_late_s,
    )


def open_run(folder: Path | None, command: str) -> tuple[Path, datetime.datetime]:
    """Return the folder of a run, not made yet, and the present time; raises RateError where the
    folder holds something already.
    """
    started = datetime.datetime.now(datetime.UTC)
    folder = folder or Path("runs") / f"{command}-{started:%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RateError(f"{folder} is there already and not empty: name another --folder")
    return folder, started


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


def conclude(
    folder: Path,
    options: argparse.Namespace,
    started: datetime.datetime,
    objective: Objective,
    done: Run,
) -> int:
    """Write the run's folder, say what came of it, and return the exit code."""
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name != "run"
    }
    settings |= {"started": started.isoformat(), "machine": describe_machine()}
    report = make_report(done, objective, options.max_late_s)
    page = markdown(report)
    write_run(folder, settings, _requests(done.parts), report, page)
    sys.stdout.write(f"{page}\n\nwritten to {folder}\n{done.verdict.line}\n")
    return done.verdict.code


def make_report(done: Run, objective: Objective, max_late_s: float) -> Report:
    """Return report.json: what can be said of a run, as numbers and the verdict's line."""
    judged = done.judged
    late_s = judged.send_delays_s
    return {
        "verdict": _NAMES[done.verdict.code],
        "line": done.verdict.line,
        "exit_code": done.verdict.code,
        "warnings": list(done.warnings),
        "objective": vars(objective),
        **done.figures,
        "judged": _figures(judged, objective),
        "stages": [
            {"stage": part.name, **(_figures(part.result, objective) if part.result else {})}
            for part in done.parts
        ],
        "statuses": {str(status): n for status, n in judged.statuses.items()},
        "late_sends": {
            "later_than_s": _LATE_S,
            "requests": int((late_s > _LATE_S).sum()),
            "p99_s": judged.late_sends_s,
            "max_s": float(late_s.max()),
            "max_late_s": max_late_s,
        },
    }


def _figures(result: LoadResult, objective: Objective) -> dict[str, float | int | None]:
    percentiles = {name: result.percentile_s(q) for name, q in _PERCENTILES.items()}
    return {
        "requests": len(result.latencies_s),
        "offered_per_s": result.rate,
        "answered_per_s": result.goodput(math.inf),
        **{name: value if math.isfinite(value) else None for name, value in percentiles.items()},
        "share_within": result.share_within(objective.within_s),
        "errors": _error_share(result),
        "late_sends": int((result.send_delays_s > _LATE_S).sum()),
        "queued": result.queued,
        "unsent": result.unsent,
    }


def markdown(report: Report) -> str:
    """Return report.md, made from report.json alone."""
    within = _latency(report["objective"]["within_s"])
    heads = (
        *("stage", "requests", "offered/s", "answered/s", "p50 ms", "p90 ms", "p99 ms"),
        *("p99.9 ms", f"% within {within}", "errors %", "late sends", "queued", "unsent"),
    )
    stages = report["stages"]
    if len(stages) > 1:
        stages = [*stages, {"stage": "judged", **report["judged"]}]
    late = report["late_sends"]
    statuses = ", ".join(
        f"{n:,} of {'no answer' if status == '0' else status}"
        for status, n in report["statuses"].items()
    )
    judged = report["judged"]
    facts = (
        f"by status: {statuses}",
        f"left more than {_latency(late['later_than_s'])} late: {late['requests']:,}",
        f"delay of the generator: p99 {_latency(late['p99_s'])}, most {_latency(late['max_s'])}",
        f"found all connections busy: {judged['queued']:,}; never sent: {judged['unsent']:,}",
    )
    return "\n\n".join(
        [
            f"# {report['line']}",
            *(f"Warning: {warning}." for warning in report["warnings"]),
            table(heads, [_row(stage) for stage in stages]),
            _LEGEND,
            "\n".join(f"- {fact}" for fact in facts),
        ]
    )


def _row(stage: Mapping[str, Any]) -> Sequence[object]:
    if "requests" not in stage:
        return (stage["stage"], 0, *["-"] * 11)
    return (
        stage["stage"],
        f"{stage['requests']:,}",
        f"{stage['offered_per_s']:,.1f}",
        f"{stage['answered_per_s']:,.1f}",
        *("-" if stage[name] is None else f"{1000 * stage[name]:.3f}" for name in _PERCENTILES),
        f"{100 * stage['share_within']:.2f}",
        f"{100 * stage['errors']:.3f}",
        *(f"{stage[name]:,}" for name in ("late_sends", "queued", "unsent")),
    )


def write_run(
    folder: Path,
    settings: Mapping[str, Any],
    requests: pl.DataFrame,
    report: Report,
    page: str,
) -> None:
    """Write the folder of a run, all or nothing."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        unfinished.chmod(0o755)
        for name, content in (("settings.json", settings), ("report.json", report)):
            (unfinished / name).write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
        requests.write_parquet(unfinished / "requests.parquet")
        (unfinished / "report.md").write_text(f"{page}\n")
        unfinished.replace(folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise


def _requests(parts: Sequence[Part]) -> pl.DataFrame:
    """One row a request; `stage` is the number of its row in the report's table, and due_s counts
    from the start of the schedule, of a search from the start of the probe.
    """
    return pl.concat(
        [
            pl.DataFrame(
                {
                    "due_s": part.result.arrivals_s,
                    "latency_s": part.result.latencies_s,
                    "status": part.result.codes.astype(np.int32),
                    "send_delay_s": part.result.send_delays_s,
                    "queued": part.result.waited,
                    "sent": part.result.sent,
                }
            ).select(pl.lit(number, dtype=pl.Int32).alias("stage"), pl.all())
            for number, part in enumerate(parts)
            if part.result is not None
        ]
    )


def _found(result: LoadResult, objective: Objective) -> str:
    return (
        f"p99 {_latency(result.percentile_s(99))}, "
        f"{_percent(result.share_within(objective.within_s))} within "
        f"{_latency(objective.within_s)}, errors {_percent(_error_share(result))}, "
        f"{result.goodput(math.inf):,.1f} requests/s answered"
    )


def _error_share(result: LoadResult) -> float:
    # Not 1 minus the others: 999 of 1,000 must not miss an objective of 0.001 by rounding.
    return int(np.isinf(result.latencies_s).sum()) / len(result.latencies_s)


def _latency(seconds: float) -> str:
    return f"{1000 * seconds:.4g} ms" if math.isfinite(seconds) else "infinite"


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"
