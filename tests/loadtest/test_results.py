"""Results pages: each measurement owns its section and its figures."""

import json

from loadtest.results import milliseconds, table, write_section


def write(page, title, text, **figures):
    write_section(page, title=title, command=f"run {title}", text=text, figures=figures)


def test_a_page_and_its_twin_are_made(tmp_path):
    page = tmp_path / "speed.md"
    write(page, "First", "a table", rate=5.0)
    assert page.read_text().startswith("# Speed\n\n## First\n\n`run First`")
    assert page.read_text().endswith("a table\n")
    twin = json.loads((tmp_path / "speed.json").read_text())
    assert twin["figures"] == {"rate": 5.0}
    assert twin["command"] == {"First": "run First"}
    assert twin["machine"]
    assert len(twin["date"]) == len("2026-01-31")


def test_a_measurement_replaces_its_own_section_and_nothing_else(tmp_path):
    page = tmp_path / "speed.md"
    for title in ("First", "Second", "Third"):
        write(page, title, f"old {title}", **{title: 1.0})
    write(page, "Second", r"new \1 text", Second=2.0)
    text = page.read_text()
    assert text.index("old First") < text.index(r"new \1 text") < text.index("old Third")
    assert "old Second" not in text
    assert text.count("\n## ") == 3
    twin = json.loads(page.with_suffix(".json").read_text())
    assert twin["figures"] == {"First": 1.0, "Second": 2.0, "Third": 1.0}


def test_what_stands_above_the_sections_stays(tmp_path):
    page = tmp_path / "speed.md"
    page.write_text("# Title by hand\n\nWords.\n")
    write(page, "First", "a")
    write(page, "First", "b")
    assert page.read_text().startswith("# Title by hand\n\nWords.\n\n## First\n")


def test_a_table_is_markdown():
    assert table(("a", "b"), [(1, "x"), (2, "y")]) == (
        "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"
    )


def test_no_answer_is_a_dash():
    assert [milliseconds(0.00321), milliseconds(float("inf"))] == ["3.2", "-"]
