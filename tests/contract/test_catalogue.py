"""Item ids to embedding rows."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.catalogue import Catalogue
from contract.errors import ContractError
from contract.records import MAX_ITEM

ids = st.sets(st.integers(1, MAX_ITEM) | st.integers(1, 300), max_size=200)


@given(ids, st.lists(st.integers(-MAX_ITEM - 1, MAX_ITEM) | st.integers(-5, 300), max_size=50))
def test_rows_equal_a_dictionary(known, asked):
    catalogue = Catalogue(np.array(sorted(known), dtype=np.int64))
    expected = {item: 2 + row for row, item in enumerate(sorted(known))}
    everything = np.array([*asked, *known], dtype=np.int64)
    found = catalogue.rows(everything)
    assert found.tolist() == [
        0 if item == 0 else expected.get(item, 1) for item in everything.tolist()
    ]
    assert catalogue.n_rows == len(known) + 2


def test_rows_keep_the_shape():
    catalogue = Catalogue(np.array([5, 7]))
    assert catalogue.rows(np.array([[5, 6], [7, 0]])).tolist() == [[2, 1], [3, 0]]


@pytest.mark.parametrize("known", [5, MAX_ITEM - 1], ids=["direct table", "hash table"])
def test_ids_outside_of_all_bounds_are_unknown(known):
    asked = np.array([-1, -5, np.iinfo(np.int64).min, 70_000, MAX_ITEM])
    assert Catalogue(np.array([known])).rows(asked).tolist() == [1] * 5


def test_close_and_scattered_ids_get_the_same_rows():
    """Both kinds of table, at the size where one gives way to the other."""
    close = np.arange(1, 20_001, dtype=np.int64)
    assert (Catalogue(close).rows(close[::-7]) == close[::-7] + 1).all()
    scattered = close * 17
    assert (Catalogue(scattered).rows(scattered[::-7]) == close[::-7] + 1).all()
    assert (Catalogue(scattered).rows(scattered - 1)[1:] == 1).all()


def test_a_catalogue_may_be_empty():
    assert Catalogue(np.array([], dtype=np.int64)).rows(np.array([0, 3])).tolist() == [0, 1]


def test_colliding_ids_are_all_found():
    """Ids that differ by multiples of the table's period crowd into few slots."""
    known = np.arange(1, 5001, dtype=np.int64) << 40
    assert (Catalogue(known).rows(known) == np.arange(2, 5002)).all()


@pytest.mark.parametrize(
    ("item_ids", "message"),
    [
        pytest.param(np.array([0, 1]), "item id 0, expected at least 1", id="padding"),
        pytest.param(np.array([2, 1]), "once, in ascending order", id="unsorted"),
        pytest.param(np.array([1, 1]), "once, in ascending order", id="repeated"),
        pytest.param(np.array([1.0]), "vector of int64, got float64", id="floats"),
        pytest.param(np.array([[1]]), "vector of int64", id="matrix"),
    ],
)
def test_what_is_no_catalogue_is_refused(item_ids, message):
    with pytest.raises(ContractError, match=message):
        Catalogue(item_ids)
