"""Embeddings of items and histories."""

import pytest
import torch

from contract.catalogue import PADDING_ROW, UNKNOWN_ROW
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


class TestFeatures:
    CATEGORIES = torch.tensor([0, 0, 2, 1, 0])
    BRANDS = torch.tensor([0, 0, 3, 0, 1])

    def encoder(self) -> ItemEncoder:
        return ItemEncoder(5, 4, [self.CATEGORIES, self.BRANDS])

    def test_are_added_to_their_items(self):
        items = self.encoder()
        of_item = items.items.weight
        category, brand = (items.get_parameter(f"features.{i}.values.weight") for i in (0, 1))
        embedded = items(torch.tensor([[2, 3], [4, 1]]))
        torch.testing.assert_close(embedded[0, 0], of_item[2] + category[2] + brand[3])
        torch.testing.assert_close(embedded[0, 1], of_item[3] + category[1])
        torch.testing.assert_close(embedded[1, 0], of_item[4] + brand[1])
        torch.testing.assert_close(items.table(), items(torch.arange(5)))

    def test_are_none_of_padding_and_the_unknown_item(self):
        items = self.encoder()
        embedded = items(torch.tensor([PADDING_ROW, UNKNOWN_ROW]))
        assert (embedded[0] == 0).all()
        assert torch.equal(embedded[1], items.items.weight[UNKNOWN_ROW])

    def test_have_tables_whose_row_0_is_not_trained(self):
        items = self.encoder()
        items(torch.arange(5)).sum().backward()
        for feature, n_values in zip(items.features, (3, 4), strict=True):
            gradient = feature.get_parameter("values.weight").grad
            assert gradient is not None
            assert (feature.get_parameter("values.weight")[0] == 0).all()
            assert gradient.shape == (n_values, 4)
            assert (gradient[0] == 0).all()
            assert (gradient[1] != 0).all()

    def test_without_a_value_anywhere_change_nothing(self):
        items = ItemEncoder(5, 4, [torch.zeros(5, dtype=torch.int64)])
        assert torch.equal(items(torch.arange(5)), items.items.weight)

    def test_must_fit_the_catalogue(self):
        with pytest.raises(ValueError, match=r"one entry for each of 5 rows, got shape \(4,\)"):
            ItemEncoder(5, 4, [self.BRANDS, torch.zeros(4, dtype=torch.int64)])

    @pytest.mark.parametrize("row", [PADDING_ROW, UNKNOWN_ROW])
    def test_must_be_none_where_there_is_no_item(self, row):
        brands = self.BRANDS.clone()
        brands[row] = 2
        with pytest.raises(ValueError, match="must be 0 for padding and the unknown item, got"):
            ItemEncoder(5, 4, [brands])


def test_every_granularity_has_a_table_of_its_own():
    encoder = HistoryEncoder(FeatureSpec(), 4)
    assert [table.num_embeddings for table in encoder.buckets] == [22, 17]


def test_times_and_positions_start_small_beside_items():
    """What behaviors of one age share must not drown what they are."""
    torch.manual_seed(0)
    items, encoder = ItemEncoder(1000, 32), HistoryEncoder(SPEC, 32)
    shared = [encoder.positions, *encoder.buckets]
    largest = max(table.weight.norm(dim=1).max().item() for table in shared)
    assert items.items.weight[2:].norm(dim=1).min().item() > 2 * largest
