"""Pages of a comparison, read back."""

import json
from pathlib import Path


def tables(page: Path) -> dict[str, list[dict[str, str]]]:
    """Return the rows of each section's table by heading; the cells by column."""
    found = {}
    for section in page.read_text().split("\n## ")[1:]:
        title, *rest = section.splitlines()
        heads, _, *rows = [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in rest
            if line.startswith("|")
        ]
        found[title] = [dict(zip(heads, row, strict=True)) for row in rows]
    return found


def figures(page: Path) -> dict[str, float]:
    """Return the figures that stand beside a page."""
    twin = json.loads(page.with_suffix(".json").read_text())
    assert set(twin) == {"figures", "command", "machine", "date"}
    named: dict[str, float] = twin["figures"]
    return named
