"""The report of a run: all figures as plain JSON, a page that is readable alone, plain verdicts."""

import argparse
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from loadtest.ab.comparison import Bootstrap
from loadtest.ab.report import (
    REPORT_HTML,
    REPORT_JSON,
    Report,
    add_command,
    markdown_table,
    summary,
    write_report,
)
from loadtest.ab.visits import VisitsError, write_run, write_visits
from tests.loadtest.ab.runs import clicks, drawn_visits, failed, frame, run_of, visit

HALVES = {"din": 0.5, "imn": 0.5}
BETTER = drawn_visits(2, n_users=400, shares=HALVES, din=0.5)
EQUAL = drawn_visits(2, n_users=200, shares=HALVES)
TWINS = frame(
    *(visit("a", "din", **clicks(1)), visit("b", "din", **clicks(1, 2))),
    *(visit("c", "imn", **clicks(1)), visit("d", "imn", **clicks(1, 2))),
)


def folder_of(tmp_path: Path, visits: pl.DataFrame, **run: Any) -> Path:
    folder = tmp_path / "run"
    write_visits(visits, folder)
    write_run(run_of(**run), folder)
    return folder


def report_of(tmp_path: Path, visits: pl.DataFrame, **run: Any) -> Report:
    return write_report(folder_of(tmp_path, visits, **run))


def page_of(tmp_path: Path, visits: pl.DataFrame, **run: Any) -> str:
    folder = folder_of(tmp_path, visits, **run)
    write_report(folder)
    return (folder / REPORT_HTML).read_text()


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no JSON")


class TestVerdict:
    def test_names_a_significant_difference_with_its_interval(self, tmp_path):
        report = report_of(tmp_path, BETTER)
        (verdict,) = report.verdicts
        change = report.comparison.arms[1].uplifts["ctr"]
        low, high = (f"{100 * bound:+.1f} %" for bound in (change.low, change.high))
        expected = f"imn: CTR {100 * change.value:+.1f} % [{low}, {high}], p < 0.001: significant"
        assert verdict == expected

    def test_says_how_many_more_visits_would_decide(self, tmp_path):
        report = report_of(tmp_path, EQUAL)
        change = report.comparison.arms[1].uplifts["ctr"]
        assert (
            f"p = {change.p_value:.3f}: undecided: {change.more_visits:,.0f} more visits"
            in (report.verdicts[0])
        )

    def test_says_that_equal_arms_are_never_told_apart(self, tmp_path):
        (verdict,) = report_of(tmp_path, TWINS).verdicts
        assert "CTR +0.0 %" in verdict
        assert "p = 1.000: undecided: no number of visits" in verdict

    def test_does_not_hold_where_users_were_not_assigned_as_stated(self, tmp_path):
        report = report_of(tmp_path, BETTER, imn=0.2, din=0.8)
        assert report.verdicts[0].startswith("not valid, the sample ratio is mismatched: imn: CTR")

    def test_is_one_for_each_arm_that_is_compared(self, tmp_path):
        shares = {"a": 0.5, "b": 0.25, "c": 0.25}
        visits = drawn_visits(1, n_users=60, shares=shares)
        report = report_of(tmp_path, visits, baseline="a", **shares)
        assert [verdict.partition(":")[0] for verdict in report.verdicts] == ["b", "c"]
        assert "2 arms are compared with a; p-values are not corrected" in summary(report)

    @pytest.mark.parametrize(
        ("visits", "reason"),
        [
            pytest.param([visit("a", "din")], "imn showed nothing", id="an empty arm"),
            pytest.param(
                [visit("a", "din", **clicks(1)), visit("b", "imn")],
                "nobody clicked in imn",
                id="no clicks",
            ),
            pytest.param(
                [visit("a", "din", **clicks(1)), visit("b", "imn", **clicks(1))],
                "imn had one visitor only",
                id="one visitor",
            ),
            pytest.param(
                [
                    *(visit(user, "din", **clicks(1)) for user in "ab"),
                    *(visit(user, "imn", **clicks(1)) for user in "cd"),
                ],
                "no two users differ",
                id="no variance",
            ),
        ],
    )
    def test_says_why_there_is_no_comparison(self, tmp_path, visits, reason):
        (verdict,) = report_of(tmp_path, frame(*visits)).verdicts
        assert verdict == f"imn: CTR cannot be compared: {reason}"

    def test_says_that_one_arm_is_compared_with_nothing(self, tmp_path):
        report = report_of(tmp_path, frame(visit("a", "main")), baseline="main", main=1.0)
        assert report.verdicts == ("main is the only arm: there is nothing to compare",)


class TestJson:
    def test_holds_the_figures_that_are_returned(self, tmp_path):
        report = report_of(tmp_path, BETTER)
        written = json.loads((tmp_path / "run" / REPORT_JSON).read_text())
        assert written == report.figures()
        change = report.comparison.arms[1].uplifts["ctr"]
        assert written["arms"][1]["uplifts"]["ctr"]["value"] == change.value
        assert written["arms"][1]["uplifts"]["ctr"]["bootstrap_low"] is None
        assert written["sample_ratio"]["p_value"] == report.comparison.sample_ratio.p_value
        assert written["is_mismatched"] is False
        assert written["verdicts"] == list(report.verdicts)
        assert written["settings"] == {"visits": 7}

    @pytest.mark.parametrize(
        ("visits", "shares"),
        [
            pytest.param([visit("a", "din", at_s=0.0)], HALVES, id="one visit"),
            pytest.param([failed(user) for user in "abc"], HALVES, id="errors only"),
            pytest.param([visit("a", "din"), visit("b", "imn")], HALVES, id="no clicks"),
            pytest.param([visit("a", "din", **clicks(1))], {"din": 1.0}, id="one arm"),
            pytest.param(TWINS.to_dicts(), HALVES, id="no difference"),
        ],
    )
    def test_has_null_for_what_is_not_defined(self, tmp_path, visits, shares):
        folder = folder_of(tmp_path, frame(*visits), **shares)
        write_report(folder)
        figures = json.loads((folder / REPORT_JSON).read_text(), parse_constant=refuse)
        assert figures["arms"][0]["ctr_over_time"][1]["ctr"] is None
        assert "nan" not in re.sub(r"<[^>]*>", "", (folder / REPORT_HTML).read_text()).lower()


class TestPage:
    def test_shows_every_row_of_the_table(self, tmp_path):
        folder = folder_of(tmp_path, BETTER)
        report = write_report(folder)
        page = (folder / REPORT_HTML).read_text()
        rows = [line.strip("| ").split(" | ") for line in markdown_table(report).splitlines()[2:]]
        assert len(rows) == 8
        for row in rows:
            cells = "".join(f"<td>{cell.replace('<', '&lt;')}</td>" for cell in row[2:])
            assert f'<th scope="row">{row[1]}</th>{cells}' in page
        assert report.verdicts[0].replace("<", "&lt;") in page

    def test_is_alarmed_by_a_mismatch_alone(self, tmp_path):
        alarm = '<p class="alarm" role="alert">SAMPLE-RATIO MISMATCH (p &lt; 0.001): '
        assert alarm in page_of(tmp_path, BETTER, imn=0.2, din=0.8)
        page = page_of(tmp_path, BETTER)
        assert 'class="alarm"' not in page
        assert "<p>Sample ratio as stated (p = " in page

    def test_needs_no_other_file_and_no_host(self, tmp_path):
        page = page_of(tmp_path, BETTER)
        assert not re.search(r"(src|href|url)\s*[=(]\s*[\"']?(?!#)[a-z/.]", page)
        assert "http" not in page

    def test_is_readable_in_light_and_dark(self, tmp_path):
        page = page_of(tmp_path, BETTER)
        assert "@media (prefers-color-scheme: dark)" in page
        drawings = "".join(re.findall(r"<svg.*?</svg>", page, re.DOTALL))
        # No drawing decides a color of its own.
        assert re.findall(r"#[0-9a-f]{6}\b", drawings) == []
        for name in set(re.findall(r"var\((--[\w-]+)\)", page)):
            assert page.count(f"{name}:") == 2

    def test_can_be_read_aloud(self, tmp_path):
        page = page_of(tmp_path, BETTER)
        assert page.count("<table>") == page.count("<caption>") == 5
        assert re.findall(r"<th(?! scope=\"(?:col|row|rowgroup)\")[ >]", page) == []
        for name in ("forest", "time"):
            assert f'<svg role="img" aria-labelledby="{name}-title"' in page
            assert f'<title id="{name}-title">' in page

    def test_tells_arms_apart_by_more_than_color(self, tmp_path):
        page = page_of(tmp_path, BETTER)
        lines = re.findall(
            r'style="fill: none; (?:stroke-dasharray: [^;]*; )?[^"]*arm-\d[^"]*"', page
        )
        dashes = {match.group() for line in lines if (match := re.search("dasharray[^;]*", line))}
        assert len(dashes) == 1
        assert any("dasharray" not in line for line in lines)

    def test_gives_no_id_twice(self, tmp_path):
        page = page_of(tmp_path, BETTER)
        ids = Counter(re.findall(r'\bid="([^"]+)"', page))
        assert ids
        assert set(ids.values()) == {1}
        assert set(re.findall(r'(?:url\(|href=")#([\w-]+)', page)) <= set(ids)

    def test_counts_who_is_left_out(self, tmp_path):
        visits = frame(visit("a", "din"), visit("a", "imn"), visit("b", "din"), failed("c"))
        page = page_of(tmp_path, visits)
        assert "3 visitors. 1 switched" in page
        assert "1 never got an answer that named an arm" in page

    def test_has_names_of_arms_as_they_are(self, tmp_path):
        visits = frame(visit("a", "<b>"), visit("b", "old"))
        page = page_of(tmp_path, visits, baseline="old", **{"<b>": 0.5, "old": 0.5})
        assert "<b>" not in page.replace("<!-- <b> -->", "")
        assert '<th scope="rowgroup" rowspan="4">&lt;b&gt;</th>' in page

    def test_of_one_arm_compares_nothing(self, tmp_path):
        page = page_of(tmp_path, frame(visit("a", "main")), baseline="main", main=1.0)
        assert page.count("<svg") == 1
        assert "<h2>Power</h2>" not in page


class TestTable:
    def test_is_the_papers_table_3(self, tmp_path):
        lines = markdown_table(report_of(tmp_path, TWINS)).splitlines()
        assert lines[0] == "| arm | metric | raw | relative | 95 % interval | p |"
        assert lines[2] == "| din | CTR | 30.00 % ± 10.00 % | baseline | - | - |"
        assert lines[3] == "| din | UV-IPV | 1.500 ± 0.500 | baseline | - | - |"
        names = [line.split(" | ")[:2] for line in lines[2:]]
        assert names == [
            [f"| {arm}", metric]
            for arm in ("din", "imn")
            for metric in ("CTR", "UV-IPV", "TCIC", "CCC")
        ]
        assert lines[6].startswith("| imn | CTR | 30.00 % ± 10.00 % | +0.0 % | [-")

    def test_has_a_column_for_the_bootstrap_where_there_is_one(self, tmp_path):
        folder = folder_of(tmp_path, EQUAL)
        report = write_report(folder, bootstrap=Bootstrap(replicates=200))
        change = report.comparison.arms[1].uplifts["ctr"]
        found = [line for line in markdown_table(report).splitlines() if "imn | CTR" in line]
        bounds = f"[{100 * change.bootstrap_low:+.1f} %, {100 * change.bootstrap_high:+.1f} %]"
        assert f" | {bounds} | " in found[0]
        assert '<th scope="col">by bootstrap</th>' in (folder / REPORT_HTML).read_text()


class TestCommand:
    def run(self, *arguments: object) -> int:
        parser = argparse.ArgumentParser()
        add_command(parser.add_subparsers(required=True))
        options = parser.parse_args(["ab-report", *map(str, arguments)])
        code: int = options.run(options)
        return code

    def test_prints_table_and_verdict_and_writes_both_files(self, tmp_path, capsys):
        folder = folder_of(tmp_path, BETTER)
        assert self.run(folder, "--bootstrap", 100, "--seed", 3) == 0
        printed = capsys.readouterr().out
        assert "| imn | CTR | " in printed
        assert "by bootstrap" in printed
        assert "Sample ratio as stated" in printed
        assert "p < 0.001: significant" in printed
        assert str(folder / REPORT_HTML) in printed
        assert {path.name for path in folder.iterdir()} == {
            *("visits.parquet", "run.json"),
            *(REPORT_HTML, REPORT_JSON),
        }

    def test_ends_with_1_where_the_run_is_not_valid(self, tmp_path, capsys):
        assert self.run(folder_of(tmp_path, BETTER, imn=0.2, din=0.8)) == 1
        assert "SAMPLE-RATIO MISMATCH" in capsys.readouterr().out

    def test_refuses_a_folder_that_is_no_run(self, tmp_path):
        with pytest.raises(VisitsError, match="not the folder of an A/B run"):
            self.run(tmp_path)
        assert list(tmp_path.iterdir()) == []

    def test_refuses_too_few_replicates(self, tmp_path):
        with pytest.raises(ValueError, match="replicates must be at least 100, got 0"):
            self.run(folder_of(tmp_path, EQUAL), "--bootstrap", 0)
