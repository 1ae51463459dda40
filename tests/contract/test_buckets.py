"""Elapsed time on a doubling scale."""

import doctest

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract import buckets
from contract.buckets import elapsed_units, time_buckets


@pytest.mark.parametrize(
    ("elapsed_s", "bucket"),
    [(0, 0), (1, 1), (2, 2), (3, 2), (4, 3), (7, 3), (8, 4), (2**20 - 1, 20), (2**20, 21), (-9, 0)],
)
def test_the_seeds_own_table(elapsed_s, bucket):
    assert time_buckets(np.array([elapsed_s]), 1, 64).tolist() == [bucket]


@given(st.integers(-(2**40), 2**52), st.integers(1, 10**6))
def test_a_bucket_is_the_bit_length_of_whole_units(elapsed_s, unit_s):
    expected = (max(elapsed_s, 0) // unit_s).bit_length()
    assert time_buckets(np.array([elapsed_s]), unit_s, 64).tolist() == [expected]


def test_buckets_past_the_table_are_its_last_row():
    assert time_buckets(np.array([[10**9]]), 1, 5).tolist() == [[4]]


def test_the_callers_array_is_left_alone():
    elapsed_s = np.array([-1, 5])
    time_buckets(elapsed_s, 1, 8)
    assert elapsed_s.tolist() == [-1, 5]


@given(st.integers(-(2**40), 2**40), st.integers(1, 10**6), st.integers(1, 2**32))
def test_units_are_whole_and_within_their_number(elapsed_s, unit_s, n_units):
    expected = min(max(elapsed_s, 0) // unit_s, n_units - 1)
    assert elapsed_units(np.array([elapsed_s]), unit_s, n_units).tolist() == [expected]


@pytest.mark.parametrize(
    ("elapsed_s", "units"),
    [
        pytest.param(2**32 - 1, 2**32 - 1, id="the longest time there is"),
        pytest.param(2**33, 2**32 - 1, id="longer"),
        pytest.param(2**24 + 1, 2**24 + 1, id="what float32 cannot tell"),
        pytest.param(-1, 0, id="clock skew"),
    ],
)
def test_seconds_are_told_exactly(elapsed_s, units):
    found = elapsed_units(np.array([[elapsed_s]]), 1, 2**32)
    assert found.dtype == np.int64
    assert found.tolist() == [[units]]


def test_the_array_of_elapsed_units_is_another():
    elapsed_s = np.array([-1, 5])
    elapsed_units(elapsed_s, 1, 3)
    assert elapsed_s.tolist() == [-1, 5]


def test_the_examples_of_the_docstrings():
    result = doctest.testmod(buckets)
    assert result.attempted > 0
    assert result.failed == 0
