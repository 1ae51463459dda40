"""`python -m loadtest chaos`: every fault, one after the other, and one table."""

import argparse
import datetime
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl

from loadtest.benchmarks.stand import StandError
from loadtest.chaos import report
from loadtest.chaos.bench import Bench
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.outcome import NotRun, Outcome
from loadtest.chaos.preparation import add_flags, make_bench
from loadtest.chaos.rows import ROWS, Row
from loadtest.machine import describe_machine
from loadtest.redis_server import RedisServerError


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `chaos` to the commands of a program."""
    one = commands.add_parser("chaos", help="faults under a load whose every answer is checked")
    names = [row.name for row in ROWS]
    one.add_argument("--rows", nargs="+", choices=names, default=names, help="which faults")
    one.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of a fault that lasts; others take a quarter of it (default %(default)s)",
    )
    one.add_argument("--slow-clients", type=int, default=1000, help="default %(default)s")
    one.add_argument(
        "--folder",
        type=Path,
        default=Path("runs/chaos"),
        help="a folder for each fault; the table is made of all that stand there",
    )
    add_flags(one, share=0.4)
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Make the faults; return 0 when all rows of the table were run and nothing was found."""
    started = datetime.datetime.now(datetime.UTC)
    settings = {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if name not in ("run", "bundle")
    }
    settings |= {"started": started.isoformat(), "machine": describe_machine()}
    with make_bench(options, seconds=options.seconds, slow_clients=options.slow_clients) as bench:
        settings |= {"capacity": bench.capacity, "rate": bench.rate}
        for row in ROWS:
            if row.name in options.rows:
                _show(bench, row, settings, options.folder)
    rows = report.load(options.folder)
    report.write(rows, options.page, f"python -m loadtest chaos --seconds {options.seconds:g}")
    return 0 if report.is_clean(rows) else 1


def _show(bench: Bench, row: Row, settings: Mapping[str, Any], folder: Path) -> None:
    outcome: Outcome | NotRun
    try:
        outcome, watched = row.show(bench, row.name, row.fault)
        requests = watched.requests()
    except (ChaosError, StandError, RedisServerError) as error:
        outcome = NotRun(name=row.name, fault=row.fault, reason=str(error))
        requests = pl.DataFrame()
    report.save(outcome, requests, settings, folder)
    sys.stdout.write(f"\n{row.name}\n{report.markdown([outcome])}\n")
    sys.stdout.flush()
