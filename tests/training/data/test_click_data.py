"""What a run sees of a log: the catalogue of its training part, and a loader for each part."""

from collections.abc import Callable

import numpy as np
import pytest

from contract.catalogue import UNKNOWN_ROW
from training.config import RunConfig, parse_config
from training.data.click_data import open_click_data
from training.data.log import PreparedLog
from training.data.splits import Part
from training.errors import ConfigError, TrainingError


def config(batch_size=4, **data) -> RunConfig:
    raw = {
        "name": "test",
        "model": {"name": "popularity"},
        "train": {"batch_size": batch_size},
        "data": {"test_fraction": 0.25, "valid_fraction": 1 / 3, **data},
    }
    return parse_config(raw, "test")


@pytest.fixture(scope="module")
def shown(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    """Eight impressions: four of training (seconds 0 to 3), two of validation, two of test.

    Item 7 is only in the validation part, item 8 only in the test part.
    """
    return make_log(
        {
            "user": [1, 2, 1, 2, 1, 2, 1, 2],
            "item": [5, 6, 5, 9, 7, 5, 8, 6],
            "timestamp": list(range(8)),
            "label": [1, 0, 1, 0, 1, 1, 1, 0],
            "category": ["b", "a", "b", None, "c", "b", "d", "a"],
            "brand_id": [15, 63, 15, 4, None, 15, 3, 63],
        },
        item_features={"brand": "brand_id"},
    )


@pytest.fixture(scope="module")
def chosen(make_log: Callable[..., PreparedLog]) -> PreparedLog:
    """Eight behaviors without labels."""
    return make_log(
        {
            "user": [1, 2, 1, 2, 1, 2, 1, 2],
            "item": [5, 6, 5, 9, 7, 5, 8, 6],
            "timestamp": list(range(8)),
        }
    )


class TestCatalogue:
    @pytest.mark.parametrize("log", ["shown", "chosen"])
    def test_holds_the_items_of_the_training_part_alone(self, request, log):
        data = open_click_data(request.getfixturevalue(log), config())
        assert data.catalogue.item_ids.tolist() == [5, 6, 9]

    def test_items_of_the_test_part_only_are_the_unknown_item(self, shown):
        data = open_click_data(shown, config())
        (test,) = data.loaders[Part.TEST].epoch(0, shuffle=False)
        rows = sorted(test.inputs.candidate_items.ravel().tolist())
        assert rows == [1, 3]  # item 8 is unknown, item 6 has the second row
        (valid,) = data.loaders[Part.VALID].epoch(0, shuffle=False)
        assert sorted(valid.inputs.candidate_items.ravel().tolist()) == [1, 2]

    @pytest.mark.parametrize(
        ("min_item_count", "items"),
        [
            pytest.param(1, [5, 6, 9], id="once"),
            pytest.param(2, [5], id="twice"),
        ],
    )
    def test_rare_items_are_unknown(self, chosen, min_item_count, items):
        data = open_click_data(chosen, config(min_item_count=min_item_count))
        assert data.catalogue.item_ids.tolist() == items

    @pytest.mark.parametrize(
        ("min_item_count", "items"),
        [
            pytest.param(1, [5, 6, 9], id="once"),
            pytest.param(2, [5, 9], id="twice"),
            pytest.param(3, [], id="three times"),
        ],
    )
    def test_in_a_labelled_log_being_shown_and_being_chosen_both_count(
        self, make_log, min_item_count, items
    ):
        """In training, item 5 was shown twice, item 6 once; item 9 was shown once and chosen."""
        log = make_log(
            {
                "user": [1, 2, 1, 2, 1, 2, 1, 2],
                "item": [5, 6, 5, 9, 7, 5, 8, 6],
                "timestamp": list(range(8)),
                "label": [0, 0, 0, 1, 1, 1, 1, 0],
            }
        )
        data = open_click_data(log, config(min_item_count=min_item_count))
        assert data.catalogue.item_ids.tolist() == items

    def test_counts_are_choices_of_the_training_part(self, shown):
        """Padding and the unknown item have their rows, 0 and 1; item 9 was shown, not chosen."""
        data = open_click_data(shown, config())
        assert data.item_counts.tolist() == [0, 0, 2, 0, 0]

    def test_features_have_the_row_of_their_item(self, shown):
        features = open_click_data(shown, config()).features_of_row
        assert {name: rows.tolist() for name, rows in features.items()} == {
            "category": [0, 0, 2, 1, 0],
            "brand": [0, 0, 1, 4, 3],  # of "15", "3", "4" and "63"
        }

    def test_a_log_without_features_has_no_rows_of_them(self, chosen):
        assert open_click_data(chosen, config()).features_of_row == {}


class TestSamples:
    def test_auto_takes_the_impressions_of_a_labelled_log(self, shown):
        loaders = open_click_data(shown, config()).loaders
        assert [loaders[part].n_samples for part in Part] == [4, 2, 2]
        (train,) = loaders[Part.TRAIN].epoch(0, shuffle=False)
        assert sorted(train.labels[train.mask].tolist()) == [0, 0, 1, 1]

    def test_auto_draws_negatives_for_a_log_without_labels(self, chosen):
        loaders = open_click_data(chosen, config(n_negatives=3)).loaders
        assert [loaders[part].n_samples for part in Part] == [16, 8, 8]
        (test,) = loaders[Part.TEST].epoch(0, shuffle=False)
        assert test.labels.tolist() == [[1, 0, 0, 0], [1, 0, 0, 0]]
        drawn = test.inputs.candidate_items[:, 1:]
        assert set(drawn[test.mask[:, 1:]].tolist()) <= {2, 3, 4}

    def test_negatives_may_be_asked_for_where_labels_exist(self, shown):
        """The positives of each part, by the moments that part the impressions."""
        loaders = open_click_data(shown, config(samples="negatives")).loaders
        assert [loaders[part].n_samples for part in Part] == [2 * 2, 2 * 2, 2 * 1]

    def test_popular_negatives_follow_the_training_counts(self, make_log):
        """Item 1 is chosen 60 times and item 2 twenty times in training, by others."""
        log = make_log(
            {
                "user": [1] * 80 + [2] * 20 + [3] * 400,
                "item": [1] * 60 + [2] * 20 + [3] * 20 + [4] * 400,
                "timestamp": [*range(80), *range(80, 100), *range(100, 500)],
            }
        )
        log_config = config(
            negative_sampling="popularity",
            samples="negatives",
            n_negatives=20,
            batch_size=512,
            test_fraction=0.5,
            valid_fraction=0.5,
        )
        batches = open_click_data(log, log_config).loaders[Part.TEST].epoch(0, shuffle=False)
        drawn = np.concatenate([batch.inputs.candidate_items[:, 1:].ravel() for batch in batches])
        found = [(drawn == row).mean() for row in (2, 3, 4)]
        np.testing.assert_allclose(found, [0.6, 0.2, 0.2], atol=0.03)

    def test_leave_one_out_tests_the_last_behavior_of_each_user(self, chosen):
        loaders = open_click_data(chosen, config(split="leave-one-out", batch_size=8)).loaders
        (test,) = loaders[Part.TEST].epoch(0, shuffle=False)
        assert sorted(test.users.tolist()) == [0, 1]
        assert (test.inputs.history_items != 0).sum(axis=1).tolist() == [3, 3]

    def test_only_training_hides_items_as_unknown(self, chosen):
        """Sampled negatives are known items: where one is unknown, it was hidden."""
        data = open_click_data(chosen, config(split="leave-one-out", unknown_rate=0.99))
        for part in Part:
            (batch,) = data.loaders[part].epoch(0, shuffle=False)
            drawn = batch.inputs.candidate_items[:, 1:][batch.mask[:, 1:]]
            assert drawn.size
            assert (drawn == UNKNOWN_ROW).any() == (part == Part.TRAIN)

    def test_seed_and_batch_size_of_the_run_reach_the_loaders(self, chosen):
        data = open_click_data(chosen, config(batch_size=3))
        assert data.loaders[Part.TRAIN].n_batches == 2
        assert data.loaders[Part.TEST].n_batches == 1


class TestErrors:
    def test_impressions_need_labels(self, chosen):
        with pytest.raises(
            ConfigError, match=r"data\.samples: the log has no labels; use samples = 'negatives'"
        ):
            open_click_data(chosen, config(samples="impressions"))

    @pytest.mark.parametrize("samples", ["auto", "impressions"])
    def test_leave_one_out_splits_no_impressions(self, shown, samples):
        with pytest.raises(ConfigError, match=r"data\.split: leave-one-out splits behaviors"):
            open_click_data(shown, config(split="leave-one-out", samples=samples))

    def test_negatives_need_a_catalogue(self, chosen):
        with pytest.raises(TrainingError, match="cannot be drawn from an empty catalogue"):
            open_click_data(chosen, config(min_item_count=100))

    def test_a_log_whose_labels_are_all_null_is_one_without_labels(self, make_log):
        log = make_log(
            {
                "user": [1] * 8,
                "item": list(range(1, 9)),
                "timestamp": list(range(8)),
                "label": [None] * 8,
            }
        )
        loaders = open_click_data(log, config()).loaders
        assert [loaders[part].n_samples for part in Part] == [8, 4, 4]
