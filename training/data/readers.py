"""Reads the behavior logs of the field into one lazy table.

Columns of that table: `user` (integer or string), `item` int64, `time` int64 (unix seconds), and
where the log has them `label` int8 (1 positive, 0 negative, null: a behavior outside of any
impression), `probability` float32 (the true click probability, of a synthetic log), `category`,
`order` and, under FEATURE_PREFIX and its name, each further feature of items that was asked for.
"""

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import polars as pl

from training.data.log import CATEGORY, FEATURE_NAME
from training.errors import ConfigError, LogError

LogFormat = Literal["movielens-dat", "movielens-csv", "amazon", "taobao", "named"]
FORMATS: tuple[LogFormat, ...] = get_args(LogFormat)

# Names by which logs call the columns; the first that a log has is taken.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "user": ("user", "user_id", "userId"),
    "item": ("item", "item_id", "itemId", "movieId"),
    "time": ("timestamp", "time"),
    "label": ("label",),
    "probability": ("click_probability",),
    "category": ("category", "category_id"),
    "order": ("order",),
}
REQUIRED = ("user", "item", "time")
FEATURE_PREFIX = "feature_"
_NO_LABEL = 2
_MAX_BASE36_DIGITS = 12  # 36^12 < 2^63
_AMAZON = ("user", "item", "rating", "timestamp")
_TAOBAO = ("user", "item", "category", "behavior", "timestamp")
_MOVIELENS = ("user", "item", "rating", "timestamp")


@dataclass(frozen=True, kw_only=True)
class LogSource:
    """A log to read.

    `path`: a file, or a folder of Parquet files. `columns`: names that differ from ALIASES, such
    as {"order": "sasrec_pos"}. `item_features`: columns of further categorical features of items,
    by the name that the feature gets. `label_threshold`: a rating from here on is a positive
    (MovieLens). `time_unit`: of the timestamps.
    """

    path: Path
    format: LogFormat | None = None
    columns: Mapping[str, str] = field(default_factory=dict)
    item_features: Mapping[str, str] = field(default_factory=dict)
    label_threshold: float = 4.0
    time_unit: Literal["s", "ms"] = "s"


def scan(source: LogSource) -> pl.LazyFrame:
    """Return the log as a lazy table with the columns named above; LogError if it is no log,
    ConfigError if it has not the features asked for.

    Item ids that are not numbers are read in base 36, which is one to one for names of one
    length such as Amazon's ASINs; users may be any string.
    """
    if not source.path.exists():
        raise LogError(f"{source.path}: no such file or folder")
    unknown = sorted(set(source.columns) - set(ALIASES))
    if unknown:
        raise LogError(f"unknown column roles {unknown}, expected some of {sorted(ALIASES)}")
    for name in source.item_features:
        if name == CATEGORY:
            raise ConfigError(
                f"item feature {name!r}: is a role of its own; name its column by --column {name}="
            )
        if not re.fullmatch(FEATURE_NAME, name):
            raise ConfigError(f"item feature {name!r}: expected a name that fits {FEATURE_NAME}")
    log_format = source.format or detect_format(source.path, source.columns.values())
    try:
        match log_format:
            case "movielens-dat":
                frame = _scan_movielens_dat(source.path)
            case "amazon":
                frame = _scan_headerless(source.path, _AMAZON, text=("user", "item"))
            case "taobao":
                frame = _scan_headerless(source.path, _TAOBAO, text=("behavior",))
            case "movielens-csv" | "named":
                frame = _scan_named(source)
        frame = _rename(frame, source)
        if log_format in ("movielens-dat", "movielens-csv"):
            frame = frame.with_columns(label=pl.col("rating") >= source.label_threshold)
        return _cast(frame, source, base36=log_format == "amazon")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise LogError(f"{source.path}: not readable as {log_format}: {error}") from error


def detect_format(path: Path, column_names: Iterable[str] = ()) -> LogFormat:
    """Return the format of a log by its name and its first line.

    `column_names`: names that its header holds, if they differ from ALIASES.
    """
    if path.is_dir() or path.suffix == ".parquet":
        return "named"
    if path.suffix == ".dat":
        return "movielens-dat"
    if path.suffix != ".csv":
        raise LogError(f"{path}: expected a .parquet, .csv or .dat file, or a folder of Parquet")
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        first = next(csv.reader([file.readline()]), [])
    if "movieId" in first:
        return "movielens-csv"
    if any(name in first for name in (*ALIASES["user"], *column_names)):
        return "named"
    if len(first) == len(_TAOBAO):
        return "taobao"
    if len(first) == len(_AMAZON):
        return "amazon"
    raise LogError(
        f"{path}: the first line has neither a user column ({', '.join(ALIASES['user'])}) nor "
        f"the {len(_AMAZON)} fields of Amazon's or {len(_TAOBAO)} of Taobao's logs: {first[:6]}"
    )


def _scan_movielens_dat(path: Path) -> pl.LazyFrame:
    # Fields are parted by "::"; split at ":" every second column is empty.
    names = ["user", "_1", "item", "_2", "rating", "_3", "timestamp"]
    frame = pl.scan_csv(
        path,
        separator=":",
        has_header=False,
        schema={
            name: {"rating": pl.Float32}.get(name, pl.String if name[0] == "_" else pl.Int64)
            for name in names
        },
    )
    return frame.select(_MOVIELENS)


def _scan_headerless(path: Path, names: tuple[str, ...], text: tuple[str, ...]) -> pl.LazyFrame:
    def dtype(name: str) -> type[pl.DataType]:
        if name in text:
            return pl.String
        return pl.Float64 if name == "rating" else pl.Int64

    return pl.scan_csv(path, has_header=False, schema={name: dtype(name) for name in names})


def _scan_named(source: LogSource) -> pl.LazyFrame:
    path = source.path
    if path.is_dir():
        return pl.scan_parquet(path / "**/*.parquet")
    if path.suffix == ".csv":
        # User ids are text, whatever they look like: as numbers, 007 and 7 would be one user. So
        # are features of items.
        names = {*ALIASES["user"], source.columns.get("user", "user")}
        names.update(source.item_features.values())
        present = pl.scan_csv(path, infer_schema=False).collect_schema().names()
        text = {name: pl.String for name in names if name in present}
        return pl.scan_csv(path, infer_schema_length=10_000, schema_overrides=text)
    return pl.scan_parquet(path)


def _rename(frame: pl.LazyFrame, source: LogSource) -> pl.LazyFrame:
    present = frame.collect_schema().names()
    chosen: dict[str, str] = {}
    for role, aliases in ALIASES.items():
        named = source.columns.get(role)
        if named is not None and named not in present:
            raise LogError(f"{source.path}: no column {named!r} for {role}; it has {present}")
        found = named or next((alias for alias in aliases if alias in present), None)
        if found is not None:
            chosen[role] = found
        elif role in REQUIRED:
            raise LogError(
                f"{source.path}: no {role} column; looked for {', '.join(aliases)}, "
                f"it has {present}"
            )
    for name, column in source.item_features.items():
        if column not in present:
            raise ConfigError(
                f"{source.path}: no column {column!r} for item feature {name}; it has {present}"
            )
        chosen[FEATURE_PREFIX + name] = column
    extra = [pl.col("rating")] if "rating" in present else []
    return frame.select([pl.col(name).alias(role) for role, name in chosen.items()] + extra)


def _cast(frame: pl.LazyFrame, source: LogSource, *, base36: bool) -> pl.LazyFrame:
    schema = frame.collect_schema()
    divisor = 1000 if source.time_unit == "ms" else 1
    columns = {
        "user": _user(schema["user"]),
        "item": _item(frame, schema["item"], source.path, base36=base36),
        "time": pl.col("time").cast(pl.Int64) // divisor,
    }
    if "label" in schema:
        label = pl.col("label")
        if schema["label"].is_float():  # 0.5 must be refused as a label, not cut to 0
            whole = label.is_null() | (label == label.floor())
            label = pl.when(whole).then(label).otherwise(_NO_LABEL)
        columns["label"] = label.cast(pl.Int8)
    if "probability" in schema:
        columns["probability"] = pl.col("probability").cast(pl.Float32)
    if "category" in schema:
        columns["category"] = pl.col("category").cast(pl.String)
    if "order" in schema:
        columns["order"] = pl.col("order").cast(pl.Int64)
    # By name, so that the same log is the same in whatever order they are asked for.
    for name, column in sorted(source.item_features.items()):
        dtype = schema[FEATURE_PREFIX + name]
        if not dtype.is_integer() and dtype not in (pl.String, pl.Categorical, pl.Enum):
            raise ConfigError(
                f"{source.path}: column {column!r} of item feature {name} must hold integers or "
                f"strings, got {dtype}"
            )
        columns[FEATURE_PREFIX + name] = pl.col(FEATURE_PREFIX + name).cast(pl.String)
    return frame.select(**columns)


def _user(dtype: pl.DataType) -> pl.Expr:
    column = pl.col("user")
    return column.cast(pl.Int64) if dtype.is_integer() else column.cast(pl.String)


def _item(frame: pl.LazyFrame, dtype: pl.DataType, path: Path, *, base36: bool) -> pl.Expr:
    column = pl.col("item")
    if dtype.is_integer():
        return column.cast(pl.Int64)
    if dtype != pl.String:
        raise LogError(f"{path}: item ids must be integers or strings, got {dtype}")
    if not base36 and _every(frame, column.str.contains(r"^\d+$")):
        return column.cast(pl.Int64)
    readable = column.str.contains(f"^[0-9A-Za-z]{{1,{_MAX_BASE36_DIGITS}}}$")
    if not _every(frame, readable):
        example = frame.filter(~readable).select("item").head(1).collect(engine="streaming")
        raise LogError(
            f"{path}: item {example.item()!r} is neither a number nor a name of at most "
            f"{_MAX_BASE36_DIGITS} letters and digits"
        )
    number = column.str.to_integer(base=36, dtype=pl.Int64)
    names = frame.select(column.n_unique().alias("names"), number.n_unique().alias("numbers"))
    if (counts := names.collect(engine="streaming").row(0))[0] != counts[1]:
        raise LogError(
            f"{path}: {counts[0]} item names make {counts[1]} numbers in base 36: names that "
            "differ in case or in leading zeros only cannot be told apart"
        )
    return number


def _every(frame: pl.LazyFrame, condition: pl.Expr) -> bool:
    return bool(frame.select(condition.all()).collect(engine="streaming").item())
