"""The table of all faults, made of the folders of their rows alone."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from loadtest.chaos.errors import ChaosError
from loadtest.chaos.outcome import NotRun, Outcome
from loadtest.chaos.rows import ROWS
from loadtest.results import milliseconds, table, write_section
from loadtest.run_folder import write_run

TITLE = "Faults under load"

_REPORT = "report.json"
_HEADS = (
    *("fault", "offered/s", "held/s", "requests", "refused", "late", "broken", "unsent", "other"),
    *("degraded", "wrong", "events", "lost", "doubled"),
    *("p99 before ms", "during ms", "after ms", "recovery s"),
)
_LEGEND = """\
Every answer is checked against scores that were computed beforehand by the bundle's graph alone \
(`python -m exporter score`); a degraded one against the score without a history. offered: \
requests/s before and after the fault (open loop, Poisson arrivals); held: right answers a second \
while it lasted, degraded ones among them. refused: 429 or 503, by the reasons listed below; late: \
no answer within 2 s (or five deadlines); broken: a connection that was lost with a request on \
it; unsent: nobody to connect to; other: any other status. events: those that were acknowledged, \
posted beside the load with retries and an idempotency key; lost and doubled: as counted in Redis \
afterwards. p99 is that of the requests answered with 200, by the moment that they were due. \
recovery: from the end of the fault (of a kill: from the kill) until right answers have 95 % of \
their share before it again, over a second."""


def save(
    row: Outcome | NotRun, requests: pl.DataFrame, settings: Mapping[str, Any], folder: Path
) -> None:
    """Write the folder of a row, in place of an older one."""
    target = folder / row.name
    if (target / _REPORT).exists():
        shutil.rmtree(target)
    write_run(target, settings, requests, vars(row), markdown([row]))


def load(folder: Path) -> list[Outcome | NotRun]:
    """Read all rows that stand in `folder`, in the order of the table.

    Raises ChaosError where one was written by another version of this program.
    """
    found: list[Outcome | NotRun] = []
    for name in (row.name for row in ROWS):
        if (path := folder / name / _REPORT).exists():
            values = json.loads(path.read_text())
            try:
                found.append(NotRun(**values) if "reason" in values else Outcome(**values))
            except TypeError as error:
                raise ChaosError(f"{path} is not of this version: remove it") from error
    return found


def is_clean(rows: Sequence[Outcome | NotRun]) -> bool:
    """Return whether every row was run and nothing was found that must not be."""
    return all(isinstance(row, Outcome) and not row.findings and not row.wrong for row in rows)


def markdown(rows: Sequence[Outcome | NotRun]) -> str:
    """Return the table, and what was noticed of each row."""
    done = [row for row in rows if isinstance(row, Outcome)]
    parts = [table(_HEADS, [_line(row) for row in done])] if done else []
    left_out = [row for row in rows if isinstance(row, NotRun)]
    parts += ["\n".join(f"- **Not run**: {row.fault}: {row.reason}" for row in left_out)]
    parts.append("\n".join(_noticed(row) for row in done))
    return "\n\n".join(part for part in parts if part)


def figures(rows: Sequence[Outcome | NotRun], page: Path) -> dict[str, float]:
    """Return the figures of the page's JSON; those of the fuzzers are taken over from theirs."""
    done = {row.name: row for row in rows if isinstance(row, Outcome)}
    found: dict[str, float] = {
        "faults": len(done),
        "wrong_scores": sum(row.wrong for row in done.values()),
        "lost_events": sum(row.lost for row in done.values()),
        "doubled_events": sum(row.doubled for row in done.values()),
    }
    if "sigterm" in done:
        found["drain_failed_requests"] = done["sigterm"].failed
    fuzzing = page.with_name("fuzzing.json")
    if fuzzing.exists():
        fuzzed = json.loads(fuzzing.read_text())["figures"]
        found |= {name: fuzzed[name] for name in ("fuzz_executions", "fuzz_crashes")}
    return found


def write(rows: Sequence[Outcome | NotRun], page: Path, command: str) -> None:
    """Put the table into the page of results."""
    write_section(
        page,
        title=TITLE,
        command=command,
        text=f"{_LEGEND}\n\n{markdown(rows)}",
        figures=figures(rows, page),
    )


def _line(row: Outcome) -> Sequence[object]:
    counts = (
        *(row.requests, row.refused, row.timed_out, row.broken, row.unsent, row.unexpected),
        *(row.degraded, row.wrong, row.acknowledged, row.lost, row.doubled),
    )
    p99s = (row.p99_before_s, row.p99_during_s, row.p99_after_s)
    return (
        *(row.fault, f"{row.rate:.0f}", f"{row.held_per_s:.1f}"),
        *(f"{count:,}" for count in counts),
        *("-" if p99_s is None else milliseconds(p99_s) for p99_s in p99s),
        "none" if row.recovery_s is None else f"{row.recovery_s:.1f}",
    )


def _noticed(row: Outcome) -> str:
    noticed = [f"**{finding}**" for finding in row.findings] + row.notes
    if row.refusals:
        refusals = (f"{problem} {n:,}" for problem, n in sorted(row.refusals.items()))
        noticed.append(f"refused: {', '.join(refusals)}")
    late = f"the generator's own delay: p99 {milliseconds(row.late_sends_s)} ms"
    return f"- {row.fault}: {'; '.join([*noticed, late])}."
