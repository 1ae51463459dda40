"""What the documentation names is there."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


def ids(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_make_verb_exists(document):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = set(re.findall(r"`make ([a-z]+)|^make ([a-z]+)", document.read_text(), re.MULTILINE))
    assert {one or other for one, other in named} <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_path_exists(document):
    folders = "contract|training|exporter|service|loadtest|tests|docs|deploy"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text()):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=ids)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("decision", sorted(ROOT.glob("docs/decisions/*.md")), ids=ids)
def test_a_decision_is_dated_and_names_what_holds_it(decision):
    date = re.match(r"\d{4}-\d\d-\d\d", decision.name)
    assert date is not None
    assert date.group() in decision.read_text()
    assert "Held by" in decision.read_text()


def test_the_modules_of_the_readme_can_be_run():
    for module in re.findall(r"python -m (\w+)", (ROOT / "README.md").read_text()):
        assert (ROOT / module / "__main__.py").exists(), module


@pytest.mark.parametrize("page", sorted(ROOT.glob("docs/results/*.md")), ids=ids)
def test_results_have_their_figures_beside_them(page):
    twin = json.loads(page.with_suffix(".json").read_text())
    assert set(twin) == {"figures", "command", "machine", "date"}
    assert twin["figures"]
    assert all(isinstance(figure, int | float) for figure in twin["figures"].values())
