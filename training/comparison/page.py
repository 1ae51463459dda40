"""The files of a comparison: a page of Markdown, its figures as JSON, a page of HTML with plots."""

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import jinja2

from training.comparison.tables import Section, Table
from training.errors import ConfigError
from training.folders import staged_file

_TEMPLATE = "comparison.html"


@dataclass(frozen=True, kw_only=True)
class Content:
    """What stands on the pages; `command` made them, on `machine`."""

    title: str
    intro: str
    sections: Sequence[Section]
    figures: Mapping[str, float]
    command: str
    machine: str
    date: str = field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).date().isoformat()
    )


@dataclass(frozen=True, kw_only=True)
class Citation:
    """The figures of another page, `stem` being its name."""

    stem: str
    figures: Mapping[str, float]

    def section(self) -> Section:
        """Return the figures as a section."""
        return Section(
            title=f"From {self.stem}.md",
            text="Measured by a command of its own, which stands on that page.",
            table=Table(
                ("figure", "value"),
                tuple((name, f"{value:g}") for name, value in self.figures.items()),
            ),
        )


def write_pages(page: Path, html: Path, content: Content, cited: Sequence[Citation]) -> None:
    """Write `page`, its JSON twin and `html`, the citations after all else."""
    figures = dict(content.figures)
    for citation in cited:
        figures |= citation.figures
    sections = (*content.sections, *(citation.section() for citation in cited))
    content = replace(content, sections=sections, figures=figures)
    _write_markdown(page, content)
    _write_twin(page.with_suffix(".json"), content)
    _write_html(html, content)


def check_targets(page: Path, html: Path) -> None:
    """Raise ConfigError where `write_pages` could not write, before anything is measured."""
    if page.suffix != ".md":
        raise ConfigError(f"{page}: expected a name that ends in .md; the figures go beside it")
    for path in (page, html):
        if not path.parent.is_dir():
            raise ConfigError(f"{path}: there is no folder {path.parent}")


def read_citation(twin: Path) -> Citation:
    """Read the JSON twin of another page; ConfigError names it where it is none."""
    try:
        figures = json.loads(twin.read_text())["figures"]
        named = {str(name): float(value) for name, value in figures.items()}
    except OSError as error:
        raise ConfigError(f"{twin}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f'{twin}: expected JSON with "figures", numbers by name') from error
    return Citation(stem=twin.stem, figures=named)


def _write_markdown(page: Path, content: Content) -> None:
    parts = [
        f"# {content.title}",
        f"```\n{content.command}\n```",
        f"{content.date}, {content.machine}. {content.intro}",
    ]
    for section in content.sections:
        parts += [f"## {section.title}", section.text, _markdown(section.table)]
    with staged_file(page) as staging:
        staging.write_text("\n\n".join(parts) + "\n")


def _write_twin(path: Path, content: Content) -> None:
    twin = {name: getattr(content, name) for name in ("figures", "command", "machine", "date")}
    with staged_file(path) as staging:
        staging.write_text(json.dumps(twin, indent=2) + "\n")


def _write_html(path: Path, content: Content) -> None:
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
