"""The folder of a run is read as it was written, or refused with a message that says why."""

import json

import polars as pl
import pytest

from loadtest.ab.visits import (
    RUN,
    SCHEMA,
    VISITS,
    Run,
    VisitsError,
    read_run,
    read_visits,
    write_run,
    write_visits,
    write_whole,
)
from tests.loadtest.ab.runs import STARTED, clicks, failed, frame, run_of, visit


class TestVisits:
    def test_are_read_as_they_were_written(self, tmp_path):
        rows = [visit("ä", "imn", **clicks(11, 25)), failed("2"), failed("3", "din", status=0)]
        write_visits(rows, tmp_path / "new" / "run")
        read = read_visits(tmp_path / "new" / "run")
        assert read.schema == SCHEMA
        assert read.to_dicts() == rows

    def test_may_be_a_frame_with_its_columns_in_any_order(self, tmp_path):
        written = frame(visit(), failed())
        write_visits(written.select(reversed(SCHEMA.names())), tmp_path)
        assert read_visits(tmp_path).equals(written)

    def test_may_be_none_at_all(self, tmp_path):
        write_visits([], tmp_path)
        assert read_visits(tmp_path).schema == SCHEMA

    def test_leave_no_other_file(self, tmp_path):
        write_visits([visit()], tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [VISITS]

    def test_may_lie_in_a_folder_whose_name_looks_like_a_pattern(self, tmp_path):
        folder = tmp_path / "run [1] *"
        write_visits([visit()], folder)
        assert len(read_visits(folder)) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"user_id": None}, "user_id must not be empty", id="no user"),
            pytest.param({"status": 42}, "status must be 0 or one of HTTP", id="status"),
            pytest.param({"at_s": float("nan")}, "at_s must be finite", id="no time"),
            pytest.param({"at_s": -0.5}, "at_s must be finite and not negative", id="before start"),
            pytest.param({"arm": None}, "arm must be named", id="an answer without arm"),
            pytest.param({"latency_s": None}, "latency_s must be null unless", id="no latency"),
            pytest.param({"status": 503, "n_shown": 0}, "latency_s must be null", id="latency"),
            pytest.param({"latency_s": float("inf")}, "latency_s must", id="endless latency"),
            pytest.param({"n_shown": -1}, "n_shown must be 0 unless", id="negative"),
            pytest.param(
                {"status": 0, "latency_s": None}, "n_shown must be 0", id="an error shows"
            ),
            pytest.param({"clicked_items": [3]}, "must be equally long", id="lengths"),
            pytest.param({"clicked_items": None}, "must be equally long", id="no clicks"),
            pytest.param(
                {"clicked_items": [None], "clicked_categories": [1]}, "not be null", id="null click"
            ),
            pytest.param(clicks(*range(6)), "more clicks than items shown", id="too many clicks"),
        ],
    )
    def test_that_contradict_themselves_are_refused_with_their_row(
        self, tmp_path, changes, message
    ):
        with pytest.raises(VisitsError, match=rf"the rows: .*{message}.*; row 1 is \("):
            write_visits([visit(), visit(**changes)], tmp_path)
        assert not (tmp_path / VISITS).exists()

    def test_of_another_type_are_refused(self, tmp_path):
        with pytest.raises(VisitsError, match="the rows are no visits"):
            write_visits([visit(at_s="noon")], tmp_path)
        with pytest.raises(VisitsError, match="status must be Int32, got Int64"):
            write_visits(frame(visit()).with_columns(pl.col("status").cast(pl.Int64)), tmp_path)

    def test_that_are_missing_name_the_folder(self, tmp_path):
        with pytest.raises(VisitsError, match=rf"{tmp_path} is not the folder of an A/B run"):
            read_visits(tmp_path)

    @pytest.mark.parametrize("kept", [0, 3, 100, -1], ids=str)
    def test_that_are_cut_off_name_the_file(self, tmp_path, kept):
        write_visits([visit()] * 50, tmp_path)
        path = tmp_path / VISITS
        path.write_bytes(path.read_bytes()[:kept])
        with pytest.raises(VisitsError, match=rf"{path} is not readable"):
            read_visits(tmp_path)

    def test_without_a_column_name_it_and_the_file(self, tmp_path):
        frame(visit()).drop("arm").write_parquet(tmp_path / VISITS)
        with pytest.raises(VisitsError, match=r"visits.parquet: column 'arm' is missing"):
            read_visits(tmp_path)


class TestRun:
    def test_is_read_as_it_was_written(self, tmp_path):
        run = run_of(imn=0.2, din=0.8)
        write_run(run, tmp_path)
        assert read_run(tmp_path) == run

    def test_is_one_flat_object(self, tmp_path):
        write_run(run_of(), tmp_path)
        assert json.loads((tmp_path / RUN).read_text()) == {
            "started": "2026-01-31T12:00:00+00:00",
            "stated_shares": {"imn": 0.5, "din": 0.5},
            "baseline": "din",
            "visits": 7,
        }

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            pytest.param({"baseline": "old"}, "'old' is none of the arms: imn, din", id="baseline"),
            pytest.param({"stated_shares": {}}, "must give each arm a share", id="no arms"),
            pytest.param({"stated_shares": {"din": 0.0}}, "share above 0", id="no share"),
            pytest.param({"stated_shares": {"din": 0.7}}, "must add up to 1, got 0.7", id="sum"),
            pytest.param({"started": STARTED.replace(tzinfo=None)}, "a time zone", id="no zone"),
            pytest.param({"settings": {"baseline": 1}}, "not be named baseline", id="a clash"),
        ],
    )
    def test_that_contradicts_itself_is_refused(self, changes, message):
        usual = {"started": STARTED, "stated_shares": {"imn": 0.5, "din": 0.5}, "baseline": "din"}
        with pytest.raises(VisitsError, match=message):
            Run(**(usual | changes))

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            pytest.param("{", "is not readable", id="no JSON"),
            pytest.param("[]", 'expected "started"', id="no object"),
            pytest.param("{}", 'expected "started"', id="empty"),
            pytest.param(
                '{"started": "noon", "stated_shares": {"a": 1}, "baseline": "a"}',
                'expected "started"',
                id="no time",
            ),
            pytest.param(
                '{"started": "2026-01-31T12:00Z", "stated_shares": {"a": 1}, "baseline": "b"}',
                "none of the arms",
                id="no baseline",
            ),
        ],
    )
    def test_that_is_damaged_names_the_file(self, tmp_path, text, message):
        (tmp_path / RUN).write_text(text)
        with pytest.raises(VisitsError, match=rf"{tmp_path / RUN}.*{message}"):
            read_run(tmp_path)

    def test_that_is_missing_names_the_folder(self, tmp_path):
        with pytest.raises(VisitsError, match=r"run.json is missing"):
            read_run(tmp_path)


def test_a_file_whose_writing_fails_stays_as_it_was(tmp_path):
    path = tmp_path / "page"
    path.write_text("old")

    def fail(staging):
        staging.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
