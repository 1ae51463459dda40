"""A behavior log to a prepared log: validated, filtered, sorted, memory-mapped.

Polars' streaming engine sorts into a temporary Parquet file; that file is then copied column by
column in chunks, so that memory does not grow with the log.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from contract import history_log
from contract.history_log import LogHeader
from contract.records import MAX_ITEM, MAX_TIME, MAX_USER_ID_BYTES, MIN_ITEM, MIN_TIME, RECORD
from training.data import log as prepared
from training.data.kcore import k_core
from training.data.readers import FEATURE_PREFIX, LogSource, scan
from training.errors import LogError
from training.folders import staged_folder

_CHUNK_ROWS = 1 << 20
_HASH_CHUNK_BYTES = 1 << 20
_ROWS = "rows.parquet"

BehaviorChoice = Literal["positives", "all"]


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """How a log is prepared.

    `min_interactions`: k of the k-core, 1 keeps all. `behaviors`: whether the histories hold the
    positive rows of a labelled log (and those without a label), or all rows. `drop_invalid`: leave
    out rows that are no behaviors instead of refusing the log.
    """

    min_interactions: int = 1
    behaviors: BehaviorChoice = "positives"
    drop_invalid: bool = False


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What was written, and how many rows were left out as invalid."""

    header: LogHeader
    n_dropped: int


def prepare(
    source: LogSource,
    target: Path,
    options: PrepareOptions,
    *,
    history: LogSource | None = None,
) -> PrepareReport:
    """Write the log at `source` to the folder `target`; LogError says what is wrong with it, and
    ConfigError with the features of items that `source` asks for.

    `history`: a second log of what users did before, all of whose rows are behaviors without a
    label. There a row without a timestamp takes that of the user's next row that has one.

    Rows are sorted by user, time, `order` where the log has it, and their place in the log: ties
    keep the order in which they were logged, never that of the item ids.
    """
    try:
        with staged_folder(target) as staging:
            log, n_dropped = _validated(scan(source), source.path, options)
            if history is not None:
                earlier, n_earlier = _validated(_unlabelled(history), history.path, options)
                log, n_dropped = _after(earlier, log, history.path), n_dropped + n_earlier
            log = log.with_row_index("row")
            log = k_core(log, options.min_interactions)
            rows_path = staging / _ROWS
            _sorted(_marked(log, options)).sink_parquet(rows_path)
            header = _write(pl.scan_parquet(rows_path), staging, source, options)
            rows_path.unlink()
    except (pl.exceptions.PolarsError, OSError) as error:
        if isinstance(error, FileExistsError):
            raise LogError(str(error)) from error
        raise LogError(f"{source.path}: cannot be prepared: {error}") from error
    return PrepareReport(header=header, n_dropped=n_dropped)


def _unlabelled(history: LogSource) -> pl.LazyFrame:
    """Return what users did before: without labels, each row with a timestamp if one follows."""
    rows = scan(history)
    names = rows.collect_schema().names()
    rows = rows.drop([name for name in ("label", "probability") if name in names])
    order = ["order"] if "order" in names else []
    rows = rows.with_row_index("place").sort(["user", *order, "place"]).drop("place")
    return rows.with_columns(pl.col("time").backward_fill().over("user"))


def _after(earlier: pl.LazyFrame, log: pl.LazyFrame, path: Path) -> pl.LazyFrame:
    theirs, ours = earlier.collect_schema()["user"], log.collect_schema()["user"]
    if theirs != ours:
        raise LogError(
            f"{path}: its users are of type {theirs}, those of the log of type {ours}: nobody can "
            "tell which are the same"
        )
    return pl.concat([earlier, log], how="diagonal")


def _validated(log: pl.LazyFrame, path: Path, options: PrepareOptions) -> tuple[pl.LazyFrame, int]:
    schema = log.collect_schema()
    user = pl.col("user")
    checks = {
        "a missing user": user.is_null(),
        f"an item id that is missing or outside {MIN_ITEM} .. {MAX_ITEM}": ~pl.col("item")
        .is_between(MIN_ITEM, MAX_ITEM)
        .fill_null(value=False),
        f"a timestamp that is missing or outside {MIN_TIME} .. {MAX_TIME} (unix seconds)": ~pl.col(
            "time"
        )
        .is_between(MIN_TIME, MAX_TIME)
        .fill_null(value=False),
    }
    if schema["user"] == pl.String:
        checks[
            f"a user id outside 1 .. {MAX_USER_ID_BYTES} bytes"
        ] = ~user.str.len_bytes().is_between(1, MAX_USER_ID_BYTES)
    if "label" in schema:
        checks["a label other than 0 and 1"] = ~pl.col("label").is_in([0, 1])
    log = log.with_row_index("row")
    invalid = pl.any_horizontal([check.fill_null(value=False) for check in checks.values()])
    counts = (
        log.select(
            pl.len().alias("rows"),
            invalid.sum().alias("invalid"),
            pl.col("row").filter(invalid).first().alias("first"),
            *(check.sum().alias(name) for name, check in checks.items()),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    n_invalid = int(counts["invalid"])
    if n_invalid and not options.drop_invalid:
        reasons = "; ".join(f"{counts[name]} with {name}" for name in checks if counts[name])
        raise LogError(
            f"{path}: {n_invalid} of {counts['rows']} rows are no behaviors: {reasons} (the first "
            f"is row {counts['first'] + 1}); mend the log or leave them out with --drop-invalid"
        )
    if counts["rows"] == n_invalid:
        raise LogError(f"{path}: no behaviors in it")
    return log.filter(~invalid).drop("row"), n_invalid


def _marked(log: pl.LazyFrame, options: PrepareOptions) -> pl.LazyFrame:
    """Mark which rows are behaviors, and which were shown and carry a label."""
    every, none = pl.repeat(value=True, n=pl.len()), pl.repeat(value=False, n=pl.len())
    if "label" not in log.collect_schema():
        return log.with_columns(behavior=every, impression=none)
    label = pl.col("label")
    positive = label.fill_null(1) == 1
    return log.with_columns(
        behavior=positive if options.behaviors == "positives" else every,
        impression=label.is_not_null(),
    )


def _sorted(log: pl.LazyFrame) -> pl.LazyFrame:
    order = ["order"] if "order" in log.collect_schema() else []
    return log.sort(["user", "time", *order, "row"])


def _write(
    rows: pl.LazyFrame, folder: Path, source: LogSource, options: PrepareOptions
) -> LogHeader:
    names = rows.collect_schema().names()
    users = (
        rows.group_by("user")
        .agg(behaviors=pl.col("behavior").sum(), impressions=pl.col("impression").sum())
        .sort("user")
        .collect(engine="streaming")
    )
    if users.is_empty():
        raise LogError(f"{source.path}: the {options.min_interactions}-core is empty")
    behavior_offsets = _offsets(users["behaviors"])
    impression_offsets = _offsets(users["impressions"])
    has_labels = "label" in names and int(impression_offsets[-1]) > 0
    np.save(folder / history_log.BEHAVIOR_OFFSETS, behavior_offsets)
    np.save(folder / prepared.IMPRESSION_OFFSETS, impression_offsets)
    user_ids = [user_id.encode() for user_id in users["user"].cast(pl.String)]
    (folder / history_log.USER_IDS).write_bytes(b"".join(user_ids))
    np.save(folder / history_log.USER_ID_OFFSETS, _offsets(pl.Series(map(len, user_ids))))

    has_probabilities = has_labels and "probability" in names
    with (
        (folder / history_log.BEHAVIORS).open("wb") as behaviors,
        (folder / prepared.IMPRESSIONS).open("wb") as impressions,
        (folder / prepared.PROBABILITIES).open("wb") as probabilities,
    ):
        for chunk in _chunks(rows):
            _records(chunk.filter("behavior"), RECORD).tofile(behaviors)
            if has_labels:
                shown = chunk.filter("impression")
                _records(shown, prepared.IMPRESSION).tofile(impressions)
                if has_probabilities:
                    shown["probability"].to_numpy().tofile(probabilities)

    n_items = _write_items(rows, folder, names)
    header = LogHeader(
        format_version=history_log.FORMAT_VERSION,
        source=source.path.name,
        fingerprint=_fingerprint(folder),
        n_users=len(users),
        n_behaviors=int(behavior_offsets[-1]),
        n_impressions=int(impression_offsets[-1]),
        n_items=n_items,
        has_labels=has_labels,
        has_probabilities=has_probabilities,
        has_categories=prepared.CATEGORY in names,
    )
    (folder / history_log.HEADER).write_text(json.dumps(header.model_dump(), indent=2) + "\n")
    return header


def _write_items(rows: pl.LazyFrame, folder: Path, names: list[str]) -> int:
    present = [
        name for name in names if name == prepared.CATEGORY or name.startswith(FEATURE_PREFIX)
    ]
    # An item has the first value that is given for it.
    values = [pl.col(name).drop_nulls().first() for name in present]
    items = rows.group_by("item").agg(values).sort("item").collect(engine="streaming")
    np.save(folder / prepared.ITEMS, items["item"].to_numpy())
    # Values are numbered by name, so that the same log gives the same rows every time.
    feature_rows = {
        name.removeprefix(FEATURE_PREFIX): items[name]
        .rank("dense")
        .fill_null(0)
        .cast(pl.Int32)
        .to_numpy()
        for name in present
    }
    none = np.zeros(len(items), dtype=np.int32)
    np.save(folder / prepared.ITEM_CATEGORIES, feature_rows.pop(prepared.CATEGORY, none))
    if feature_rows:
        table = np.empty(len(items), dtype=prepared.features_dtype(feature_rows))
        for name, of_item in feature_rows.items():
            table[name] = of_item
        np.save(folder / prepared.ITEM_FEATURES, table)
    return len(items)


def _chunks(rows: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    n_rows = rows.select(pl.len()).collect(engine="streaming").item()
    for start in range(0, n_rows, _CHUNK_ROWS):
        yield rows.slice(start, _CHUNK_ROWS).collect(engine="streaming")


def _records(frame: pl.DataFrame, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    records = np.empty(len(frame), dtype=dtype)
    for name in dtype.names or ():
        records[name] = frame[name].to_numpy()
    return records


def _offsets(lengths: pl.Series) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(lengths.to_numpy(), dtype=np.int64)]).astype(np.int64)


def _fingerprint(folder: Path) -> str:
    """Return a sha256 over all that training reads, so that a model names its data."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.name == _ROWS:
            continue
        digest.update(f"{path.name}:{path.stat().st_size}:".encode())
        with path.open("rb") as file:
            while chunk := file.read(_HASH_CHUNK_BYTES):
                digest.update(chunk)
    return digest.hexdigest()
