"""A log becomes exactly the bytes that the history log promises, or one clear error."""

import json
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from contract.history_log import HEADER, HistoryLog
from training.data.log import PreparedLog
from training.data.prepare import PrepareOptions, PrepareReport, prepare
from training.data.readers import LogSource
from training.errors import LogError

REAL_LOGS = Path(__file__).parents[3] / "../shared/data"
CHUNK_ROWS = 1 << 20  # what prepare copies at once


def records(rows: Iterable[tuple[int, int]]) -> bytes:
    return b"".join(struct.pack("<qI", item, time) for item, time in rows)


def write(path: Path, columns: Mapping[str, Any]) -> Path:
    pl.DataFrame(columns).write_parquet(path)
    return path


def run(path: Path, target: Path, *, columns=None, **options) -> PrepareReport:
    source = LogSource(path=path, columns=columns or {})
    return prepare(source, target, PrepareOptions(**options))


class TestHistories:
    def test_bytes_are_the_records_of_each_user_oldest_first(self, tmp_path):
        path = write(
            tmp_path / "log.parquet",
            {
                "user": [12, 5, 12, 5, 12],
                "item": [2**63 - 1, 7, 1, 8, 300],
                "timestamp": [50, 2**32 - 1, 40, 0, 60],
            },
        )
        run(path, tmp_path / "out")
        assert (tmp_path / "out" / "behaviors.bin").read_bytes() == records(
            [(8, 0), (7, 2**32 - 1), (1, 40), (2**63 - 1, 50), (300, 60)]
        )
        log = HistoryLog(tmp_path / "out")
        assert [log.user_id(user) for user in range(len(log))] == ["5", "12"]
        assert log.history(1) == records([(1, 40), (2**63 - 1, 50), (300, 60)])

    def test_string_users_keep_their_names(self, make_log):
        log = make_log({"user": ["zoë", "a b", "ab"], "item": [1, 2, 3], "timestamp": [1, 1, 1]})
        assert {log.user_id(u): log.history(u) for u in range(len(log))} == {
            "zoë": records([(1, 1)]),
            "a b": records([(2, 1)]),
            "ab": records([(3, 1)]),
        }

    def test_ties_keep_the_order_of_the_log_not_that_of_the_item_ids(self, make_log):
        items = [5, 9, 1, 7, 3]
        log = make_log({"user": [1] * 5, "item": items, "timestamp": [4, 4, 4, 2, 4]})
        assert log.history(0) == records([(7, 2), (5, 4), (9, 4), (1, 4), (3, 4)])

    def test_the_order_column_breaks_ties_but_never_time(self, make_log):
        log = make_log(
            {
                "user": [1] * 4,
                "item": [10, 20, 30, 40],
                "timestamp": [4, 4, 4, 2],
                "order": [3, 1, 2, 9],
            }
        )
        assert log.history(0) == records([(40, 2), (20, 4), (30, 4), (10, 4)])

    def test_equal_rows_are_kept(self, make_log):
        log = make_log({"user": [1, 1], "item": [3, 3], "timestamp": [4, 4]})
        assert log.history(0) == records([(3, 4), (3, 4)])

    def test_a_log_of_several_chunks_equals_sorting_it_at_once(self, tmp_path):
        """The chunk boundary falls inside a user's run; nothing is lost, doubled or moved."""
        n_rows = CHUNK_ROWS + 1000
        rng = np.random.default_rng(1)
        users = rng.integers(3, size=n_rows)
        items = rng.integers(1, 500, size=n_rows)
        times = rng.integers(10_000, size=n_rows)
        path = write(tmp_path / "log.parquet", {"user": users, "item": items, "timestamp": times})
        run(path, tmp_path / "out")
        log = PreparedLog(tmp_path / "out")
        order = np.lexsort((times, users))  # stable: ties keep their place
        np.testing.assert_array_equal(log.behavior_users(), users[order])
        np.testing.assert_array_equal(log.behaviors["item"], items[order])
        np.testing.assert_array_equal(log.behaviors["time"], times[order])


class TestLabels:
    COLUMNS: Mapping[str, Sequence[Any]] = {
        "user": [1, 1, 1, 1, 2],
        "item": [11, 12, 13, 14, 15],
        "timestamp": [5, 6, 6, 7, 8],
        "label": [None, 0, 1, None, 0],
    }

    @pytest.mark.parametrize(
        ("choice", "first", "second"),
        [
            pytest.param("positives", [(11, 5), (13, 6), (14, 7)], [], id="positives"),
            pytest.param("all", [(11, 5), (12, 6), (13, 6), (14, 7)], [(15, 8)], id="all"),
        ],
    )
    def test_histories_hold(self, make_log, choice, first, second):
        """Rows without a label are behaviors always; negatives only where all are asked for."""
        log = make_log(self.COLUMNS, behaviors=choice)
        assert log.history(0) == records(first)
        assert log.history(1) == records(second)

    def test_histories_hold_positives_unless_said_otherwise(self, tmp_path):
        run(write(tmp_path / "log.parquet", self.COLUMNS), tmp_path / "out")
        assert PreparedLog(tmp_path / "out").header.n_behaviors == 3

    @pytest.mark.parametrize("choice", ["positives", "all"])
    def test_every_labelled_row_is_an_impression(self, make_log, choice):
        log = make_log(self.COLUMNS, behaviors=choice)
        assert log.impressions.tolist() == [(12, 6, 0), (13, 6, 1), (15, 8, 0)]
        assert log.impression_users().tolist() == [0, 0, 1]
        assert log.items.tolist() == [11, 12, 13, 14, 15]

    def test_impressions_of_one_second_keep_the_order_of_the_log(self, make_log):
        log = make_log(
            {"user": [1] * 3, "item": [9, 3, 6], "timestamp": [5] * 3, "label": [0, 1, 0]}
        )
        assert log.impressions["item"].tolist() == [9, 3, 6]

    def test_header_counts_what_was_written(self, tmp_path):
        report = run(write(tmp_path / "log.parquet", self.COLUMNS), tmp_path / "out")
        header = report.header
        assert report.n_dropped == 0
        assert header.model_dump(exclude={"fingerprint"}) == {
            "format_version": 1,
            "source": "log.parquet",
            "n_users": 2,
            "n_behaviors": 3,
            "n_impressions": 3,
            "n_items": 5,
            "has_labels": True,
            "has_probabilities": False,
            "has_categories": False,
        }
        assert json.loads((tmp_path / "out" / HEADER).read_text()) == header.model_dump()

    def test_a_log_without_labels_has_no_impressions(self, make_log):
        log = make_log({"user": [1], "item": [2], "timestamp": [3]})
        assert not log.header.has_labels
        assert log.impressions.tolist() == []
        assert log.impression_users().tolist() == []

    def test_probabilities_follow_their_impressions(self, make_log):
        log = make_log(
            {
                "user": [2, 1, 1],
                "item": [5, 6, 7],
                "timestamp": [1, 2, 1],
                "label": [1, 0, None],
                "click_probability": [0.75, 0.25, None],
            }
        )
        assert log.impressions["item"].tolist() == [6, 5]
        assert log.probabilities is not None
        assert log.probabilities.tolist() == [0.25, 0.75]

    def test_fractional_labels_are_refused(self, tmp_path):
        path = write(
            tmp_path / "log.parquet", {"user": [1], "item": [2], "timestamp": [3], "label": [0.5]}
        )
        with pytest.raises(LogError, match="1 with a label other than 0 and 1"):
            run(path, tmp_path / "out")


class TestItems:
    def test_categories_are_numbered_from_1_by_name(self, make_log):
        log = make_log(
            {
                "user": [1] * 5,
                "item": [40, 10, 30, 20, 50],
                "timestamp": [1, 2, 3, 4, 5],
                "category": ["drama", "war", None, "comedy", "drama"],
            }
        )
        assert log.items.tolist() == [10, 20, 30, 40, 50]
        assert log.item_features["category"].tolist() == [3, 1, 0, 2, 2]
        assert log.header.has_categories

    def test_an_item_without_category_in_one_row_has_that_of_another(self, make_log):
        log = make_log(
            {"user": [1, 1], "item": [7, 7], "timestamp": [1, 2], "category": [None, "war"]}
        )
        assert log.item_features["category"].tolist() == [1]

    def test_a_log_without_categories_has_none(self, make_log):
        log = make_log({"user": [1, 1], "item": [7, 8], "timestamp": [1, 2]})
        assert not log.header.has_categories
        assert log.item_features == {}

    FEATURES: Mapping[str, Sequence[Any]] = {
        "user": [2, 1, 1, 2, 1],
        "item": [40, 10, 30, 20, 10],
        "timestamp": [1, 2, 3, 4, 5],
        "brand_id": [90, 100, None, 90, 7],
        "author": ["woolf", None, None, "eco", "kafka"],
    }

    def test_further_features_are_numbered_from_1_by_name(self, make_log):
        """Whether numbers or strings; of several values an item has the first that stands in its
        behaviors, user by user.
        """
        log = make_log(self.FEATURES, item_features={"brand": "brand_id", "author": "author"})
        assert log.items.tolist() == [10, 20, 30, 40]
        assert {name: rows.tolist() for name, rows in log.item_features.items()} == {
            "brand": [1, 2, 0, 2],  # "100" stands before "90"
            "author": [2, 1, 0, 3],
        }

    def test_a_feature_without_any_value_is_none_of_all_items(self, make_log):
        columns = {"user": [1, 1], "item": [7, 8], "timestamp": [1, 2]}
        brands = pl.Series([None, None], dtype=pl.Int32)
        log = make_log({**columns, "brand": brands}, item_features={"brand": "brand"})
        assert log.item_features["brand"].tolist() == [0, 0]

    def test_features_stand_beside_categories(self, make_log):
        log = make_log(
            {**self.FEATURES, "category": ["b", "a", "b", "a", "a"]},
            item_features={"author": "author"},
        )
        assert log.item_features["category"].tolist() == [1, 1, 2, 2]
        assert log.item_features["author"].tolist() == [2, 1, 0, 3]

    def test_k_core_is_taken_of_all_rows(self, make_log):
        """Item 3 and user 2 have one row each; shown rows count as much as chosen ones."""
        log = make_log(
            {
                "user": [1, 1, 1, 3, 3, 2],
                "item": [1, 2, 3, 1, 2, 1],
                "timestamp": [1] * 6,
                "label": [1, 0, 1, 0, 0, 1],
            },
            min_interactions=2,
        )
        assert [log.user_id(user) for user in range(len(log))] == ["1", "3"]
        assert log.items.tolist() == [1, 2]
        assert log.history(0) == records([(1, 1)])


class TestHistoryBefore:
    """A second log, of what users did before the first begins."""

    def prepare(self, tmp_path: Path, earlier: Mapping[str, Any], **options) -> PreparedLog:
        log = write(
            tmp_path / "log.parquet",
            {"user": [1, 1, 2], "item": [5, 6, 7], "timestamp": [90, 91, 92], "label": [0, 1, 0]},
        )
        prepare(
            LogSource(path=log),
            tmp_path / "out",
            PrepareOptions(**options),
            history=LogSource(
                path=write(tmp_path / "earlier.parquet", earlier), columns={"order": "pos"}
            ),
        )
        return PreparedLog(tmp_path / "out")

    def test_its_rows_are_behaviors_and_no_impressions(self, tmp_path):
        log = self.prepare(
            tmp_path,
            {"user": [2, 1], "item": [3, 4], "timestamp": [20, 10], "pos": [0, 0], "label": [0, 0]},
        )
        assert log.history(0) == records([(4, 10), (6, 91)])
        assert log.history(1) == records([(3, 20)])
        assert log.impressions["item"].tolist() == [5, 6, 7]

    def test_a_row_without_a_time_has_that_of_the_users_next_row_with_one(self, tmp_path):
        log = self.prepare(
            tmp_path,
            {
                "user": [1, 1, 2, 1, 1],
                "item": [13, 12, 20, 11, 10],
                "timestamp": [50, None, 7, 40, None],
                "pos": [3, 2, 0, 1, 0],
            },
        )
        assert log.history(0) == records([(10, 40), (11, 40), (12, 50), (13, 50), (6, 91)])
        assert log.history(1) == records([(20, 7)])

    def test_a_row_that_no_time_follows_is_refused_by_the_name_of_its_file(self, tmp_path):
        earlier = {"user": [1, 1], "item": [3, 4], "timestamp": [10, None], "pos": [0, 1]}
        with pytest.raises(LogError, match=r"earlier\.parquet: 1 of 2 rows .* a timestamp that is"):
            self.prepare(tmp_path, earlier)
        assert not (tmp_path / "out").exists()

    def test_rows_left_out_of_both_are_counted(self, tmp_path):
        log = write(tmp_path / "log.parquet", {"user": [1, 1], "item": [5, 0], "timestamp": [9, 9]})
        earlier = write(
            tmp_path / "e.parquet", {"user": [1, 1], "item": [0, 4], "timestamp": [3, 2]}
        )
        report = prepare(
            LogSource(path=log),
            tmp_path / "out",
            PrepareOptions(drop_invalid=True),
            history=LogSource(path=earlier),
        )
        assert report.n_dropped == 2
        assert PreparedLog(tmp_path / "out").history(0) == records([(4, 2), (5, 9)])

    def test_users_of_another_type_are_refused(self, tmp_path):
        earlier = {"user": ["1"], "item": [3], "timestamp": [10], "pos": [0]}
        with pytest.raises(
            LogError, match=r"earlier\.parquet: its users are of type String, .* Int64"
        ):
            self.prepare(tmp_path, earlier)


class TestFingerprint:
    BASE: Mapping[str, Sequence[Any]] = {
        "user": ["ab", "ab", "c"],
        "item": [1, 2, 3],
        "timestamp": [4, 5, 6],
        "label": [1, 1, 1],
        "category": ["x", "y", "x"],
    }

    def test_the_same_log_has_the_same_fingerprint_wherever_it_lies(self, tmp_path):
        pl.DataFrame(self.BASE).write_csv(tmp_path / "log.csv")
        write(tmp_path / "other.parquet", self.BASE)
        one = run(tmp_path / "log.csv", tmp_path / "one").header
        two = run(tmp_path / "other.parquet", tmp_path / "folder" / "two").header
        assert re.fullmatch("[0-9a-f]{64}", one.fingerprint)
        assert one.fingerprint == two.fingerprint

    def test_of_a_log_without_further_features_is_what_it_was_before_there_were_any(self, make_log):
        """Models name their log by it."""
        assert make_log(self.BASE).header.fingerprint == (
            "fd3d92c00b2556e26a5596ba68b0cea1fcf84f57360ecfd629c64572f4014463"
        )

    def test_further_features_are_in_it_in_whatever_order(self, make_log):
        columns = {**self.BASE, "brand": [1, 2, 3], "author": ["a", "b", "b"]}
        one = make_log(columns, item_features={"brand": "brand", "author": "author"})
        same = make_log(columns, item_features={"author": "author", "brand": "brand"})
        less = make_log(columns, item_features={"brand": "brand"})
        other = make_log(
            {**columns, "brand": [1, 3, 2]}, item_features={"brand": "brand", "author": "author"}
        )
        assert one.header.fingerprint == same.header.fingerprint
        found = {log.header.fingerprint for log in (one, less, other, make_log(columns))}
        assert len(found) == 4

    @pytest.mark.parametrize(
        "change",
        [
            pytest.param({"user": ["ab", "ab", "d"]}, id="a user id"),
            pytest.param({"item": [1, 2, 4]}, id="an item"),
            pytest.param({"timestamp": [4, 5, 7]}, id="a time"),
            pytest.param({"label": [1, 0, 1]}, id="a label"),
            pytest.param({"user": ["ab", "c", "c"]}, id="a behavior's owner"),
            pytest.param({"user": ["a", "a", "bc"]}, id="where user ids end"),
            pytest.param({"category": ["x", "x", "y"]}, id="a category"),
        ],
    )
    def test_another_log_has_another_fingerprint(self, make_log, change):
        """A model is refused on another log than its own by this alone."""
        base, changed = make_log(self.BASE), make_log({**self.BASE, **change})
        assert base.header.fingerprint != changed.header.fingerprint


class TestInvalidRows:
    VALID: Mapping[str, Any] = {"user": "a", "item": 1, "timestamp": 1, "label": 1}

    def write(self, path: Path, bad: Mapping[str, Any]) -> Path:
        """Write four rows; the third is bad."""
        schema = {
            "user": pl.String,
            "item": pl.Int64,
            "timestamp": pl.Int64,
            "label": pl.Int64,
        }
        rows = [self.VALID, self.VALID, {**self.VALID, **bad}, self.VALID]
        pl.DataFrame(rows, schema=schema).write_parquet(path)
        return path

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            pytest.param({"user": None}, "a missing user", id="null user"),
            pytest.param({"user": ""}, "a user id outside 1 .. 128 bytes", id="empty user"),
            pytest.param({"user": "ü" * 65}, "a user id outside 1 .. 128 bytes", id="130 bytes"),
            pytest.param({"item": 0}, "an item id that is missing or outside 1 ..", id="item 0"),
            pytest.param({"item": -7}, "an item id that is missing or outside 1 ..", id="item -7"),
            pytest.param({"item": None}, "an item id that is missing or outside", id="null item"),
            pytest.param(
                {"timestamp": -1},
                "a timestamp that is missing or outside 0 .. 4294967295 (unix seconds)",
                id="before 1970",
            ),
            pytest.param({"timestamp": 2**32}, "a timestamp that is missing", id="after 2106"),
            pytest.param({"timestamp": None}, "a timestamp that is missing", id="null time"),
            pytest.param({"label": 2}, "a label other than 0 and 1", id="label 2"),
        ],
    )
    def test_a_row_that_is_no_behavior_is_refused_with_its_number(self, tmp_path, bad, reason):
        path = self.write(tmp_path / "log.parquet", bad)
        with pytest.raises(LogError) as refused:
            run(path, tmp_path / "out")
        message = str(refused.value)
        assert message.startswith(f"{path}: 1 of 4 rows are no behaviors: 1 with {reason}")
        assert "(the first is row 3)" in message
        assert "--drop-invalid" in message

    @pytest.mark.parametrize(
        "bad", [{"user": None}, {"item": 0}, {"timestamp": 2**32}, {"label": -1}]
    )
    def test_drop_invalid_leaves_the_row_out_and_counts_it(self, tmp_path, bad):
        path = self.write(tmp_path / "log.parquet", bad)
        report = run(path, tmp_path / "out", drop_invalid=True)
        assert report.n_dropped == 1
        assert report.header.n_behaviors == 3

    def test_each_reason_has_its_own_count(self, tmp_path):
        path = write(
            tmp_path / "log.parquet",
            {"user": [1, None, 2], "item": [0, 0, 5], "timestamp": [1, 2, 2**40]},
        )
        with pytest.raises(
            LogError, match=r"3 of 3 rows.*1 with a missing user; 2 with an item.*1 with a timesta"
        ):
            run(path, tmp_path / "out")

    def test_longest_user_id_and_the_ends_of_the_ranges_are_fine(self, tmp_path):
        path = self.write(
            tmp_path / "log.parquet",
            {"user": "ü" * 64, "item": 2**63 - 1, "timestamp": 2**32 - 1},
        )
        assert run(path, tmp_path / "out").header.n_behaviors == 4

    def test_milliseconds_taken_for_seconds_are_refused(self, tmp_path):
        path = write(
            tmp_path / "log.parquet", {"user": [1], "item": [2], "timestamp": [1_600_000_000_000]}
        )
        with pytest.raises(LogError, match=r"a timestamp that is .* \(unix seconds\)"):
            run(path, tmp_path / "out")

    @pytest.mark.parametrize(
        ("text", "column"),
        [
            pytest.param("user,item,timestamp\n1,2,3\n1,2,soon\n", "time", id="named"),
            pytest.param("u1,B00,5.0,1\nu1,B00,5.0,soon\n", "timestamp", id="amazon"),
            pytest.param("1,2,3,pv,4\n1,two,3,pv,4\n", "item", id="taobao"),
        ],
    )
    def test_unreadable_values_are_shown_with_file_and_column(self, tmp_path, text, column):
        path = tmp_path / "log.csv"
        path.write_text(text)
        with pytest.raises(LogError, match=rf"log\.csv: cannot be prepared: .*'{column}'"):
            run(path, tmp_path / "out")

    @pytest.mark.parametrize("line", ["1::2::x::4", "1::2::3", "1::2::3::4::5", "1,2,3,4"])
    def test_unreadable_movielens_rows_are_refused(self, tmp_path, line):
        path = tmp_path / "ratings.dat"
        path.write_text(f"{line}\n")
        with pytest.raises(LogError, match=r"ratings\.dat: cannot be prepared"):
            run(path, tmp_path / "out")

    def test_item_numbers_past_63_bits_are_refused(self, tmp_path):
        path = write(
            tmp_path / "log.parquet", {"user": [1], "item": [str(2**63)], "timestamp": [1]}
        )
        with pytest.raises(LogError, match=r"log\.parquet: cannot be prepared: .*'item'"):
            run(path, tmp_path / "out")

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            pytest.param("log.csv", "user,item,timestamp\n", id="header only"),
            pytest.param("ratings.dat", "", id="no bytes"),
        ],
    )
    def test_an_empty_log(self, tmp_path, name, text):
        (tmp_path / name).write_text(text)
        with pytest.raises(LogError, match=f"{name}: no behaviors in it"):
            run(tmp_path / name, tmp_path / "out")

    def test_a_log_of_invalid_rows_only(self, tmp_path):
        path = write(tmp_path / "log.parquet", {"user": [1], "item": [0], "timestamp": [1]})
        with pytest.raises(LogError, match="no behaviors in it"):
            run(path, tmp_path / "out", drop_invalid=True)

    def test_an_empty_core_names_its_k(self, tmp_path):
        path = write(tmp_path / "log.parquet", {"user": [1], "item": [1], "timestamp": [1]})
        with pytest.raises(LogError, match=r"log\.parquet: the 5-core is empty"):
            run(path, tmp_path / "out", min_interactions=5)


class TestTarget:
    def test_an_existing_target_is_refused_and_not_touched(self, tmp_path):
        path = write(tmp_path / "log.parquet", {"user": [1], "item": [1], "timestamp": [1]})
        target = tmp_path / "out"
        target.mkdir()
        (target / "mine.txt").write_text("precious")
        with pytest.raises(LogError, match="out exists: name a new folder, or remove it first"):
            run(path, target)
        assert [(p.name, p.read_text()) for p in target.iterdir()] == [("mine.txt", "precious")]
        assert {p.name for p in tmp_path.iterdir()} == {"log.parquet", "out"}

    @pytest.mark.parametrize(
        "columns",
        [
            pytest.param({"user": [1], "item": [0], "timestamp": [1]}, id="while validating"),
            pytest.param({"user": [1], "item": ["1"], "timestamp": ["x"]}, id="while reading"),
            pytest.param({"user": [1], "item": [1], "timestamp": [1]}, id="while writing"),
        ],
    )
    def test_a_failed_prepare_leaves_nothing_behind(self, tmp_path, columns):
        path = write(tmp_path / "log.parquet", columns)
        with pytest.raises(LogError):
            run(path, tmp_path / "out", min_interactions=2)
        assert [p.name for p in tmp_path.iterdir()] == ["log.parquet"]

    def test_only_files_of_the_format_are_left(self, tmp_path):
        path = write(tmp_path / "log.parquet", {"user": [1], "item": [1], "timestamp": [1]})
        run(path, tmp_path / "new" / "out")
        assert sorted(p.name for p in (tmp_path / "new" / "out").iterdir()) == [
            "behavior_offsets.npy",
            "behaviors.bin",
            "impression_offsets.npy",
            "impressions.bin",
            "item_categories.npy",
            "items.npy",
            "log.json",
            "probabilities.bin",
            "user_id_offsets.npy",
            "user_ids.bin",
        ]
        assert [p.name for p in (tmp_path / "new").iterdir()] == ["out"]


@pytest.fixture(scope="module")
def ml1m(tmp_path_factory) -> PreparedLog:
    target = tmp_path_factory.mktemp("ml1m") / "log"
    run(REAL_LOGS / "ml1m.parquet", target, columns={"order": "sasrec_pos"}, behaviors="all")
    return PreparedLog(target)


@pytest.mark.skipif(not REAL_LOGS.exists(), reason="the real logs lie beside the project only")
class TestMovieLens1M:
    def test_has_the_published_size(self, ml1m):
        header = ml1m.header
        assert (header.n_users, header.n_items) == (6_040, 3_416)
        assert header.n_impressions == header.n_behaviors == 999_611
        assert round(float(ml1m.impressions["label"].mean()), 3) == 0.575

    def test_each_sequence_is_in_the_order_of_the_published_split(self, ml1m):
        """Among 528,654 ties, only `sasrec_pos` says which behavior is a user's last."""
        rows = pl.read_parquet(REAL_LOGS / "ml1m.parquet").sort("user_id", "sasrec_pos")
        users = rows.group_by("user_id").len().sort("user_id")
        assert [ml1m.user_id(u) for u in range(len(ml1m))] == users["user_id"].cast(str).to_list()
        np.testing.assert_array_equal(np.diff(ml1m.behavior_offsets), users["len"])
        np.testing.assert_array_equal(ml1m.behaviors["item"], rows["item_id"])
        np.testing.assert_array_equal(ml1m.behaviors["time"], rows["timestamp"])
