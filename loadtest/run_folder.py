"""What came of a load, as a folder: settings.json, requests.parquet, report.json and report.md.

The report is made of the run, and its page of the report alone.
"""

import argparse
import datetime
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from loadtest.machine import describe_machine
from loadtest.objective import LATE_S, Objective, RateError, Verdict, error_share, latency_text
from loadtest.open_loop import LoadResult, ScheduleResult
from loadtest.results import table

_PERCENTILES = {"p50_s": 50.0, "p90_s": 90.0, "p99_s": 99.0, "p999_s": 99.9}

_LEGEND = (
    "Latencies run from the moment that a request was due; a dash is infinite: more requests "
    "failed than that percentile leaves out. Of what is judged:"
)

Report = dict[str, Any]


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


def chosen_part(
    result: ScheduleResult, chosen: np.ndarray[Any, np.dtype[np.bool_]], duration_s: float
) -> ScheduleResult | None:
    """Return the result of the chosen requests (bool [N]); None where there are none."""
    return result.select(chosen, duration_s) if chosen.any() else None


def open_run(folder: Path | None, command: str) -> tuple[Path, datetime.datetime]:
    """Return the folder of a run, not made yet, and the present time; raises RateError where the
    folder holds something already.
    """
    started = datetime.datetime.now(datetime.UTC)
    folder = folder or Path("runs") / f"{command}-{started:%Y%m%d-%H%M%S}"
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RateError(f"{folder} is there already and not empty: name another --folder")
    return folder, started


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
        "verdict": done.verdict.name,
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
            "later_than_s": LATE_S,
            "requests": int((late_s > LATE_S).sum()),
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
        "errors": error_share(result),
        "late_sends": int((result.send_delays_s > LATE_S).sum()),
        "queued": result.queued,
        "unsent": result.unsent,
    }


def markdown(report: Report) -> str:
    """Return report.md, made from report.json alone."""
    within = latency_text(report["objective"]["within_s"])
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
        f"left more than {latency_text(late['later_than_s'])} late: {late['requests']:,}",
        (
            f"delay of the generator: p99 {latency_text(late['p99_s'])}, "
            f"most {latency_text(late['max_s'])}"
        ),
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
