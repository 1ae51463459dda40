"""`python -m loadtest replay`: small logs against a small real server."""

import argparse
import json

import numpy as np
import polars as pl
import pytest

from contract.errors import HistoryLogError
from loadtest.replay import Events, ReplayError, add_command, choose_events, due_times, read_log
from tests.loadtest.recording_server import recording_server
from training.data.prepare import PrepareOptions, prepare
from training.data.readers import LogSource

START = 1_700_000_000
USERS = ["ann", "bob", "ann", "cid", "bob", "ann"]
ITEMS = [11, 12, 13, 14, 15, 16]
TIMES = [START, START + 10, START + 10, START + 20, START + 30, START + 60]
ROWS = {"user_id": USERS, "item_id": ITEMS, "timestamp": TIMES}
PATIENT = ("--max-late-s", "10", "--timeout-s", "10", "--max-p99-s", "9", "--within-s", "9")


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.parquet"
    # The order of a log's rows says nothing about their times.
    pl.DataFrame(ROWS)[[3, 0, 1, 5, 2, 4]].write_parquet(path)
    return path


def replay(log, *flags: str) -> int:
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["replay", str(log), *flags])
    code: int = options.run(options)
    return code


def everything(log) -> Events:
    return choose_events(read_log(log), start=-np.inf, end=np.inf, most=1000)


# Reading.


def test_behaviors_are_read_in_order_of_time(log):
    events = everything(log)
    assert events.users == USERS
    assert events.items.tolist() == ITEMS
    assert events.times.tolist() == TIMES


def test_a_csv_file_is_read_alike_and_numbers_are_users_too(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(f"item_id,user_id,timestamp\n7,4711,{START}\n8,4712,{START + 1}\n")
    events = everything(path)
    assert events.users == ["4711", "4712"]
    assert events.items.tolist() == [7, 8]


def test_impressions_without_a_click_are_no_behaviors(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({**ROWS, "label": [1, 0, None, 0, 1, None]}).write_parquet(path)
    assert everything(path).items.tolist() == [11, 13, 15, 16]


def test_datetimes_are_times(tmp_path):
    path = tmp_path / "log.parquet"
    times = pl.from_epoch(pl.Series(TIMES))
    pl.DataFrame({**ROWS, "timestamp": times}).write_parquet(path)
    assert everything(path).times.tolist() == TIMES


def test_a_prepared_log_is_read_as_the_log_it_was_made_of(log, tmp_path):
    prepare(LogSource(path=log), tmp_path / "prepared", PrepareOptions())
    events, raw = everything(tmp_path / "prepared"), everything(log)
    assert events.times.tolist() == raw.times.tolist()
    rows = set(zip(events.users, events.items.tolist(), events.times.tolist(), strict=True))
    assert rows == set(zip(raw.users, raw.items.tolist(), raw.times.tolist(), strict=True))


def test_only_the_first_behaviors_within_the_times_are_read(log):
    events = choose_events(read_log(log), start=START + 10, end=START + 60, most=3)
    assert events.items.tolist() == [12, 13, 14]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": ["a"], "item": [1]}, "has no column item_id and no timestamp: expected"),
        ({"user_id": ["a"], "item_id": ["shoe"], "timestamp": [1]}, "not readable as a log"),
        ({"user_id": ["a"], "item_id": [0], "timestamp": [1]}, "item_id is missing or out of"),
        (
            {"user_id": ["a"], "item_id": [1], "timestamp": [-1]},
            r"such as -1: expected 0 \.\. 4294",
        ),
        ({"user_id": [None], "item_id": [1], "timestamp": [1]}, "rows without a user_id"),
    ],
)
def test_another_table_is_refused_with_what_was_found(columns, message, tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame(columns).write_parquet(path)
    with pytest.raises(ReplayError, match=message):
        everything(path)


def test_a_log_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ReplayError, match=r"none\.parquet is not readable as a log"):
        everything(tmp_path / "none.parquet")
    with pytest.raises(HistoryLogError, match="is not a prepared log"):
        everything(tmp_path)


def test_times_without_any_behavior_are_refused(log):
    with pytest.raises(ReplayError, match="has no behavior within the times"):
        choose_events(read_log(log), start=START + 100, end=np.inf, most=10)


# Times.


def test_due_times_are_the_logs_own_divided_by_the_speed():
    times = np.array([START, START + 3600, START + 7200])
    due_s = due_times(times, 3600.0, 1)
    assert np.floor(due_s * 3600).astype(int).tolist() == [0, 3600, 7200]


def test_behaviors_of_one_second_are_spread_over_it_in_their_order():
    due_s = due_times(np.repeat([START, START + 1], 500), 1.0, 1)
    assert (np.diff(due_s) >= 0).all()
    assert np.histogram(due_s, [0, 0.5, 1, 1.5, 2])[0] == pytest.approx([250] * 4, abs=60)


# Runs.


def test_each_behavior_is_scored_at_its_time_then_posted(log, tmp_path):
    with recording_server() as server:
        code = replay(
            *(log, "--url", server.url, "--speed", "120", "--candidates", "3"),
            *("--post-events", "--folder", str(tmp_path / "run"), *PATIENT),
        )
    assert code == 0
    scores = [received.body for received in server.received if received.path == "/score"]
    # The first one is sent beforehand, to see whether the service is there, and to open
    # connections.
    n_before = len(scores) - 6
    assert all(body == scores[0] for body in scores[:n_before])
    replayed = scores[n_before:]
    assert sorted(body["ranking_time"] for body in replayed) == TIMES
    items = dict(zip(ITEMS, USERS, strict=True))
    for body in replayed:
        item, *others = body["candidates"]
        assert items[item] == body["user_id"]
        assert len({item, *others}) == 3
        assert set(others) < set(ITEMS)
    posted = [received.body for received in server.received if received.path == "/events"]
    assert sorted(posted, key=lambda body: body["item_id"]) == [
        {"user_id": user, "item_id": item, "time": time}
        for user, item, time in zip(USERS, ITEMS, TIMES, strict=True)
    ]
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["judged"]["requests"] == 6
    assert report["stages"][-1]["stage"] == "events"
    assert report["stages"][-1]["requests"] == 6
    requests = pl.read_parquet(tmp_path / "run" / "requests.parquet")
    assert len(requests) == 12
    due_s = requests.filter(pl.col("stage") < 10)["due_s"].to_list()
    assert due_s == pytest.approx([(t - START) / 120 for t in TIMES], abs=1 / 120)


def test_without_the_flag_no_behavior_is_posted(log, tmp_path):
    with recording_server() as server:
        replay(
            *(log, "--url", server.url, "--speed", "600", "--candidates", "1-6"),
            *("--from", "2023-11-14T22:13:25", "--until", str(START + 60)),
            *("--folder", str(tmp_path / "run"), *PATIENT),
        )
    assert {received.path for received in server.received} == {"/score"}
    times = {received.body["ranking_time"] for received in server.received}
    assert times == {START + 10, START + 20, START + 30}


def test_candidates_are_sampled_from_a_catalogue_where_one_is_named(log, tmp_path):
    np.save(tmp_path / "catalogue.npy", np.arange(100, 200))
    with recording_server() as server:
        replay(
            *(log, "--url", server.url, "--speed", "600", "--candidates", "50"),
            *("--catalogue", str(tmp_path), "--folder", str(tmp_path / "run"), *PATIENT),
        )
    for received in server.received:
        assert len(received.body["candidates"]) == 50
        assert all(100 <= other < 200 for other in received.body["candidates"][1:])


def test_a_missed_objective_fails(log, tmp_path):
    """Events that fail are no part of the objective."""

    def status(received):
        return 503 if received.path == "/events" else 200

    for flags, code in (((), 0), (("--min-rate", "100000"), 1)):
        with recording_server(status) as server:
            found = replay(
                *(log, "--url", server.url, "--speed", "600", "--candidates", "2", *PATIENT),
                *("--post-events", "--folder", str(tmp_path / f"run-{code}"), *flags),
            )
        assert found == code


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--speed", "0"), "speed must be positive, got 0"),
        (("--max-requests", "0"), "max_requests must be positive, got 0"),
        (("--events-after-s", "-1"), "events_after_s must be 0 or more, got -1"),
        (("--from", "yesterday"), "'yesterday' is no moment: expected unix seconds"),
        (("--candidates", "100"), "100 distinct candidates were asked for, but there are only 6"),
    ],
)
def test_settings_that_cannot_be_run_are_refused_by_name(flags, message, log, tmp_path):
    with pytest.raises(ReplayError, match=message):
        replay(log, "--url", "http://127.0.0.1:1", "--folder", str(tmp_path / "run"), *flags)
