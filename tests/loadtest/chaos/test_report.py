"""The table of rows, and what is made of their folders."""

import json

import polars as pl
import pytest

from loadtest.chaos import report
from loadtest.chaos.errors import ChaosError
from loadtest.chaos.outcome import NotRun, Outcome
from loadtest.chaos.rows import ROWS


def outcome(name="kill-worker", **changes):
    values = {
        "name": name,
        "fault": "words",
        "rate": 50.0,
        "seconds": 30.0,
        "held_per_s": 49.25,
        "requests": 1500,
        "refused": 3,
        "refusals": {"overloaded": 1, "history-unavailable": 2},
        "timed_out": 4,
        "broken": 2,
        "unsent": 1,
        "unexpected": 0,
        "statuses": {"0": 3, "200": 1494, "429": 1, "503": 2},
        "degraded": 0,
        "wrong": 0,
        "acknowledged": 240,
        "lost": 0,
        "doubled": 0,
        "p99_before_s": 0.010,
        "p99_during_s": 0.015,
        "p99_after_s": None,
        "late_sends_s": 0.0004,
        "recovery_s": 0.4,
        "notes": ["seen"],
        "findings": [],
    }
    return Outcome(**{**values, **changes})


NOT_RUN = NotRun(name="clock", fault="other words", reason="no library")


def test_a_row_has_every_count():
    line = next(line for line in report.markdown([outcome()]).splitlines() if "| words" in line)
    expected = (
        "| words | 50 | 49.2 | 1,500 | 3 | 4 | 2 | 1 | 0 | 0 | 0 | 240 | 0 | 0 "
        "| 10.0 | 15.0 | - | 0.4 |"
    )
    assert line == expected


def test_findings_stand_out_and_what_was_not_run_says_why():
    page = report.markdown([outcome(findings=["2 requests failed"], recovery_s=None), NOT_RUN])
    noticed = (
        "- words: **2 requests failed**; seen; refused: history-unavailable 2, overloaded 1; "
        "the generator's own delay: p99 0.4 ms."
    )
    assert noticed in page
    assert "- **Not run**: other words: no library" in page
    assert "| - | none |" in page


@pytest.mark.parametrize(
    ("rows", "clean"),
    [
        ([outcome()], True),
        ([outcome(), NOT_RUN], False),
        ([outcome(), outcome(findings=["x"])], False),
        ([outcome(wrong=1)], False),
    ],
)
def test_only_rows_that_were_run_without_a_finding_are_clean(rows, clean):
    assert report.is_clean(rows) == clean


def test_rows_come_back_from_their_folders_in_the_order_of_the_table(tmp_path):
    rows = [NOT_RUN, outcome("reload"), outcome()]
    requests = pl.DataFrame({"due_s": [0.5]})
    for row in rows:
        report.save(row, requests, {"rate": 50.0}, tmp_path)
    assert report.load(tmp_path) == [rows[2], rows[1], rows[0]]
    assert json.loads((tmp_path / "reload" / "settings.json").read_text()) == {"rate": 50.0}
    assert pl.read_parquet(tmp_path / "reload" / "requests.parquet").equals(requests)


def test_a_row_that_is_run_again_replaces_the_older_one(tmp_path):
    for wrong in (1, 0):
        report.save(outcome(wrong=wrong), pl.DataFrame(), {}, tmp_path)
    (row,) = report.load(tmp_path)
    assert isinstance(row, Outcome)
    assert row.wrong == 0


def test_a_row_of_another_version_is_named(tmp_path):
    report.save(outcome(), pl.DataFrame(), {}, tmp_path)
    path = tmp_path / "kill-worker" / "report.json"
    path.write_text(path.read_text().replace('"timed_out"', '"other"'))
    with pytest.raises(ChaosError, match=r"kill-worker/report\.json is not of this version"):
        report.load(tmp_path)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "kill-worker").mkdir()
    (tmp_path / "kill-worker" / "mine").touch()
    with pytest.raises(OSError, match="not empty"):
        report.save(outcome(), pl.DataFrame(), {}, tmp_path)
    assert (tmp_path / "kill-worker" / "mine").exists()


def test_the_page_has_the_figures_that_are_known(tmp_path):
    page = tmp_path / "reliability.md"
    fuzzed = {"fuzz_executions": 2_000_000, "fuzz_crashes": 0, "schemathesis_failures": 0}
    (tmp_path / "fuzzing.json").write_text(json.dumps({"figures": fuzzed}))
    rows = [
        outcome("sigterm", wrong=1),
        outcome("reload", lost=2, doubled=3),
        NOT_RUN,
    ]
    report.write(rows, page, "python -m loadtest chaos")
    twin = json.loads(page.with_suffix(".json").read_text())
    assert twin["figures"] == {
        "faults": 2,
        "wrong_scores": 1,
        "lost_events": 2,
        "doubled_events": 3,
        "drain_failed_requests": 7,
        "fuzz_executions": 2_000_000,
        "fuzz_crashes": 0,
    }
    assert "## Faults under load" in page.read_text()


def test_without_its_rows_a_figure_is_not_made_up(tmp_path):
    found = report.figures([outcome(), NOT_RUN], tmp_path / "reliability.md")
    assert set(found) == {"faults", "wrong_scores", "lost_events", "doubled_events"}


def test_every_row_has_a_name_and_words_of_its_own():
    assert len({row.name for row in ROWS}) == len({row.fault for row in ROWS}) == len(ROWS)
