"""The behavior record: 12 bytes, little-endian, `item: int64, time: uint32` (unix seconds).

A history is the concatenation of its records, oldest first, but for those that were reported late:
they were appended when they came, and `in_time_order` puts them where they belong. That is the
Redis value itself, so reading the newest L behaviors is one `GETRANGE key -12*L -1` and appending
one is one `APPEND`.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from contract.errors import RecordError

RECORD = np.dtype([("item", "<i8"), ("time", "<u4")])
RECORD_BYTES = RECORD.itemsize
PADDING_ITEM = 0
MIN_ITEM = 1
MAX_ITEM = 2**63 - 1
MIN_TIME = 0
MAX_TIME = 2**32 - 1
MAX_USER_ID_BYTES = 128


def encode_records(items: ArrayLike, times: ArrayLike) -> bytes:
    """Return the records of the behaviors (items[i], times[i]), in the order given.

    Raises RecordError when the lengths differ, or when an item or a time is not a whole number
    within its range.
    """
    items_N, times_N = np.asarray(items), np.asarray(times)
    if items_N.shape != times_N.shape or items_N.ndim != 1:
        raise RecordError(
            f"items and times must be two lists of one length, got shapes {items_N.shape} "
            f"and {times_N.shape}"
        )
    if not items_N.size:
        return b""
    _check_range("item", items_N, MIN_ITEM, MAX_ITEM)
    _check_range("time", times_N, MIN_TIME, MAX_TIME)
    records_N = np.empty(items_N.shape, dtype=RECORD)
    records_N["item"] = items_N
    records_N["time"] = times_N
    return records_N.tobytes()


def decode_records(raw: bytes | memoryview) -> NDArray[np.void]:
    """Return the records in `raw` as a read-only structured array [N] of dtype `RECORD`.

    Raises RecordError when the length is no multiple of 12 or an item id is below 1.
    """
    check_length(len(raw))
    records_N = np.frombuffer(raw, dtype=RECORD)
    if records_N.size and records_N["item"].min() < MIN_ITEM:
        raise RecordError(
            f"a history holds item id {records_N['item'].min()}, "
            f"expected ids in {MIN_ITEM} .. {MAX_ITEM}"
        )
    return records_N


def check_length(length_bytes: int) -> None:
    """Raise RecordError unless a value of `length_bytes` bytes can be a history."""
    if length_bytes % RECORD_BYTES:
        raise RecordError(
            f"a history of {length_bytes} bytes is not a whole number of "
            f"{RECORD_BYTES}-byte records"
        )


def check_user_id(user_id: str) -> bytes:
    """Return the user id as UTF-8, or raise RecordError unless it has 1 .. 128 bytes."""
    try:
        encoded = user_id.encode()
    except UnicodeEncodeError as error:
        raise RecordError("a user id must be valid Unicode text, got a lone surrogate") from error
    if not 1 <= len(encoded) <= MAX_USER_ID_BYTES:
        raise RecordError(
            f"a user id must have 1 .. {MAX_USER_ID_BYTES} bytes of UTF-8, got {len(encoded)}"
        )
    return encoded


def in_time_order(records_BN: NDArray[np.void]) -> NDArray[np.void]:
    """Return the records [B, N] with each row by time; of one second, those stored first come
    first, padding before all.

    A behavior that is reported late is appended last. Rows that are in order, as most are, cost a
    look.
    """
    times_BN = records_BN["time"]
    late_B = (times_BN[:, 1:] < times_BN[:, :-1]).any(axis=1)
    if not late_B.any():
        return records_BN
    ordered_BN = records_BN.copy()
    for b in np.flatnonzero(late_B):
        ordered_BN[b] = records_BN[b, np.argsort(times_BN[b], kind="stable")]
    return ordered_BN


def history_in_time_order(raw: bytes) -> bytes:
    """Return a history with its records by time. Its length must be a whole number of records."""
    return in_time_order(np.frombuffer(raw, dtype=RECORD)[None]).tobytes()


def stack_records(histories: Sequence[bytes], length: int) -> NDArray[np.void]:
    """Return the newest `length` records of each history, right-aligned, as `RECORD` [B, length].

    Shorter histories are padded on the left with zero records. Lengths must be whole numbers of
    records (`check_length`); item ids are not looked at (`encoding.encode` reports them).
    """
    width = length * RECORD_BYTES
    rows = [raw[-width:].rjust(width, b"\0") for raw in histories] if width else []
    return np.frombuffer(b"".join(rows), dtype=RECORD).reshape(len(histories), length)


def _check_range(name: str, values_N: NDArray[np.generic], low: int, high: int) -> None:
    if values_N.dtype.kind not in "iu":
        # numpy turns a list that mixes huge and small integers into float64 or object.
        raise RecordError(
            f"{name}s must be whole numbers in {low} .. {high}, got an array of {values_N.dtype}"
        )
    smallest, largest = int(values_N.min()), int(values_N.max())
    if smallest < low or largest > high:
        worst = smallest if smallest < low else largest
        raise RecordError(f"{name} {worst} is outside {low} .. {high}")
