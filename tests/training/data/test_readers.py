"""Every log format of the field, written by hand, becomes one table."""

from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.readers import LogFormat, LogSource, detect_format, scan
from training.errors import ConfigError, LogError


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def read(path: Path, **source) -> dict[str, list[object]]:
    return scan(LogSource(path=path, **source)).collect().to_dict(as_series=False)


class TestFormats:
    def test_movielens_dat_has_labels_from_ratings(self, tmp_path):
        path = write(
            tmp_path / "ratings.dat", "1::1193::5::978300760\n1::661::3::978302109\n2::1193::4::7\n"
        )
        assert read(path) == {
            "user": [1, 1, 2],
            "item": [1193, 661, 1193],
            "time": [978300760, 978302109, 7],
            "label": [1, 0, 1],
        }

    def test_movielens_csv_has_labels_from_half_star_ratings(self, tmp_path):
        path = write(
            tmp_path / "ratings.csv",
            "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n",
        )
        assert read(path) == {
            "user": ["1", "1"],
            "item": [296, 306],
            "time": [1147880044, 1147868817],
            "label": [1, 0],
        }

    @pytest.mark.parametrize(
        ("threshold", "labels"),
        [
            pytest.param(5.0, [1, 0, 0], id="five stars"),
            pytest.param(3.5, [1, 1, 0], id="three and a half"),
            pytest.param(0.5, [1, 1, 1], id="any rating"),
        ],
    )
    def test_label_threshold_is_the_lowest_positive_rating(self, tmp_path, threshold, labels):
        path = write(
            tmp_path / "ratings.csv",
            "userId,movieId,rating,timestamp\n1,1,5.0,1\n1,2,3.5,2\n1,3,1.0,3\n",
        )
        assert read(path, label_threshold=threshold)["label"] == labels

    def test_amazon_asins_are_read_in_base_36(self, tmp_path):
        path = write(
            tmp_path / "ratings_Books.csv",
            "A2F6N60Z96CAJI,B000F83SZQ,5.0,1393545600\nA1F6404F1VG29J,0001050087,1.0,1042070400\n",
        )
        assert read(path) == {
            "user": ["A2F6N60Z96CAJI", "A1F6404F1VG29J"],
            "item": [int("B000F83SZQ", 36), int("0001050087", 36)],
            "time": [1393545600, 1042070400],
        }

    def test_amazon_asins_of_digits_only_are_base_36_too(self, tmp_path):
        """A log whose names all happen to be digits gives the same ids as any other."""
        path = write(tmp_path / "books.csv", "A1,0001050087,5.0,1\nA1,0002005468,5.0,2\n")
        assert read(path)["item"] == [int("0001050087", 36), int("0002005468", 36)]

    def test_taobao_has_categories_and_no_labels(self, tmp_path):
        path = write(
            tmp_path / "UserBehavior.csv",
            "1,2268318,2520377,pv,1511544070\n100,2333346,2520771,buy,1511561733\n",
        )
        assert read(path) == {
            "user": [1, 100],
            "item": [2268318, 2333346],
            "time": [1511544070, 1511561733],
            "category": ["2520377", "2520771"],
        }

    @pytest.mark.parametrize(
        "names",
        [
            pytest.param(("user", "item", "timestamp"), id="plain"),
            pytest.param(("user_id", "item_id", "time"), id="snake case"),
            pytest.param(("userId", "itemId", "timestamp"), id="camel case"),
        ],
    )
    def test_named_csv_is_read_under_its_usual_names(self, tmp_path, names):
        path = write(tmp_path / "log.csv", f"note,{','.join(names)}\nx,7,8,9\n")
        assert read(path) == {"user": ["7"], "item": [8], "time": [9]}

    def test_named_csv_in_any_column_order(self, tmp_path):
        path = write(tmp_path / "log.csv", "label,timestamp,item,user\n1,9,8,7\n")
        assert read(path) == {"user": ["7"], "item": [8], "time": [9], "label": [1]}

    def test_parquet_has_all_roles_with_their_types(self, tmp_path):
        path = tmp_path / "log.parquet"
        pl.DataFrame(
            {
                "user_id": pl.Series([7], dtype=pl.Int32),
                "item_id": pl.Series([8], dtype=pl.UInt16),
                "timestamp": pl.Series([9.0], dtype=pl.Float64),
                "label": pl.Series([True]),
                "click_probability": pl.Series([0.5], dtype=pl.Float64),
                "category_id": pl.Series([3], dtype=pl.Int16),
                "order": pl.Series([1], dtype=pl.Int8),
                "rest": ["x"],
            }
        ).write_parquet(path)
        table = scan(LogSource(path=path)).collect()
        assert dict(table.schema) == {
            "user": pl.Int64,
            "item": pl.Int64,
            "time": pl.Int64,
            "label": pl.Int8,
            "probability": pl.Float32,
            "category": pl.String,
            "order": pl.Int64,
        }
        assert table.row(0) == (7, 8, 9, 1, 0.5, "3", 1)

    def test_folder_of_parquet_is_read_in_the_order_of_its_files(self, tmp_path):
        folder = tmp_path / "log"
        for name, item in (("part-1", 11), ("part-0", 10), ("2024/part-0", 9)):
            path = folder / f"{name}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pl.DataFrame({"user": [1], "item": [item], "timestamp": [5]}).write_parquet(path)
        assert read(folder)["item"] == [9, 10, 11]

    def test_an_order_inside_the_log_is_kept_by_streaming(self, tmp_path):
        path = tmp_path / "log.parquet"
        items = list(range(50_000, 0, -1))
        pl.DataFrame({"user": 1, "item": items, "timestamp": 5}).write_parquet(path)
        table = scan(LogSource(path=path)).collect(engine="streaming")
        assert table["item"].to_list() == items


class TestIds:
    def test_users_may_be_any_string(self, tmp_path):
        path = write(tmp_path / "log.csv", "user,item,timestamp\nanna,1,1\nÖzil 7,2,2\n")
        assert read(path)["user"] == ["anna", "Özil 7"]

    def test_users_with_leading_zeros_stay_apart(self, tmp_path):
        """User ids are strings; what a CSV calls 007 is asked for as "007" by the service."""
        path = write(tmp_path / "log.csv", "user,item,timestamp\n007,1,1\n7,2,2\n")
        assert [str(user) for user in read(path)["user"]] == ["007", "7"]

    def test_item_numbers_in_a_string_column_are_numbers(self, tmp_path):
        path = tmp_path / "log.parquet"
        pl.DataFrame({"user": [1, 1], "item": ["12", "9"], "timestamp": [1, 2]}).write_parquet(path)
        assert read(path)["item"] == [12, 9]

    def test_item_names_are_base_36_when_one_of_them_is_no_number(self, tmp_path):
        path = tmp_path / "log.parquet"
        frame = pl.DataFrame({"user": [1, 1], "item": ["12", "1Z"], "timestamp": [1, 2]})
        frame.write_parquet(path)
        assert read(path)["item"] == [int("12", 36), int("1Z", 36)]

    @settings(deadline=None, max_examples=40)
    @given(
        names=st.lists(
            st.text("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ", min_size=12, max_size=12), min_size=1
        )
    )
    def test_the_longest_item_names_keep_their_base_36_value(self, tmp_path_factory, names):
        path = tmp_path_factory.mktemp("names") / "books.csv"
        write(path, "".join(f"u,{name},5.0,1\n" for name in names))
        assert read(path)["item"] == [int(name, 36) for name in names]


class TestMapping:
    def test_named_columns_replace_the_usual_names(self, tmp_path):
        """Of two columns that could be the item, the one that was named is taken."""
        path = tmp_path / "log.parquet"
        pl.DataFrame(
            {"who": ["a"], "item": [1], "sku": [2], "when": [3], "stars": [1], "pos": [4]}
        ).write_parquet(path)
        columns = {"user": "who", "item": "sku", "time": "when", "label": "stars", "order": "pos"}
        assert read(path, columns=columns) == {
            "user": ["a"],
            "item": [2],
            "time": [3],
            "label": [1],
            "order": [4],
        }

    @pytest.mark.parametrize(
        "header",
        [
            pytest.param("who,sku,when", id="three columns"),
            pytest.param("who,sku,stars,when", id="as many as Amazon's"),
            pytest.param("who,sku,kind,stars,when", id="as many as Taobao's"),
        ],
    )
    def test_named_columns_are_found_in_a_csv_without_a_format(self, tmp_path, header):
        path = write(
            tmp_path / "log.csv", f"{header}\n{','.join('12345'[: header.count(',') + 1])}"
        )
        columns = {"user": "who", "item": "sku", "time": "when"}
        assert read(path, columns=columns)["user"] == ["1"]

    def test_named_columns_of_a_csv_with_its_format_said(self, tmp_path):
        path = write(tmp_path / "log.csv", "who,sku,stars,when\n1,2,3,4\n")
        columns = {"user": "who", "item": "sku", "time": "when"}
        assert read(path, columns=columns, format="named") == {
            "user": ["1"],
            "item": [2],
            "time": [4],
        }

    @pytest.mark.parametrize(
        "brands",
        [
            pytest.param(pl.Series([7, None], dtype=pl.Int16), id="integers"),
            pytest.param(pl.Series(["7", None]), id="strings"),
            pytest.param(pl.Series(["7", None], dtype=pl.Categorical), id="categories"),
        ],
    )
    def test_item_features_are_text(self, tmp_path, brands):
        path = tmp_path / "log.parquet"
        pl.DataFrame(
            {"user": [1, 2], "item": [1, 2], "time": [1, 2], "make": brands}
        ).write_parquet(path)
        assert read(path, item_features={"brand": "make"})["feature_brand"] == ["7", None]

    def test_item_features_of_a_csv_keep_leading_zeros(self, tmp_path):
        path = write(tmp_path / "log.csv", "user,item,timestamp,brand\n1,2,3,007\n1,3,4,\n")
        assert read(path, item_features={"brand": "brand"})["feature_brand"] == ["007", None]

    def test_milliseconds_become_whole_seconds_rounded_down(self, tmp_path):
        path = write(tmp_path / "log.csv", "user,item,timestamp\n1,1,1600000000999\n1,2,1000\n")
        assert read(path, time_unit="ms")["time"] == [1600000000, 1]


class TestDetection:
    @pytest.mark.parametrize(
        ("name", "first_line", "expected"),
        [
            pytest.param("ratings.dat", "1::2::3::4", "movielens-dat", id="dat"),
            pytest.param(
                "ratings.csv", "userId,movieId,rating,timestamp", "movielens-csv", id="movielens"
            ),
            pytest.param("Books.csv", "A1,B000,5.0,139", "amazon", id="four fields"),
            pytest.param("UserBehavior.csv", "1,2,3,pv,4", "taobao", id="five fields"),
            pytest.param("log.csv", "user_id,item_id,timestamp", "named", id="a user column"),
            pytest.param(
                "log.csv", "user,item,rating,timestamp", "named", id="four names are no Amazon row"
            ),
            pytest.param("log.parquet", "PAR1", "named", id="parquet"),
            pytest.param(
                "log.csv", '"user","item","rating","timestamp"', "named", id="quoted names"
            ),
            pytest.param("log.csv", "\ufeffuser,item,timestamp", "named", id="byte order mark"),
        ],
    )
    def test_format_follows_from_name_and_first_line(self, tmp_path, name, first_line, expected):
        assert detect_format(write(tmp_path / name, first_line + "\n")) == expected

    def test_a_folder_is_parquet(self, tmp_path):
        assert detect_format(tmp_path) == "named"

    @pytest.mark.parametrize(
        ("log_format", "line", "item"),
        [
            pytest.param("movielens-dat", "1::2::3::4\n", 2, id="dat"),
            pytest.param("amazon", "u,Z,3.0,4\n", 35, id="amazon"),
            pytest.param("taobao", "1,2,3,pv,4\n", 2, id="taobao"),
        ],
    )
    def test_a_format_that_is_said_needs_no_suffix(
        self, tmp_path, log_format: LogFormat, line, item
    ):
        path = write(tmp_path / "part-00000", line)
        assert read(path, format=log_format)["item"] == [item]


class TestErrors:
    def test_missing_file(self, tmp_path):
        with pytest.raises(LogError, match=r"away\.parquet: no such file or folder"):
            scan(LogSource(path=tmp_path / "away.parquet"))

    @pytest.mark.parametrize(
        ("header", "role", "looked_for"),
        [
            pytest.param("user,thing,timestamp", "item", "item, item_id, itemId", id="item"),
            pytest.param("user,item,when", "time", "timestamp, time", id="time"),
        ],
    )
    def test_missing_column_is_named_with_what_was_looked_for(
        self, tmp_path, header, role, looked_for
    ):
        path = write(tmp_path / "log.csv", f"{header}\n1,2,3\n")
        with pytest.raises(
            LogError, match=rf"log\.csv: no {role} column; looked for {looked_for}.*it has \['user'"
        ):
            scan(LogSource(path=path))

    def test_missing_user_column_of_parquet(self, tmp_path):
        path = tmp_path / "log.parquet"
        pl.DataFrame({"person": [1], "item": [1], "time": [1]}).write_parquet(path)
        with pytest.raises(LogError, match="no user column; looked for user, user_id, userId"):
            scan(LogSource(path=path))

    def test_missing_mapped_column_is_named(self, tmp_path):
        path = write(tmp_path / "log.csv", "user,item,timestamp\n1,2,3\n")
        with pytest.raises(LogError, match=r"log\.csv: no column 'pos' for order; it has \['user'"):
            scan(LogSource(path=path, columns={"order": "pos"}))

    def test_missing_column_of_an_item_feature_is_named(self, tmp_path):
        path = write(tmp_path / "log.csv", "user,item,timestamp\n1,2,3\n")
        with pytest.raises(
            ConfigError,
            match=r"log\.csv: no column 'maker' for item feature brand; it has \['user'",
        ):
            scan(LogSource(path=path, item_features={"brand": "maker"}))

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            pytest.param("category", r"name its column by --column category=", id="a role"),
            pytest.param("Brand", "expected a name that fits", id="capital"),
            pytest.param("", "expected a name that fits", id="none"),
        ],
    )
    def test_an_item_feature_that_cannot_be_called_so(self, tmp_path, name, reason):
        path = write(tmp_path / "log.csv", "user,item,timestamp,brand\n1,2,3,4\n")
        with pytest.raises(ConfigError, match=f"item feature {name!r}: .*{reason}"):
            scan(LogSource(path=path, item_features={name: "brand"}))

    def test_an_item_feature_of_neither_integers_nor_strings(self, tmp_path):
        path = tmp_path / "log.parquet"
        columns = {"user": [1], "item": [1], "time": [1], "price": [0.5]}
        pl.DataFrame(columns).write_parquet(path)
        with pytest.raises(
            ConfigError, match=r"column 'price' of item feature price .* or strings, got Float64"
        ):
            scan(LogSource(path=path, item_features={"price": "price"}))

    def test_unknown_column_role_is_named(self, tmp_path):
        path = write(tmp_path / "log.csv", "user,item,timestamp\n1,2,3\n")
        with pytest.raises(LogError, match=r"unknown column roles \['people'\], expected some of"):
            scan(LogSource(path=path, columns={"people": "user"}))

    @pytest.mark.parametrize("name", ["log.txt", "log.csv.gz", "log"])
    def test_unknown_suffix(self, tmp_path, name):
        path = write(tmp_path / name, "user,item,timestamp\n1,2,3\n")
        with pytest.raises(LogError, match=r"expected a \.parquet, \.csv or \.dat file"):
            scan(LogSource(path=path))

    @pytest.mark.parametrize(
        "text", [pytest.param("", id="empty"), pytest.param("a,b,c\n1,2,3\n", id="other names")]
    )
    def test_csv_of_no_known_format(self, tmp_path, text):
        path = write(tmp_path / "log.csv", text)
        with pytest.raises(LogError, match=r"log\.csv: the first line has neither a user column"):
            scan(LogSource(path=path))

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param("ABCDEFGHIJKLM", id="13 letters"),
            pytest.param("B000-F83", id="a dash"),
            pytest.param("Müsli", id="an umlaut"),
            pytest.param('""', id="empty"),
        ],
    )
    def test_item_names_that_base_36_cannot_hold_are_shown(self, tmp_path, name):
        path = write(tmp_path / "books.csv", f"A1,B000F83SZQ,5.0,1\nA1,{name},5.0,1\n")
        shown = name.strip('"')
        with pytest.raises(
            LogError, match=rf"books\.csv: item '{shown}' is neither a number nor a name of at most"
        ):
            scan(LogSource(path=path))

    def test_fractional_item_ids_are_refused(self, tmp_path):
        path = tmp_path / "log.parquet"
        pl.DataFrame({"user": [1], "item": [1.5], "timestamp": [1]}).write_parquet(path)
        with pytest.raises(LogError, match="item ids must be integers or strings, got Float64"):
            scan(LogSource(path=path))

    def test_a_file_that_is_no_parquet(self, tmp_path):
        path = write(tmp_path / "log.parquet", "user,item,timestamp\n1,2,3\n")
        with pytest.raises(LogError, match=r"log\.parquet: not readable as named"):
            scan(LogSource(path=path))

    def test_a_folder_without_parquet(self, tmp_path):
        with pytest.raises(LogError, match="not readable as named"):
            scan(LogSource(path=tmp_path))
