"""A prepared log is memory-mapped, and a damaged one is refused with its file's name."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from contract.errors import HistoryLogError
from training.data.log import PreparedLog

COLUMNS = {
    "user": [1, 1, 2, 2],
    "item": [10, 20, 20, 30],
    "timestamp": [1, 2, 3, 4],
    "label": [1, 0, 1, None],
    "click_probability": [0.5, 0.25, 0.75, None],
    "category": ["a", "b", "b", "c"],
}


@pytest.fixture
def log(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    return make_log(COLUMNS)


def test_large_arrays_are_mapped_not_read(log):
    assert isinstance(log.behaviors, np.memmap)
    assert isinstance(log.impressions, np.memmap)
    assert isinstance(log.probabilities, np.memmap)


def test_arrays_belong_together(log):
    assert log.behaviors.tolist() == [(10, 1), (20, 3), (30, 4)]
    assert log.behavior_users().tolist() == [0, 1, 1]
    assert log.impressions.tolist() == [(10, 1, 1), (20, 2, 0), (20, 3, 1)]
    assert log.impression_users().tolist() == [0, 0, 1]
    assert log.probabilities.tolist() == [0.5, 0.25, 0.75]


def test_features_are_those_of_the_items(make_log):
    columns = COLUMNS | {"brand_id": [7, 5, 5, None], "author": ["z", None, None, "y"]}
    log = make_log(columns, item_features={"brand": "brand_id", "author": "author"})
    assert log.items.tolist() == [10, 20, 30]
    assert {name: rows.tolist() for name, rows in log.item_features.items()} == {
        "category": [1, 2, 3],
        "author": [2, 0, 1],
        "brand": [2, 1, 0],
    }


class TestFurtherFeatures:
    @pytest.fixture
    def path(self, make_log: Callable[..., PreparedLog]) -> Path:
        log = make_log(COLUMNS | {"brand": [1, 2, 2, 3]}, item_features={"brand": "brand"})
        return log.folder / "item_features.npy"

    def test_of_a_damaged_file_are_refused(self, path):
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(HistoryLogError, match=r"item_features\.npy is not readable"):
            PreparedLog(path.parent)

    @pytest.mark.parametrize(
        "table",
        [
            pytest.param(np.zeros(3, dtype=np.int32), id="no fields"),
            pytest.param(np.zeros(3, dtype=[("brand", "<i8")]), id="another type"),
            pytest.param(np.zeros(4, dtype=[("brand", "<i4")]), id="another log"),
        ],
    )
    def test_of_a_table_that_does_not_fit_are_refused(self, path, table):
        np.save(path, table)
        with pytest.raises(HistoryLogError, match=r"item_features\.npy holds .*expected fields"):
            PreparedLog(path.parent)


def test_a_log_without_probabilities_says_so(make_log):
    assert make_log({"user": [1], "item": [1], "timestamp": [1]}).probabilities is None


def test_a_folder_that_is_no_log(tmp_path):
    with pytest.raises(HistoryLogError, match=r"is not a prepared log: log\.json is missing"):
        PreparedLog(tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "behaviors.bin",
        "behavior_offsets.npy",
        *(
            pytest.param(name)
            for name in (
                "impressions.bin",
                "impression_offsets.npy",
                "probabilities.bin",
                "items.npy",
                "item_categories.npy",
            )
        ),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_damaged_file_is_named(log, name, damage):
    """What a broken copy of a prepared log looks like."""
    path = log.folder / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HistoryLogError, match=name):
        PreparedLog(log.folder)
