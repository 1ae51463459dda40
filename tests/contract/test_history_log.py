"""The history log on disk."""

import json
from pathlib import Path

import numpy as np
import pytest

from contract import history_log
from contract.errors import HistoryLogError
from contract.history_log import HistoryLog, LogHeader
from contract.records import encode_records


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Users "a" (behaviors 1, 2, 3), "bé" (none) and "c" (9)."""
    raw = encode_records([1, 2, 3, 9], [10, 20, 30, 40])
    (tmp_path / history_log.BEHAVIORS).write_bytes(raw)
    np.save(tmp_path / history_log.BEHAVIOR_OFFSETS, np.array([0, 3, 3, 4]))
    (tmp_path / history_log.USER_IDS).write_bytes("abéc".encode())
    np.save(tmp_path / history_log.USER_ID_OFFSETS, np.array([0, 1, 4, 5]))
    header = LogHeader(
        format_version=1,
        source="x.csv",
        fingerprint="f",
        n_users=3,
        n_behaviors=4,
        n_impressions=0,
        n_items=4,
        has_labels=False,
        has_probabilities=False,
        has_categories=False,
    )
    (tmp_path / history_log.HEADER).write_text(header.model_dump_json())
    return tmp_path


def test_an_id_that_is_no_text_is_refused_when_it_is_read(folder):
    (folder / history_log.USER_IDS).write_bytes(b"ab\xff\xffc")
    log = HistoryLog(folder)
    assert log.user_id(0) == "a"
    with pytest.raises(HistoryLogError, match=r"user_ids\.bin: user 1 has no id in UTF-8"):
        log.user_id(1)


def test_a_header_without_an_end_is_refused(folder):
    (folder / history_log.HEADER).write_bytes(b"[" * 100_000)
    with pytest.raises(HistoryLogError, match=r"log\.json is not readable"):
        HistoryLog(folder)


def test_offsets_in_an_archive_are_refused(folder):
    with (folder / history_log.USER_ID_OFFSETS).open("wb") as file:
        np.savez(file, np.array([0, 1, 4, 5]))
    with pytest.raises(HistoryLogError, match=r"user_id_offsets\.npy is not readable"):
        HistoryLog(folder)


def test_users_and_histories_are_read_run_by_run(folder):
    log = HistoryLog(folder)
    assert [log.user_id(user) for user in range(len(log))] == ["a", "bé", "c"]
    assert log.history(0) == encode_records([1, 2, 3], [10, 20, 30])
    assert log.history(1) == b""
    assert log.history(2) == encode_records([9], [40])


def test_only_the_newest_are_read_where_asked(folder):
    assert HistoryLog(folder).history(0, newest=2) == encode_records([2, 3], [20, 30])


def test_a_folder_of_anything_else_is_refused(tmp_path):
    with pytest.raises(HistoryLogError, match=r"not a prepared log: log\.json is missing"):
        HistoryLog(tmp_path)


def test_another_format_version_is_refused(folder):
    path = folder / history_log.HEADER
    path.write_text(json.dumps({**json.loads(path.read_text()), "format_version": 9}))
    with pytest.raises(HistoryLogError, match="format version 9, this program reads version 1"):
        HistoryLog(folder)


def test_half_a_file_is_refused(folder):
    path = folder / history_log.BEHAVIORS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(HistoryLogError, match=r"behaviors\.bin has 47 bytes, log\.json says 48"):
        HistoryLog(folder)


@pytest.mark.parametrize(
    "offsets",
    [[0, 3, 4], [0, 3, 2, 4], [1, 3, 3, 4], [0, 3, 3, 5]],
    ids=["too few", "descending", "not from 0", "past the end"],
)
def test_offsets_that_do_not_divide_the_file_are_refused(folder, offsets):
    np.save(folder / history_log.BEHAVIOR_OFFSETS, np.array(offsets))
    with pytest.raises(HistoryLogError, match="does not divide 4 entries into 3 runs"):
        HistoryLog(folder)


@pytest.mark.parametrize("name", [history_log.BEHAVIORS, history_log.USER_ID_OFFSETS])
def test_a_missing_file_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(HistoryLogError, match=f"{name} is not readable"):
        HistoryLog(folder)
