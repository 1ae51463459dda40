"""Embeddings of items and histories."""

import pytest
import torch

from contract.features import FeatureSpec
from tests.training.models.inputs import SPEC, inputs
from training.models.encoder import HistoryEncoder, ItemEncoder


def test_a_behavior_is_the_sum_of_item_buckets_and_position():
    items, encoder = ItemEncoder(20, 4), HistoryEncoder(SPEC, 4)
    rows, buckets, _ = inputs([12])
    encoded = encoder(items, rows, buckets)
    expected = (
        items.items.weight[rows[0, 10]]
        + encoder.positions.weight[10]
        + encoder.buckets[0](buckets[0, 10, 0])
        + encoder.buckets[1](buckets[0, 10, 1])
    )
    torch.testing.assert_close(encoded[0, 10], expected)


def test_a_behavior_keeps_its_position_in_a_shorter_row():
    items, encoder = ItemEncoder(20, 4), HistoryEncoder(SPEC, 4)
    rows, buckets, _ = inputs([12])
    torch.testing.assert_close(
        encoder(items, rows[:, 7:], buckets[:, 7:]), encoder(items, rows, buckets)[:, 7:]
    )


def test_padding_is_exactly_zero():
    items, encoder = ItemEncoder(20, 4), HistoryEncoder(SPEC, 4)
    rows, buckets, _ = inputs([5, 0])
    encoded = encoder(items, rows, buckets)
    assert (encoded[0, :7] == 0).all()
    assert (encoded[0, 7:] != 0).all()
    assert (encoded[1] == 0).all()


def test_a_category_is_added_to_its_items():
    categories = torch.tensor([0, 0, 2, 1, 0])
    items = ItemEncoder(5, 4, categories)
    assert items.categories is not None
    embedded = items(torch.tensor([2, 3, 4]))
    torch.testing.assert_close(embedded[0], items.items.weight[2] + items.categories.weight[2])
    torch.testing.assert_close(embedded[1], items.items.weight[3] + items.categories.weight[1])
    torch.testing.assert_close(embedded[2], items.items.weight[4])


def test_categories_must_fit_the_catalogue():
    with pytest.raises(ValueError, match=r"one entry for each of 5 rows, got shape \(4,\)"):
        ItemEncoder(5, 4, torch.zeros(4, dtype=torch.int64))


def test_every_granularity_has_a_table_of_its_own():
    encoder = HistoryEncoder(FeatureSpec(), 4)
    assert [table.num_embeddings for table in encoder.buckets] == [22, 17]
