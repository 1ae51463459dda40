"""A prepared log is memory-mapped, and a damaged one is refused with its file's name."""

from collections.abc import Callable

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
