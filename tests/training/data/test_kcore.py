"""The k-core, against a loop that a reader can check and against every possible answer."""

from collections import Counter
from itertools import product

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.data.kcore import k_core

Rows = list[tuple[int, int]]


def frame(rows: Rows) -> pl.LazyFrame:
    schema = {"user": pl.Int64, "item": pl.Int64}
    return pl.LazyFrame(rows, schema=schema, orient="row").with_row_index("row")


def kept_rows(rows: Rows, k: int) -> list[int]:
    return sorted(k_core(frame(rows), k).collect()["row"].to_list())


def is_core(rows: Rows, k: int) -> bool:
    users, items = Counter(user for user, _ in rows), Counter(item for _, item in rows)
    return all(count >= k for count in [*users.values(), *items.values()])


def naive_core(rows: Rows, k: int) -> list[int]:
    """Drop one row of a too rare user or item at a time, until none is left."""
    kept = dict(enumerate(rows))
    while True:
        users = Counter(user for user, _ in kept.values())
        items = Counter(item for _, item in kept.values())
        bad = next((n for n, (u, i) in kept.items() if users[u] < k or items[i] < k), None)
        if bad is None:
            return sorted(kept)
        del kept[bad]


@settings(deadline=None, max_examples=50)
@given(
    rows=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=45),
    k=st.integers(1, 4),
)
def test_equals_dropping_one_row_at_a_time(rows, k):
    kept = kept_rows(rows, k)
    assert kept == naive_core(rows, k)
    assert is_core([rows[n] for n in kept], k)


@settings(deadline=None, max_examples=30)
@given(
    rows=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=14),
    k=st.integers(2, 3),
)
def test_no_other_choice_of_users_and_items_keeps_more(rows, k):
    """Of all sets of users and items whose rows form a core, none has a row that was dropped."""
    kept = set(kept_rows(rows, k))
    for users, items in product(range(16), repeat=2):
        chosen = [n for n, (u, i) in enumerate(rows) if users >> u & 1 and items >> i & 1]
        if is_core([rows[n] for n in chosen], k):
            assert kept >= set(chosen)


def test_dropping_cascades_from_items_to_users_and_back():
    """Item 9 has one row, without it user 3 has one, without that one item 8 has one, ..."""
    core = [(1, 5), (1, 6), (2, 5), (2, 6)]
    chain = [(3, 9), (3, 8), (4, 8), (4, 7)]
    assert kept_rows([*chain, *core], 2) == [4, 5, 6, 7]


def test_rows_count_also_where_one_user_repeats_one_item():
    assert kept_rows([(1, 5), (1, 5), (2, 6)], 2) == [0, 1]


@pytest.mark.parametrize("k", [0, 1])
def test_small_k_keeps_the_log_as_it_is(k):
    assert kept_rows([(1, 5), (2, 6)], k) == [0, 1]


def test_a_core_may_be_empty():
    assert kept_rows([(1, 5), (2, 6)], 2) == []


def test_other_columns_and_string_users_pass_through():
    log = pl.LazyFrame({"user": ["a", "a", "b"], "item": [1, 1, 2], "label": [1, None, 0]})
    kept = k_core(log, 2).collect().sort("label")
    assert kept.to_dict(as_series=False) == {
        "user": ["a", "a"],
        "item": [1, 1],
        "label": [None, 1],
    }
