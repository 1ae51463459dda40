"""The files of a comparison: a page of Markdown, its figures as JSON, a page of HTML with plots."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import torch

from training.comparison.choice import Comparison, compare
from training.comparison.costs import describe_machine
from training.comparison.measurements import measure
from training.comparison.published import published
from training.comparison.sections import Section, Table, figures, sections
from training.data.log import PreparedLog
from training.errors import ConfigError
from training.folders import staged_file

_TEMPLATE = "comparison.html"


def write_comparison(
    folders: Sequence[Path],
    log: PreparedLog,
    *,
    page: Path,
    html: Path,
    data: str,
    command: str,
    costs: bool = False,
    cited: Sequence[Path] = (),
    device: torch.device,
) -> None:
    """Compare finished runs and write `page`, its JSON twin and `html`.

    `data`: the log's name in figures, by which published ones are found, too. `costs`: measure cost
    over the history length, on `device`. `cited`: twins of other pages, whose figures are repeated.
    Raises CheckpointError and ConfigError (`compare`).
    """
    _check_targets(page, html)
    citations = {path.stem: _figures_of(path) for path in cited}
    others = published(data, log.header.n_users)
    comparison = compare(folders, log)
    measured = measure(comparison, log, costs=costs, device=device)
    content = _Content(
        title=f"Next-item models on {data}",
        intro=_intro(comparison, log),
        sections=sections(comparison, measured, others) + _cited_sections(citations),
        figures=figures(comparison, measured, data)
        | {name: value for twin in citations.values() for name, value in twin.items()},
        command=command,
        machine=describe_machine(device),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )
    _write_markdown(page, content)
    _write_twin(page.with_suffix(".json"), content)
    _write_html(html, content)


@dataclass(frozen=True, kw_only=True)
class _Content:
    title: str
    intro: str
    sections: list[Section]
    figures: dict[str, float]
    command: str
    machine: str
    date: str


def _check_targets(page: Path, html: Path) -> None:
    if page.suffix != ".md":
        raise ConfigError(f"{page}: expected a name that ends in .md; the figures go beside it")
    for path in (page, html):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")


def _figures_of(twin: Path) -> dict[str, float]:
    try:
        figures = json.loads(twin.read_text())["figures"]
        return {str(name): float(value) for name, value in figures.items()}
    except OSError as error:
        raise ConfigError(f"{twin}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{twin}: expected JSON with "figures", numbers by name') from error


def _cited_sections(citations: Mapping[str, Mapping[str, float]]) -> list[Section]:
    return [
        Section(
            title=f"From {stem}.md",
            text="Measured by a command of its own, which stands on that page.",
            table=Table(
                ("figure", "value"),
                tuple((name, f"{value:g}") for name, value in figures.items()),
            ),
        )
        for stem, figures in citations.items()
    ]


def _intro(comparison: Comparison, log: PreparedLog) -> str:
    header = log.header
    return (
        f"{header.n_users:,} users, {header.n_items:,} items, {header.n_behaviors:,} behaviors. "
        f"The run with the best validation {comparison.metric} decides which settings stand for a "
        "model; the test part chooses nothing. Runs of the same settings are averaged; ± is the "
        "sample standard deviation over their seeds. A training that a limit has ended, and not "
        "patience, is marked as shortened."
    )


def _write_markdown(page: Path, content: _Content) -> None:
    parts = [
        f"# {content.title}",
        f"```\n{content.command}\n```",
        f"{content.date}, {content.machine}. {content.intro}",
    ]
    for section in content.sections:
        parts += [f"## {section.title}", section.text, _markdown(section.table)]
    with staged_file(page) as staging:
        staging.write_text("\n\n".join(parts) + "\n")


def _write_twin(path: Path, content: _Content) -> None:
    twin = {name: getattr(content, name) for name in ("figures", "command", "machine", "date")}
    with staged_file(path) as staging:
        staging.write_text(json.dumps(twin, indent=2) + "\n")


def _write_html(path: Path, content: _Content) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("training", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template(_TEMPLATE).render(vars(content))
    with staged_file(path) as staging:
        staging.write_text(text)


def _markdown(table: Table) -> str:
    lines = [table.heads, ("---",) * len(table.heads), *table.rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
