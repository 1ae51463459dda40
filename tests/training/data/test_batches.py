"""Which rows share a batch: each row once, rows of about one length together."""

import numpy as np
import pytest

from training.data.batches import equal_length_batches, length_sorted_batches

BATCHINGS = [
    pytest.param(length_sorted_batches, id="sorted"),
    pytest.param(equal_length_batches, id="equal"),
]


def lengths_of(n: int, *, longest: int = 30) -> np.ndarray:
    return np.random.default_rng(1).integers(1, longest + 1, n)


def generator(seed: int = 2) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("batching", BATCHINGS)
class TestBoth:
    @pytest.mark.parametrize("n", [1, 3, 4, 5, 611], ids=lambda n: f"{n} rows")
    @pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
    def test_every_row_is_in_one_batch(self, batching, n, shuffled):
        """More rows than one window of batches, too."""
        batches = batching(lengths_of(n), 4, generator() if shuffled else None)
        assert np.sort(np.concatenate(batches)).tolist() == list(range(n))
        assert all(1 <= len(batch) <= 4 for batch in batches)

    def test_no_rows_make_no_batches(self, batching):
        none = np.zeros(0, dtype=np.int64)
        assert batching(none, 4, generator()) == []
        assert batching(none, 4, None) == []

    def test_the_order_depends_on_the_generator_alone(self, batching):
        def order(seed: int) -> list[int]:
            rows: list[int] = np.concatenate(batching(lengths_of(100), 4, generator(seed))).tolist()
            return rows

        assert order(1) == order(1)
        assert order(1) != order(2)

    def test_without_a_generator_rows_come_in_order_of_length(self, batching):
        lengths = lengths_of(100)
        order = np.concatenate(batching(lengths, 4, None))
        assert (np.diff(lengths[order]) >= 0).all()
        assert (np.diff(order)[np.diff(lengths[order]) == 0] > 0).all()

    def test_with_one_batches_of_all_lengths_come_mixed(self, batching):
        lengths = lengths_of(400)
        longest = [lengths[batch].max() for batch in batching(lengths, 4, generator())]
        assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4


class TestSortedByLength:
    def test_a_window_has_full_batches_and_one_that_is_left(self):
        sizes = [len(batch) for batch in length_sorted_batches(lengths_of(203), 4, generator())]
        assert sorted(sizes) == [3] + [4] * 50

    def test_rows_of_a_batch_are_neighbours_by_length(self):
        """Of 200 rows and 30 lengths, sorted within one window, a batch spans few."""
        lengths = lengths_of(200)
        spans = [np.ptp(lengths[batch]) for batch in length_sorted_batches(lengths, 4, generator())]
        assert max(spans) <= 3

    def test_rows_of_one_window_are_mixed_anew(self):
        """Other companions with another generator, even of one length."""
        lengths = np.full(40, 7)

        def companions(seed: int) -> set[frozenset[int]]:
            return {
                frozenset(b.tolist()) for b in length_sorted_batches(lengths, 4, generator(seed))
            }

        assert companions(1) != companions(2)


class TestEqualLength:
    @pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "in order"])
    def test_a_batch_holds_one_length(self, shuffled):
        lengths = lengths_of(300)
        batches = equal_length_batches(lengths, 4, generator() if shuffled else None)
        assert all(len(set(lengths[batch].tolist())) == 1 for batch in batches)

    def test_batches_of_a_length_are_full_but_one(self):
        lengths = np.repeat([3, 9, 5], [10, 4, 1])
        batches = equal_length_batches(lengths, 4, generator())
        sizes = sorted((int(lengths[batch[0]]), len(batch)) for batch in batches)
        assert sizes == [(3, 2), (3, 4), (3, 4), (5, 1), (9, 4)]
