"""Results of a measurement as a page and as its JSON twin.

Each measurement owns one section of `<name>.md` and some figures of `<name>.json`; the others'
stay as they are.
"""

import datetime
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtest.machine import describe_machine, yardstick_s


def write_section(
    page: Path, *, title: str, command: str, text: str, figures: Mapping[str, float]
) -> None:
    """Put a section under the heading `title` into the page, in place of an older one.

    `text`: Markdown below the heading; command, machine and date are added. The JSON file of the
    same name gets the figures.
    """
    machine = f"{describe_machine()}; two million additions in Python: {yardstick_s():.3f} s"
    section = f"## {title}\n\n`{command}`\\\n{machine}\n\n{text.strip()}\n"
    old = page.read_text() if page.exists() else f"# {page.stem.capitalize()}\n"
    found = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", old, flags=re.M | re.S)
    new = (
        old[: found.start()]
        + section
        + ("\n" if found.end() < len(old) else "")
        + old[found.end() :]
        if found
        else f"{old.rstrip()}\n\n{section}"
    )
    page.write_text(new)
    twin = page.with_suffix(".json")
    content = json.loads(twin.read_text()) if twin.exists() else {"figures": {}, "command": {}}
    content["figures"].update(figures)
    content["command"][title] = command
    content["machine"] = machine
    content["date"] = datetime.datetime.now(datetime.UTC).date().isoformat()
    twin.write_text(json.dumps(content, indent=2) + "\n")


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Return a Markdown table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def milliseconds(seconds: float) -> str:
    """Return e.g. "3.2"; a dash where there was no answer."""
    return f"{1000 * seconds:.1f}" if seconds != float("inf") else "-"
