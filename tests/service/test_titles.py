"""Titles of items, from either kind of file."""

import pytest

from service.settings import SettingsError
from service.titles import read_titles

# As JSON, and as a table that a spreadsheet writes: with a mark of its encoding and more columns.
FILES = {
    "titles.json": '{"7": "Köln, 1914", "9223372036854775807": "The last"}',
    "titles.csv": '\ufeffitem_id,genre,title\n7,War,"Köln, 1914"\n9223372036854775807,,The last\n',
}


def test_there_are_none_without_a_file():
    assert read_titles(None) == {}


@pytest.mark.parametrize("name", FILES)
def test_they_stand_under_their_item_ids(tmp_path, name):
    (tmp_path / name).write_text(FILES[name], encoding="utf-8")
    assert read_titles(tmp_path / name) == {7: "Köln, 1914", 2**63 - 1: "The last"}


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        pytest.param("t.json", "[1]", "not a JSON object", id="no object"),
        pytest.param("t.json", "{", "Expecting property name", id="no JSON"),
        pytest.param("t.json", '{"7": 8}', "the title of 7 is no string", id="no title"),
        pytest.param("t.json", '{"seven": "x"}', "invalid literal", id="no item"),
        pytest.param("t.csv", "id,title\n7,x\n", "a column is missing: item_id", id="no column"),
        pytest.param("t.csv", "item_id,title\n7\n", "line 2 is too short", id="short line"),
        pytest.param("t.csv", "", "a column is missing: item_id, title", id="empty"),
    ],
)
def test_what_is_none_is_refused_with_the_file_and_the_reason(tmp_path, name, content, reason):
    (tmp_path / name).write_text(content)
    with pytest.raises(SettingsError, match=rf"^titles: .*{name}: .*{reason}"):
        read_titles(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SettingsError, match=r"nowhere\.json: No such file"):
        read_titles(tmp_path / "nowhere.json")
