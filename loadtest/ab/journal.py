"""What the processes of a run write down as they go, one JSON object a line, a file each.

A visit (the columns of `visits.SCHEMA`), `{"unposted_clicks": n}` where clicks of a visit did not
reach the service, or `{"error": text}` where the run cannot go on. A process that is killed leaves
all of its lines but a part of the last one.
"""

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_PATTERN = "journal-*.jsonl"
_BEGAN = "began"


class Journal:
    """The file of this process in the folder of a run."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _PATTERN.replace("*", str(os.getpid()))

    def write(self, line: Mapping[str, object]) -> None:
        """Append one line; it is in the file when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def run_began_s(folder: Path) -> float:
    """Return when the run began (`time.monotonic()`): when the first process asked.

    That clock is one for all processes of a machine.
    """
    path = folder / _BEGAN
    staging = folder / f".{_BEGAN}.{os.getpid()}"
    staging.write_text(repr(time.monotonic()))
    try:
        # A link appears whole or not at all, and only one process can make it.
        path.hardlink_to(staging)
    except FileExistsError:
        pass
    finally:
        staging.unlink()
    return float(path.read_text())


@dataclass(frozen=True, kw_only=True)
class Journals:
    """All journals of a run: `visits` in order of time, `unposted_clicks`, and `errors`."""

    visits: list[dict[str, Any]] = field(default_factory=list)
    unposted_clicks: int = 0
    errors: list[str] = field(default_factory=list)


def read_journals(folder: Path) -> Journals:
    """Read what the processes of a run have written."""
    visits, unposted, errors = [], 0, []
    for path in sorted(folder.glob(_PATTERN)):
        whole, _, _part = path.read_text().rpartition("\n")
        for line in map(json.loads, whole.splitlines()):
            if "error" in line:
                errors.append(line["error"])
            elif "unposted_clicks" in line:
                unposted += line["unposted_clicks"]
            else:
                visits.append(line)
    visits.sort(key=lambda visit: visit["at_s"])
    return Journals(visits=visits, unposted_clicks=unposted, errors=errors)


def count_lines(folder: Path) -> int:
    """Return how many lines there are so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(_PATTERN))


def remove_journals(folder: Path) -> None:
    """Remove the files of this page."""
    for path in (*folder.glob(_PATTERN), folder / _BEGAN):
        path.unlink(missing_ok=True)
