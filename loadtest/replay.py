"""`python -m loadtest replay LOG`: the users and times of a real log, sped up, as load.

LOG is a prepared log (the folder that `python -m training prepare` writes), or a Parquet or CSV
file with the columns user_id, item_id and timestamp (unix seconds). Each behavior becomes one
`POST /score` of that user at that ranking time, whose candidates are the item itself, first, and
others sampled from the log; with --post-events, `POST /events` follows it. Requests leave at the
log's own times, divided by --speed, however the service does: report, objective and exit code are
those of `python -m loadtest rate`, and events are not judged.

The service reads what stands in its history store, so a store that holds the whole log knows the
future: load the behaviors before --from alone to repeat what happened.
"""

import argparse
import datetime
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from contract.history_log import HistoryLog
from contract.records import MAX_TIME, MIN_ITEM, MIN_TIME
from loadtest.objective import add_run_flags, judge, objective_of, sending_of
from loadtest.rate import preflight
from loadtest.run_folder import Part, Run, chosen_part, conclude, open_run
from loadtest.traffic import Sizes, parse_sizes, read_catalogue

_COLUMNS = ("user_id", "item_id", "timestamp")
_PARTS = 10


class ReplayError(ValueError):
    """A log that cannot be replayed."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Events:
    """N behaviors of a log in order of time: user ids, `items` int64 [N] and `times` int64 [N],
    unix seconds.
    """

    users: Sequence[str]
    items: NDArray[np.int64]
    times: NDArray[np.int64]

    def __len__(self) -> int:
        """Return N."""
        return len(self.items)


def read_log(log: Path) -> pl.DataFrame:
    """Return all behaviors of the log: user_id String, item_id Int64, timestamp Int64.

    Rows with label 0, of impressions without a click, are none. Raises ReplayError, or
    HistoryLogError for a folder that is no prepared log.
    """
    return _read_prepared(log) if log.is_dir() else _read_table(log)


def choose_events(rows: pl.DataFrame, *, start: float, end: float, most: int) -> Events:
    """Return the first `most` behaviors of `read_log` within [start, end), unix seconds.

    Those of one second stay in the order of the log. Raises ReplayError where there are none.
    """
    chosen = (rows["timestamp"] >= start) & (rows["timestamp"] < end)
    rows = rows.filter(chosen).sort("timestamp", maintain_order=True).head(most)
    if rows.is_empty():
        raise ReplayError("the log has no behavior within the times that were asked for")
    return Events(
        users=rows["user_id"].to_list(),
        items=rows["item_id"].to_numpy(),
        times=rows["timestamp"].to_numpy(),
    )


def due_times(times: NDArray[np.int64], speed: float, seed: int) -> NDArray[np.float64]:
    """Return when behaviors are due, in seconds from the first one's second, float64 [N].

    `times`: ascending unix seconds; `speed`: log seconds per real one. A log that counts in seconds
    does not mean that all of a second happened at once: they are spread over it at random, in
    their order.
    """
    within_s = np.random.default_rng(seed).random(len(times))
    # Times are ascending, so this sorts the draws within each second alone.
    within_s = within_s[np.lexsort((within_s, times))]
    due_s: NDArray[np.float64] = (times - times[0] + within_s) / speed
    return due_s


def score_bodies(
    events: Events, sizes: Sizes, catalogue: NDArray[np.int64], seed: int
) -> list[bytes]:
    """Return the JSON of `POST /score` for each behavior: the item itself first, then others of
    the catalogue, distinct and uniformly drawn.

    Raises ReplayError where the catalogue has too few items.
    """
    if sizes.most > len(catalogue):
        raise ReplayError(
            f"{sizes.most} distinct candidates were asked for, but there are only "
            f"{len(catalogue)} items"
        )
    rng = np.random.default_rng(seed)
    bodies: list[bytes] = []
    for user, item, time, n in zip(
        events.users,
        events.items.tolist(),
        events.times.tolist(),
        sizes.draw(rng, len(events)).tolist(),
        strict=True,
    ):
        # One more than needed: the item itself may be among them.
        drawn = rng.choice(catalogue, min(n, len(catalogue)), replace=False).tolist()
        others = [other for other in drawn if other != item][: n - 1]
        body = {"user_id": user, "candidates": [item, *others], "ranking_time": time}
        bodies.append(json.dumps(body).encode())
    return bodies


def event_bodies(events: Events) -> list[bytes]:
    """Return the JSON of `POST /events` for each behavior."""
    return [
        json.dumps({"user_id": user, "item_id": item, "time": time}).encode()
        for user, item, time in zip(
            events.users, events.items.tolist(), events.times.tolist(), strict=True
        )
    ]


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `replay` to the command line."""
    one = commands.add_parser(
        "replay",
        help="a real log's users and times, sped up, as an open-loop load with a verdict",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    one.add_argument("log", type=Path, help="a prepared log, or a Parquet or CSV file")
    one.add_argument("--speed", type=float, default=3600.0, help="log seconds per second (3600)")
    one.add_argument(
        "--from", dest="start", help="leave out what is earlier: unix seconds, or 2024-01-31T12:00"
    )
    one.add_argument("--until", dest="end", help="leave out this moment and all later ones")
    one.add_argument(
        "--max-requests", type=int, default=100_000, help="the first ones (default %(default)s)"
    )
    one.add_argument(
        "--candidates",
        default="100",
        help="how many a request: 100, 50-500 or lognormal:MEDIAN:SIGMA:MOST (default 100)",
    )
    one.add_argument(
        "--catalogue", type=Path, help="a bundle or a .npy file to sample from (default: the log)"
    )
    one.add_argument(
        "--post-events", action="store_true", help="post each behavior after it was scored"
    )
    one.add_argument(
        "--events-after-s",
        type=float,
        default=0.1,
        help="from a score's due time to that of its event, real seconds (default %(default)s)",
    )
    add_run_flags(one)
    one.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; return its exit code. Raises ValueError for what cannot be run."""
    folder, started = open_run(options.folder, "replay")
    objective, sending = objective_of(options), sending_of(options)
    for name in ("speed", "max_requests"):
        if not 0 < getattr(options, name) < math.inf:
            raise ReplayError(f"{name} must be positive, got {getattr(options, name)}")
    if not 0 <= options.events_after_s < math.inf:
        raise ReplayError(f"events_after_s must be 0 or more, got {options.events_after_s:g}")
    sizes = parse_sizes(options.candidates, least=1)
    rows = read_log(options.log)
    events = choose_events(
        rows,
        start=_moment(options.start, -math.inf),
        end=_moment(options.end, math.inf),
        most=options.max_requests,
    )
    catalogue = (
        rows["item_id"].unique().sort().to_numpy()
        if options.catalogue is None
        else read_catalogue(options.catalogue)
    )
    bodies = score_bodies(events, sizes, catalogue, options.seed)
    preflight(sending.target, bodies[0])

    n = len(events)
    due_s = due_times(events.times, options.speed, options.seed)
    requests = [sending.target.request(body) for body in bodies]
    if options.post_events:
        path = f"{sending.target.path.removesuffix('/score')}/events"
        target = replace(sending.target, path=path)
        requests += [target.request(body) for body in event_bodies(events)]
        due_s = np.concatenate([due_s, due_s + options.events_after_s])
    order = np.argsort(due_s, kind="stable")
    # Each part of the table lasts as long; a replay of one moment alone still has a duration.
    duration_s = max(float(due_s[order[-1]]), 1 / options.speed)
    result = sending.run([requests[i] for i in order.tolist()], due_s[order], duration_s)

    is_score = order < n
    scores = result.select(is_score, duration_s)
    part_N = np.minimum(result.arrivals_s * _PARTS / duration_s, _PARTS - 1).astype(np.int64)
    ends_s = np.linspace(0.0, duration_s, _PARTS + 1)
    parts = [
        Part(
            name=f"{ends_s[part]:.1f}-{ends_s[part + 1]:.1f} s",
            result=chosen_part(result, is_score & (part_N == part), duration_s / _PARTS),
        )
        for part in range(_PARTS)
    ]
    if options.post_events:
        parts.append(Part(name="events", result=result.select(~is_score, duration_s)))
    verdict = judge(scores, objective, sending)
    done = Run(verdict=verdict, judged=scores, parts=parts)
    return conclude(folder, options, started, objective, done)


def _moment(text: str | None, otherwise: float) -> float:
    """Return unix seconds; a time without a zone is UTC."""
    if text is None:
        return otherwise
    try:
        return float(text)
    except ValueError:
        pass
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ReplayError(
            f"{text!r} is no moment: expected unix seconds, or 2024-01-31T12:00"
        ) from error
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


def _read_prepared(folder: Path) -> pl.DataFrame:
    log = HistoryLog(folder)
    user_ids = pl.Series([log.user_id(user) for user in range(len(log))], dtype=pl.String)
    users = np.repeat(np.arange(len(log)), np.diff(log.behavior_offsets))
    return pl.DataFrame(
        {
            "user_id": user_ids.gather(users),
            "item_id": log.behaviors["item"],
            "timestamp": log.behaviors["time"].astype(np.int64),
        }
    )


def _read_table(path: Path) -> pl.DataFrame:
    try:
        table = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path)
        schema = table.collect_schema()
        missing = [name for name in _COLUMNS if name not in schema]
        if missing:
            raise ReplayError(
                f"{path} has no column {' and no '.join(missing)}: expected "
                f"{', '.join(_COLUMNS)}, found {', '.join(schema.names())}"
            )
        if "label" in schema:
            table = table.filter(pl.col("label").is_null() | (pl.col("label") != 0))
        time = pl.col("timestamp")
        if isinstance(schema["timestamp"], pl.Datetime):
            time = time.dt.epoch("s")
        rows = table.select(
            pl.col("user_id").cast(pl.String),
            pl.col("item_id").cast(pl.Int64),
            time.cast(pl.Int64),
        ).collect()
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ReplayError(f"{path} is not readable as a log: {error}") from error
    for name, low, high in (("item_id", MIN_ITEM, None), ("timestamp", MIN_TIME, MAX_TIME)):
        column = rows[name]
        bad = column.is_null() | (column < low)
        if high is not None:
            bad |= column > high
        if bad.any():
            raise ReplayError(
                f"{path} has {bad.sum()} rows whose {name} is missing or out of range, such as "
                f"{column.filter(bad)[0]}: expected {low} .. {'' if high is None else high}"
            )
    if rows["user_id"].null_count():
        raise ReplayError(f"{path} has rows without a user_id")
    return rows
