"""What a next-item run takes of a log: the catalogue of its training part, counts, loaders."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW
from training.config import RunConfig, parse_config
from training.data.log import PreparedLog
from training.data.next_item_data import open_next_item_data
from training.data.splits import Part
from training.errors import ConfigError

# The last two behaviors of each user are held out: of user 1 items 40 and 50, of user 2 items 10
# and 60. User 3 has nothing to hold out.
COLUMNS = {
    "user": [1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3],
    "item": [10, 20, 10, 40, 50, 20, 30, 10, 60, 10, 40],
    "timestamp": [1, 2, 3, 4, 5, 1, 2, 3, 4, 1, 2],
}


@pytest.fixture(scope="module")
def log(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    return make_log(COLUMNS)


def run(*, data: dict[str, Any] | None = None, **next_item: Any) -> RunConfig:
    return parse_config(
        {
            "name": "run",
            "features": {"history_length": 3},
            "data": {"split": "leave-one-out", "unknown_rate": 0, **(data or {})},
            "next_item": next_item,
            "model": {"name": "sasrec"},
            "train": {"batch_size": 2},
        },
        "test",
    )


def test_the_catalogue_holds_what_is_chosen_in_training(log):
    """Items 50 and 60 are chosen in a test only."""
    data = open_next_item_data(log, run())
    assert data.catalogue.item_ids.tolist() == [10, 20, 30, 40]


def test_training_counts_and_popularity_over_all_parts(log):
    data = open_next_item_data(log, run())
    assert data.item_counts.tolist() == [0, 0, 3, 2, 1, 1]
    # Items 10 and 40 once more, held out; nothing is popular that is no item.
    assert data.popularity.tolist() == [0, 0, 4, 2, 1, 2]


def test_rare_items_are_unknown(log):
    data = open_next_item_data(log, run(data={"min_item_count": 2}))
    assert data.catalogue.item_ids.tolist() == [10, 20]
    assert data.item_counts.tolist() == [0, 2, 3, 2]
    assert data.popularity[:FIRST_ROW].tolist() == [0, 0]


def test_each_users_last_behaviors_are_held_out(log):
    data = open_next_item_data(log, run())
    row_of_10, row_of_40 = 2, 5
    valid, test = data.held_out[Part.VALID], data.held_out[Part.TEST]
    assert set(data.held_out) == {Part.VALID, Part.TEST}
    assert valid.targets.tolist() == [row_of_40, row_of_10]
    assert test.targets.tolist() == [UNKNOWN_ROW, UNKNOWN_ROW]
    assert test.past_rows(0).tolist() == [2, 3, 2, 5]


@pytest.mark.parametrize("part", [Part.VALID, Part.TEST], ids=["valid", "test"])
def test_held_out_histories_hide_nothing(log, part):
    """Items are shown as unknown in training only."""
    data = open_next_item_data(log, run(data={"unknown_rate": 0.9}))
    for _, batch in data.held_out[part].batches():
        assert UNKNOWN_ROW not in batch.history_items


class TestTrainingLoader:
    def rows(self, log, *, whole_rows: bool, **settings: Any) -> list[tuple[list[int], int]]:
        """Return the row read and how many targets it has, of the first epoch."""
        data = open_next_item_data(log, run(**settings))
        loader = data.training_loader(whole_rows=whole_rows)
        return sorted(
            (items[items != PADDING_ROW].tolist(), int((targets != 0).sum()))
            for batch in loader.epoch(0)
            for items, targets in zip(batch.history_items, batch.targets, strict=True)
        )

    def test_whole_rows_have_a_target_at_every_position(self, log):
        assert self.rows(log, whole_rows=True) == [([2], 1), ([2, 3], 2), ([3], 1)]

    def test_prefixes_have_one(self, log):
        rows = self.rows(log, whole_rows=False, prefixes_per_user=0)
        assert rows == [([2], 1), ([2], 1), ([2, 3], 1), ([3], 1)]

    def test_of_prefixes_so_many_a_user_are_drawn(self, log):
        assert len(self.rows(log, whole_rows=False, prefixes_per_user=1)) == 3

    def test_longer_histories_come_whole_where_the_run_says_so(self, make_log):
        n = 12
        log = make_log({"user": [1] * n, "item": list(range(1, n + 1)), "timestamp": range(n)})
        assert sum(n for _, n in self.rows(log, whole_rows=True, rows="newest")) == 3
        assert sum(n for _, n in self.rows(log, whole_rows=True, rows="all")) == n - 2 - 1

    def test_of_one_length_where_the_run_says_so(self, log):
        data = open_next_item_data(log, run(same_length=True))
        batches = list(data.training_loader(whole_rows=True).epoch(0))
        assert len(batches) == 2
        assert all((batch.history_items != PADDING_ROW).all() for batch in batches)

    def test_items_are_shown_as_unknown_as_often_as_the_run_says(self, log):
        data = open_next_item_data(log, run(data={"unknown_rate": 0.5}))
        loader = data.training_loader(whole_rows=True)
        items = np.concatenate(
            [batch.history_items.ravel() for epoch in range(300) for batch in loader.epoch(epoch)]
        )
        share = (items == UNKNOWN_ROW).sum() / (items != PADDING_ROW).sum()
        assert share == pytest.approx(0.5, abs=0.06)


def test_features_stand_beside_the_items(make_log):
    log = make_log({**COLUMNS, "category": ["b", "a", "b"] + ["c"] * 8})
    data = open_next_item_data(log, run())
    # Named by rank: a, b, c. Item 10 is of b, 20 of a, 30 and 40 of c.
    assert data.features_of_row["category"].tolist() == [0, 0, 2, 1, 3, 3]


def test_without_features_there_are_none(log):
    assert open_next_item_data(log, run()).features_of_row == {}


def test_a_split_by_time_is_refused(log):
    with pytest.raises(ConfigError, match=r"data\.split: .*split = 'leave-one-out', got 'time'"):
        open_next_item_data(log, run(data={"split": "time"}))
