"""The contract's codec: records, ids, buckets, catalogues, the encoding, golden rows, logs.

The first byte of an input says which of them is asked, the rest is theirs.
"""

import io
import zipfile
from collections.abc import Callable

import numpy as np

from contract import history_log
from contract.buckets import elapsed_units, time_buckets
from contract.catalogue import FIRST_ROW, PADDING_ROW, UNKNOWN_ROW, Catalogue
from contract.encoding import encode
from contract.errors import BundleError, ContractError, HistoryLogError, RecordError
from contract.features import AGE_SECONDS, DAYS, HOURS, FeatureSpec
from contract.golden import GoldenRows
from contract.history_log import HistoryLog
from contract.records import (
    MAX_USER_ID_BYTES,
    MIN_ITEM,
    RECORD,
    RECORD_BYTES,
    check_user_id,
    decode_records,
    encode_records,
    stack_records,
)
from tests.fuzz.pieces import Pieces, joined, scratch_folder

_FOLDER = scratch_folder()
_KNOWN = Catalogue(np.array([1, 2, 3, 10**6, 2**62, 2**63 - 1], dtype=np.int64))
_SPECS = [
    FeatureSpec(history_length=4),
    FeatureSpec(history_length=7, granularities=(DAYS,)),
    FeatureSpec(history_length=3, granularities=(HOURS, AGE_SECONDS)),
]
_ARRAYS = ("records", "lengths_bytes", "ranking_times", "candidates", "scores")
_LOG_FILES = (
    history_log.HEADER,
    history_log.BEHAVIORS,
    history_log.BEHAVIOR_OFFSETS,
    history_log.USER_IDS,
    history_log.USER_ID_OFFSETS,
)


def _decoded_records(given: Pieces) -> None:
    raw = given.rest()
    try:
        records_N = decode_records(raw)
    except RecordError:
        assert len(raw) % RECORD_BYTES or np.frombuffer(raw, RECORD)["item"].min() < MIN_ITEM
        return
    assert len(records_N) == len(raw) // RECORD_BYTES
    assert encode_records(records_N["item"], records_N["time"]) == raw


def _encoded_records(given: Pieces) -> None:
    n, items_first = given.byte() % 8, given.byte() % 2
    items_N, times_N = given.int64s(n), given.int64s(n)
    if items_first:  # as JSON gives them
        items, times = items_N.view(np.uint64).tolist(), times_N.tolist()
    else:
        items, times = items_N.tolist(), times_N.view(np.uint64).tolist()
    try:
        raw = encode_records(items, times)
    except RecordError:
        allowed = all(0 < one < 2**63 for one in items) and all(0 <= one < 2**32 for one in times)
        assert not allowed
        return
    found_N = decode_records(raw)
    assert found_N["item"].tolist() == items
    assert found_N["time"].tolist() == times


def _user_ids(given: Pieces) -> None:
    user_id = given.rest().decode("utf-8", errors="surrogateescape")
    try:
        encoded = check_user_id(user_id)
    except RecordError:
        return
    assert 1 <= len(encoded) <= MAX_USER_ID_BYTES
    assert encoded.decode() == user_id


def _buckets(given: Pieces) -> None:
    unit_s, n_buckets = 1 + int.from_bytes(given.take(3), "little"), 1 + given.byte() % 64
    elapsed_s = given.int64s(4)
    buckets = time_buckets(elapsed_s, unit_s, n_buckets)
    units = elapsed_units(elapsed_s, unit_s, n_buckets)
    for one_s, bucket, unit in zip(
        elapsed_s.tolist(), buckets.tolist(), units.tolist(), strict=True
    ):
        whole = max(one_s, 0) // unit_s
        assert unit == min(whole, n_buckets - 1)
        assert 0 <= bucket < n_buckets
        if one_s < 2**52:
            assert bucket == min(whole.bit_length(), n_buckets - 1)


def _catalogues(given: Pieces) -> None:
    n, close = given.byte() % 16, given.byte() % 2
    ids_N = given.int64s(n)
    if close:  # a table, not a hash table
        ids_N = ids_N & 0xFFF
    if given.byte() % 4:
        ids_N = np.unique(ids_N)
    try:
        catalogue = Catalogue(ids_N)
    except ContractError:
        assert (ids_N < MIN_ITEM).any() or (np.diff(ids_N) <= 0).any()
        return
    row_of = {item_id: FIRST_ROW + n for n, item_id in enumerate(ids_N.tolist())}
    asked = np.concatenate([ids_N, given.int64s(8), [0, -1, 1, 2**63 - 1, -(2**63)]])
    expected = [
        row_of.get(item_id, UNKNOWN_ROW) if item_id else PADDING_ROW for item_id in asked.tolist()
    ]
    assert catalogue.rows(asked).tolist() == expected


def _encoding(given: Pieces) -> None:
    spec = _SPECS[given.byte() % len(_SPECS)]
    n_requests, n_candidates = 1 + given.byte() % 3, 1 + given.byte() % 3
    histories = [given.take(RECORD_BYTES * (given.byte() % 10)) for _ in range(n_requests)]
    candidates_BC = given.int64s(n_requests * n_candidates).reshape(n_requests, n_candidates)
    ranking_times_B = given.int64s(n_requests) & 0xFFFFFFFF
    length = spec.history_length
    inputs, corrupt_B = encode(histories, candidates_BC, ranking_times_B, _KNOWN, spec)
    assert inputs.history_items.shape == (n_requests, length)
    assert inputs.history_buckets.shape == (n_requests, length, len(spec.granularities))
    assert inputs.candidate_items.shape == (n_requests, n_candidates)
    for rows in (inputs.history_items, inputs.candidate_items):
        assert ((rows >= 0) & (rows < _KNOWN.n_rows)).all()
    for g, granularity in enumerate(spec.granularities):
        buckets_BL = inputs.history_buckets[:, :, g]
        assert ((buckets_BL >= 0) & (buckets_BL < granularity.n_buckets)).all()
    for b, raw in enumerate(histories):
        kept = np.frombuffer(raw[-length * RECORD_BYTES :], RECORD)
        assert corrupt_B[b] == (kept["item"] < MIN_ITEM).any()
        assert (inputs.history_items[b, : length - len(kept)] == PADDING_ROW).all()
        assert (inputs.history_buckets[b, : length - len(kept)] == 0).all()
    stacked_BL = stack_records(histories, length)
    assert stacked_BL.shape == (n_requests, length)
    wider, _ = encode(histories, candidates_BC, ranking_times_B, _KNOWN, spec, length=length + 9)
    if max(map(len, histories)) <= length * RECORD_BYTES:  # padding changes nothing
        assert (wider.history_items[:, 9:] == inputs.history_items).all()
        assert (wider.history_buckets[:, 9:] == inputs.history_buckets).all()


def _golden(content: bytes) -> None:
    path = _FOLDER / "golden.npz"
    path.write_bytes(content)
    try:
        rows = GoldenRows.load(path)
    except BundleError:
        return
    n = len(rows.histories)
    assert n == len(rows.ranking_times) == len(rows.candidates)
    assert rows.scores.shape == rows.candidates.shape
    assert np.isfinite(rows.scores).all()
    rows.save(path)
    again = GoldenRows.load(path)
    assert list(again.histories) == list(rows.histories)
    for name in ("ranking_times", "candidates", "scores"):
        assert (getattr(again, name) == getattr(rows, name)).all()


def _golden_archives(given: Pieces) -> None:
    _golden(given.rest())


def _golden_members(given: Pieces) -> None:
    """The checksums of an archive are right, whatever its members hold."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for name, part in zip(_ARRAYS, given.parts(len(_ARRAYS)), strict=True):
            file.writestr(f"{name}.npy", part)
    _golden(archive.getvalue())


def _logs(given: Pieces) -> None:
    for name, part in zip(_LOG_FILES, given.parts(len(_LOG_FILES)), strict=True):
        (_FOLDER / name).write_bytes(part)
    try:
        log = HistoryLog(_FOLDER)
        user_ids = [log.user_id(user) for user in range(len(log))]
    except HistoryLogError:
        return
    histories = [log.history(user) for user in range(len(log))]
    assert len(user_ids) == len(histories) == log.header.n_users
    assert sum(map(len, histories)) == RECORD_BYTES * log.header.n_behaviors
    assert "".join(user_ids).encode() == (_FOLDER / history_log.USER_IDS).read_bytes()


ASKED: list[Callable[[Pieces], None]] = [
    _decoded_records,
    _encoded_records,
    _user_ids,
    _buckets,
    _catalogues,
    _encoding,
    _golden_archives,
    _golden_members,
    _logs,
]
TOKENS = [b"\x93NUMPY\x01\x00", b"'descr': '<i8'", b"'shape': (2, 3)", b"PK\x03\x04", b"|O", b"<f4"]


def one_input(data: bytes) -> None:
    """Ask one of them; whatever is raised is a find."""
    given = Pieces(data)
    ASKED[given.byte() % len(ASKED)](given)


def seeds() -> list[bytes]:
    """Return inputs that are good ones."""
    records = encode_records([1, 2, 2**63 - 1], [0, 5, 2**32 - 1])
    numbers = np.array([1, 2, 3, 4], dtype="<i8").tobytes()
    rows = GoldenRows(
        histories=[records, b""],
        ranking_times=np.array([10, 11], dtype=np.int64),
        candidates=np.array([[1, 2], [3, 0]], dtype=np.int64),
        scores=np.array([[0.1, 0.2], [0.3, 0.4]], dtype=np.float32),
    )
    path = _FOLDER / "seed.npz"
    rows.save(path)
    with zipfile.ZipFile(path) as archive:
        members = [archive.read(f"{name}.npy") for name in _ARRAYS]
    header = (
        b'{"format_version":1,"source":"s","fingerprint":"f","n_users":2,"n_behaviors":3,'
        b'"n_impressions":0,"n_items":3,"has_labels":false,"has_probabilities":false,'
        b'"has_categories":false}'
    )
    log = joined(header, records, _npy([0, 3, 3]), b"ab", _npy([0, 1, 2]))
    return [
        b"\0" + records,
        b"\1\2\0" + numbers,
        "\2é⭐".encode(),
        b"\3\1\0\0\x16" + numbers,
        b"\4\4\0\1" + numbers,
        b"\5\1\1\1\3" + records + b"\1" + records,
        b"\6" + path.read_bytes(),
        b"\7" + joined(*members),
        b"\x08" + log,
    ]


def _npy(numbers: list[int]) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array(numbers, dtype=np.int64))
    return file.getvalue()
