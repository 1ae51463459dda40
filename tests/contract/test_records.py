"""The behavior record, byte by byte."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contract.errors import RecordError
from contract.records import (
    MAX_ITEM,
    MAX_TIME,
    check_user_id,
    decode_records,
    encode_records,
    history_in_time_order,
    in_time_order,
    stack_records,
)

behaviors = st.lists(st.tuples(st.integers(1, MAX_ITEM), st.integers(0, MAX_TIME)), max_size=20)


def test_a_record_is_a_little_endian_int64_and_uint32():
    raw = encode_records([0x0102030405060708, 7], [0x0A0B0C0D, 0])
    assert raw == bytes.fromhex("0807060504030201 0d0c0b0a 0700000000000000 00000000")


@given(behaviors)
def test_decoding_gives_back_what_was_encoded(rows):
    raw = encode_records([item for item, _ in rows], [time for _, time in rows])
    assert raw == b"".join(struct.pack("<qI", *row) for row in rows)
    assert [tuple(record) for record in decode_records(raw).tolist()] == rows


@pytest.mark.parametrize("n_bytes", [1, 11, 13, 12_001])
def test_a_broken_length_is_refused_with_the_length(n_bytes):
    with pytest.raises(RecordError, match=f"{n_bytes} bytes is not a whole number of 12-byte"):
        decode_records(bytes(n_bytes))


@pytest.mark.parametrize("item", [0, -1, -(2**63)])
def test_an_item_below_one_is_no_record(item):
    with pytest.raises(RecordError, match=f"item id {item}, expected"):
        decode_records(struct.pack("<qI", item, 5))


@pytest.mark.parametrize(
    ("items", "times", "message"),
    [
        pytest.param([0], [1], "item 0 is outside", id="item 0 is padding"),
        pytest.param([-3], [1], "item -3 is outside", id="negative item"),
        pytest.param([1], [-1], "time -1 is outside", id="negative time"),
        pytest.param([1], [2**32], "time 4294967296 is outside", id="time past uint32"),
        pytest.param([2**63], [1], "item 9223372036854775808 is outside", id="item past int64"),
        pytest.param([1.5], [1], "items must be whole numbers", id="float item"),
        pytest.param([1], ["x"], "times must be whole numbers", id="text time"),
        pytest.param([2**70], [1], "items must be whole numbers", id="item past uint64"),
        pytest.param([1, 2], [1], "two lists of one length", id="different lengths"),
    ],
)
def test_what_is_no_behavior_is_not_encoded(items, times, message):
    with pytest.raises(RecordError, match=message):
        encode_records(items, times)


@pytest.mark.parametrize(
    ("user_id", "message"),
    [("", "got 0"), ("é" * 65, "got 130"), ("\ud800", "lone surrogate")],
    ids=["empty", "130 bytes in 65 letters", "surrogate"],
)
def test_a_user_id_has_1_to_128_bytes_of_utf8(user_id, message):
    with pytest.raises(RecordError, match=message):
        check_user_id(user_id)


def test_the_longest_user_id_is_accepted():
    assert check_user_id("é" * 64) == ("é" * 64).encode()


def test_stacking_keeps_the_newest_and_pads_on_the_left():
    stacked = stack_records(
        [encode_records([1, 2, 3], [1, 2, 3]), encode_records([9], [9]), b""], 2
    )
    assert stacked["item"].tolist() == [[2, 3], [0, 9], [0, 0]]
    assert stacked["time"].tolist() == [[2, 3], [0, 9], [0, 0]]


def test_stacking_no_histories_gives_no_rows():
    assert stack_records([], 5).shape == (0, 5)


def test_decoding_copies_nothing():
    raw = encode_records(np.arange(1, 4), np.arange(3))
    assert not decode_records(raw).flags.owndata


class TestTimeOrder:
    @given(behaviors)
    def test_records_are_sorted_by_time_and_keep_the_order_of_one_second(self, rows):
        raw = encode_records([item for item, _ in rows], [time for _, time in rows])
        ordered = sorted(rows, key=lambda row: row[1])
        assert [tuple(row) for row in decode_records(history_in_time_order(raw)).tolist()] == (
            ordered
        )

    @given(st.lists(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 3)), max_size=5)))
    def test_each_row_is_sorted_for_itself_and_padding_stays_on_the_left(self, users):
        raws = [
            encode_records([item for item, _ in rows], [time for _, time in rows]) for rows in users
        ]
        ordered = [
            encode_records([item for item, _ in rows], [time for _, time in rows])
            for rows in (sorted(rows, key=lambda row: row[1]) for rows in users)
        ]
        stacked, expected = stack_records(raws, 6), stack_records(ordered, 6)
        assert in_time_order(stacked).tolist() == expected.tolist()

    def test_what_is_in_order_is_not_copied(self):
        stacked = stack_records([encode_records([1, 2], [10, 20])], 3)
        assert in_time_order(stacked) is stacked
