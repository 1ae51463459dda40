"""Elapsed time on a doubling scale."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.buckets import time_buckets


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
