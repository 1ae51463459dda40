"""The few shapes that batches are padded to."""

from itertools import pairwise

import pytest

from service.shapes import Shape, ShapeGrid, shape_grid

GRID = ShapeGrid(batches=(1, 2, 4), candidates=(10, 50), lengths=(3, 8))


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        pytest.param((1, 1, 1), (1, 10, 3), id="smallest"),
        pytest.param((2, 10, 3), (2, 10, 3), id="already of the grid"),
        pytest.param((3, 11, 4), (4, 50, 8), id="one more on each axis"),
        pytest.param((5, 9, 2), (5, 10, 3), id="more requests than the grid has"),
        pytest.param((4, 51, 3), (4, 51, 3), id="more candidates"),
        pytest.param((1, 50, 9), (1, 50, 9), id="longer histories"),
        pytest.param((7, 90, 90), (7, 90, 90), id="larger on every axis"),
    ],
)
def test_each_axis_is_rounded_up_and_stays_as_it_is_beyond_the_grid(sizes, shape):
    assert GRID.round_up(*sizes) == Shape(*shape)


def test_an_axis_without_sizes_is_never_rounded():
    free = ShapeGrid(batches=(), candidates=(10,), lengths=())
    assert free.round_up(3, 3, 7) == Shape(3, 10, 7)


def test_work_is_pairs_of_candidate_and_behavior():
    assert Shape(2, 30, 400).work == 24_000


class TestShapes:
    def test_they_come_largest_first_on_every_axis(self):
        """What is captured first can be no larger than what there is memory for."""
        assert list(GRID.shapes(10_000)) == [
            Shape(batch, candidates, length)
            for batch in (4, 2, 1)
            for candidates in (50, 10)
            for length in (8, 3)
        ]

    def test_none_has_more_work_than_the_limit(self):
        assert list(GRID.shapes(120)) == [
            *(Shape(4, 10, 3), Shape(2, 10, 3)),
            *(Shape(1, 50, 8), Shape(1, 50, 3), Shape(1, 10, 8), Shape(1, 10, 3)),
        ]

    def test_one_request_is_always_among_them(self):
        """However large it is, it will be run."""
        assert [shape.batch for shape in GRID.shapes(1)] == [1, 1, 1, 1]


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
class TestDeviceGrids:
    @pytest.mark.parametrize("history_length", [1, 8, 50, 1000])
    def test_each_axis_ascends_and_a_full_history_is_the_longest(self, provider, history_length):
        grid = shape_grid(provider, history_length)
        for sizes in (grid.batches, grid.candidates, grid.lengths):
            assert sizes[0] >= 1
            assert all(smaller < larger for smaller, larger in pairwise(sizes))
        assert grid.lengths[-1] == history_length

    def test_it_holds_all_that_a_request_may_ask(self, provider):
        assert shape_grid(provider, 1000).round_up(1, 1000, 1000) == Shape(1, 1000, 1000)

    def test_a_shape_of_the_grid_stays_as_it_is(self, provider):
        grid = shape_grid(provider, 1000)
        assert all(grid.round_up(*shape) == shape for shape in grid.shapes(100_000))


def test_a_single_request_without_history_is_not_padded_on_a_cpu():
    assert shape_grid("cpu", 8).round_up(1, 1, 1) == Shape(1, 1, 1)


@pytest.mark.parametrize("axis", ["batches", "candidates"])
def test_at_most_a_third_is_padding_on_a_cpu(axis):
    """A batch that needs one more than a size is padded to the next size."""
    sizes = [size for size in getattr(shape_grid("cpu", 1000), axis) if size >= 4]
    for smaller, larger in pairwise(sizes):
        assert (larger - (smaller + 1)) / larger <= 1 / 3, (smaller, larger)


def test_at_most_a_third_of_a_history_is_padding_on_a_cpu_from_a_tenth_of_its_length_on():
    lengths = [length for length in shape_grid("cpu", 1000).lengths if length >= 100]
    for shorter, longer in pairwise(lengths):
        assert (longer - (shorter + 1)) / longer <= 1 / 3, (shorter, longer)
