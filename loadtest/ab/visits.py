"""The folder of an A/B run: `visits.parquet`, one row a visit, and `run.json`, its settings."""

import datetime
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

VISITS = "visits.parquet"
RUN = "run.json"
OK_STATUS = 200

SCHEMA = pl.Schema(
    {
        "user_id": pl.String(),
        "arm": pl.String(),  # null where no answer named one
        "version": pl.String(),  # null likewise
        "at_s": pl.Float64(),  # when the request was sent, counted from the start of the run
        "latency_s": pl.Float64(),  # null unless the status is 200
        "status": pl.Int32(),  # of HTTP; 0 where no answer came
        "n_shown": pl.Int32(),  # 0 unless the status is 200
        "clicked_items": pl.List(pl.Int64()),
        "clicked_categories": pl.List(pl.Int64()),  # of each clicked item
    }
)

_FACTS = ("started", "stated_shares", "baseline")


class VisitsError(ValueError):
    """A folder that is not a whole A/B run, or visits that contradict themselves."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is known of a run beside its visits.

    `started`: moment of the start, with its time zone. `stated_shares`: the share of users that
    each answering arm is stated to get; positive, 1 in sum (as written, to 1e-6). `baseline`: the
    arm that the others are compared with, one of these. `settings`: the rest of `run.json`, by
    name. Raises VisitsError where they contradict each other.
    """

    started: datetime.datetime
    stated_shares: Mapping[str, float]
    baseline: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.started.tzinfo is None:
            raise VisitsError(f"started needs a time zone, got {self.started.isoformat()}")
        if not self.stated_shares or not all(0 < v <= 1 for v in self.stated_shares.values()):
            raise VisitsError(
                f"stated_shares must give each arm a share above 0 and at most 1, "
                f"got {dict(self.stated_shares)}"
            )
        total = math.fsum(self.stated_shares.values())
        if abs(total - 1) > 1e-6:
            raise VisitsError(f"stated_shares must add up to 1, got {total:g}")
        if self.baseline not in self.stated_shares:
            raise VisitsError(
                f"baseline {self.baseline!r} is none of the arms: {', '.join(self.stated_shares)}"
            )
        if clash := sorted(set(_FACTS) & set(self.settings)):
            raise VisitsError(f"settings must not be named {', '.join(clash)}")


def write_visits(rows: pl.DataFrame | Sequence[Mapping[str, object]], folder: Path) -> None:
    """Write `visits.parquet` into the folder, made where it is not there; all of it or nothing.

    Raises VisitsError where the rows are no visits (see SCHEMA).
    """
    if isinstance(rows, pl.DataFrame):
        frame = rows
    else:
        try:
            frame = pl.DataFrame(rows, schema=SCHEMA)
        except (pl.exceptions.PolarsError, TypeError) as error:
            raise VisitsError(f"the rows are no visits: {error}") from error
    _check(frame, "the rows")
    write_whole(folder / VISITS, lambda path: frame.select(SCHEMA.names()).write_parquet(path))


def read_visits(folder: Path) -> pl.DataFrame:
    """Read the visits of a run, in the order of the file; columns as in SCHEMA.

    Raises VisitsError where the file is missing, damaged, or does not hold visits.
    """
    path = folder / VISITS
    if not path.is_file():
        raise VisitsError(f"{folder} is not the folder of an A/B run: {VISITS} is missing")
    try:
        # Opened here: given a path, Polars would take brackets and stars in it for patterns.
        with path.open("rb") as file:
            frame = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise VisitsError(f"{path} is not readable: {error}") from error
    _check(frame, str(path))
    return frame.select(SCHEMA.names())


def write_run(run: Run, folder: Path) -> None:
    """Write `run.json` into the folder, made where it is not there; all of it or nothing."""
    content = {
        "started": run.started.isoformat(),
        "stated_shares": dict(run.stated_shares),
        "baseline": run.baseline,
        **run.settings,
    }
    text = json.dumps(content, indent=2) + "\n"
    write_whole(folder / RUN, lambda path: path.write_text(text))


def read_run(folder: Path) -> Run:
    """Read what `write_run` wrote; raises VisitsError that names the file otherwise."""
    path = folder / RUN
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise VisitsError(f"{folder} is not the folder of an A/B run: {RUN} is missing") from error
    except (OSError, ValueError) as error:
        raise VisitsError(f"{path} is not readable: {error}") from error
    try:
        return Run(
            started=datetime.datetime.fromisoformat(content["started"]),
            stated_shares={arm: float(v) for arm, v in content["stated_shares"].items()},
            baseline=content["baseline"],
            settings={name: v for name, v in content.items() if name not in _FACTS},
        )
    except VisitsError as error:
        raise VisitsError(f"{path}: {error}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise VisitsError(
            f'{path}: expected "started" (a time of ISO 8601), "stated_shares" (a number for '
            f'each arm) and "baseline" (an arm)'
        ) from error


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then give it that name.

    Where it fails, an older `path` stays as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(staging)
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def _check(frame: pl.DataFrame, source: str) -> None:
    for name, dtype in SCHEMA.items():
        if name not in frame.columns:
            raise VisitsError(f"{source}: column {name!r} is missing")
        if frame.schema[name] != dtype:
            raise VisitsError(f"{source}: {name} must be {dtype}, got {frame.schema[name]}")
    for rule, broken in _RULES.items():
        rows = frame.select(broken.fill_null(value=True).arg_true()).to_series()
        if len(rows):
            raise VisitsError(f"{source}: {rule}; row {rows[0]} is {frame.row(rows[0])}")


_answered = pl.col("status") == OK_STATUS
_items, _categories = pl.col("clicked_items"), pl.col("clicked_categories")
# What a visit must fulfil, and where it does not. A null in a comparison counts as broken.
_RULES: dict[str, pl.Expr] = {
    "user_id must not be empty": pl.col("user_id").str.len_bytes() == 0,
    "status must be 0 or one of HTTP": ~(
        (pl.col("status") == 0) | pl.col("status").is_between(100, 599)
    ),
    "at_s must be finite and not negative": ~pl.col("at_s").is_between(0, math.inf, closed="left"),
    "arm must be named where the status is 200": _answered & pl.col("arm").is_null(),
    "latency_s must be null unless the status is 200, and not negative": pl.when(_answered)
    .then(~pl.col("latency_s").is_between(0, math.inf, closed="left"))
    .otherwise(pl.col("latency_s").is_not_null()),
    "n_shown must be 0 unless the status is 200, and not negative": (pl.col("n_shown") < 0)
    | (~_answered & (pl.col("n_shown") != 0)),
    "clicked_items and clicked_categories must be equally long": _items.list.len()
    != _categories.list.len(),
    "clicked items and categories must not be null": _items.list.contains(None)
    | _categories.list.contains(None),
    "there must not be more clicks than items shown": _items.list.len() > pl.col("n_shown"),
}
