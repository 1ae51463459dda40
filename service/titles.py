"""Titles of items, for people: from a JSON object or a CSV file, read once."""

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from service.settings import SettingsError

_COLUMNS = ("item_id", "title")


def read_titles(path: Path | None) -> Mapping[int, str]:
    """Return titles by item id; none where no file is named.

    A name that ends in `.csv` is a table with the columns `item_id` and `title`, any other a JSON
    object `{"1193": "a title"}`. Raises SettingsError that names the file and what is wrong.
    """
    if path is None:
        return {}
    try:
        pairs = _table(path) if path.suffix == ".csv" else _object(path)
        return {int(item_id): title for item_id, title in pairs}
    except OSError as error:
        raise SettingsError(f"titles: {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError, csv.Error) as error:
        raise SettingsError(f"titles: {path}: {error}") from error


def _table(path: Path) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file, strict=True)
        missing = [name for name in _COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise ValueError(f"a column is missing: {', '.join(missing)}")
        for row in rows:
            item_id, title = (row[name] for name in _COLUMNS)
            if item_id is None or title is None:
                raise ValueError(f"line {rows.line_num} is too short")
            yield item_id, title


def _object(path: Path) -> Iterator[tuple[str, str]]:
    content = json.loads(path.read_bytes())
    if not isinstance(content, dict):
        raise ValueError("not a JSON object of titles by item id")
    for item_id, title in content.items():
        if not isinstance(title, str):
            raise ValueError(f"the title of {item_id} is no string")
        yield item_id, title
