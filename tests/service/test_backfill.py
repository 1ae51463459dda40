"""Prepared logs into a real Redis: whole, safe to run again, nothing lost that came meanwhile."""

import threading
import time

import pytest
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from contract.errors import RecordError
from contract.history_log import HistoryLog
from service.backfill import CHUNK_USERS, BackfillReport, backfill, merge_histories
from service.errors import HistoryUnavailableError
from tests.service.histories import records, steps, write_log

KEEP = 4


@pytest.fixture
def load(redis, tmp_path):
    """Backfill histories from a log that is written for the call."""
    logs = iter(range(100))

    def run(histories, *, keep=KEEP, prefix="history", progress=lambda _: None):
        log = HistoryLog(write_log(tmp_path / f"log-{next(logs)}", histories))
        return backfill(redis, log, prefix=prefix, keep=keep, progress=progress)

    return run


def report(*, written=0, merged=0, unchanged=0, corrupt=()) -> BackfillReport:
    return BackfillReport(
        written=written, merged=merged, unchanged=unchanged, corrupt=list(corrupt)
    )


class TestEmptyRedis:
    def test_every_history_is_written(self, load, redis):
        histories = {"ann": steps(1, 2, 3), "bé": steps(4), "4711": steps(5, 6)}
        assert load(histories) == report(written=3)
        assert redis.dbsize() == 3
        for user, behaviors in histories.items():
            assert redis.get(f"history:{user}") == records(*behaviors)

    def test_of_a_long_one_only_the_newest_kept(self, load, redis):
        behaviors = steps(*range(1, KEEP + 3))
        load({"ann": behaviors})
        assert redis.get("history:ann") == records(*behaviors[-KEEP:])

    def test_users_without_behaviors_get_no_key(self, load, redis):
        assert load({"ann": [], "bob": steps(1)}) == report(written=1)
        assert redis.keys() == [b"history:bob"]

    def test_the_prefix_is_that_of_the_settings(self, load, redis):
        load({"ann": steps(1)}, prefix="shop:7")
        assert redis.keys() == [b"shop:7:ann"]

    def test_an_empty_log_is_loaded_too(self, load):
        assert load({}) == report()

    def test_more_users_than_one_chunk(self, load, redis):
        histories = {f"user {n}": steps(n + 1) for n in range(CHUNK_USERS + 7)}
        assert load(histories) == report(written=CHUNK_USERS + 7)
        assert redis.dbsize() == CHUNK_USERS + 7

    def test_progress_hears_of_every_user_once(self, load):
        """Of those without behaviors too, or a bar would never be full."""
        heard: list[int] = []
        histories = {f"user {n}": steps(1) for n in range(CHUNK_USERS)}
        load({**histories, "nothing": [], "last": steps(1)}, progress=heard.append)
        assert sum(heard) == CHUNK_USERS + 2


class TestAgain:
    def test_another_run_changes_nothing(self, load, redis):
        histories = {"ann": steps(1, 2, 3, 4, 5, 6), "bob": steps(7)}
        load(histories)
        stored = redis.mget("history:ann", "history:bob")
        assert load(histories) == report(unchanged=2)
        assert redis.mget("history:ann", "history:bob") == stored

    def test_what_an_interrupted_run_left_out_is_written(self, load):
        load({"ann": steps(1, 2)})
        assert load({"ann": steps(1, 2), "bob": steps(3)}) == report(written=1, unchanged=1)

    def test_a_longer_log_adds_what_is_missing(self, load, redis):
        load({"ann": steps(1, 2)})
        assert load({"ann": steps(1, 2, 3)}) == report(merged=1)
        assert redis.get("history:ann") == records(*steps(1, 2, 3))


class TestMerge:
    def test_events_that_came_in_meanwhile_stay_in_order_of_time(self, load, redis):
        redis.set("history:ann", records((9, 25), (8, 99)))
        assert load({"ann": [(1, 10), (2, 20), (3, 30)]}) == report(merged=1)
        assert redis.get("history:ann") == records((1, 10), (2, 20), (9, 25), (3, 30), (8, 99))

    def test_a_behavior_that_is_in_both_stands_once(self, load, redis):
        redis.set("history:ann", records((2, 20), (8, 99)))
        load({"ann": [(1, 10), (2, 20)]})
        assert redis.get("history:ann") == records((1, 10), (2, 20), (8, 99))

    def test_an_expiry_stays(self, load, redis):
        redis.set("history:ann", records((8, 99)), ex=1000)
        load({"ann": [(1, 10)]})
        assert 0 < redis.ttl("history:ann") <= 1000

    def test_nothing_is_lost_while_events_arrive(self, redis, redis_url, tmp_path):
        """A history that changes between reading and writing is merged once more."""
        users = [f"user {n}" for n in range(100)]
        logged = steps(1, 2, 3, start=100)
        arriving = steps(11, 12, 13, start=1_000)
        log = HistoryLog(write_log(tmp_path / "log", dict.fromkeys(users, logged)))
        redis.mset({f"history:{user}": records((9, 50)) for user in users})

        def post() -> None:
            with Redis.from_url(redis_url) as poster:
                for behavior in arriving:
                    for user in users:
                        poster.append(f"history:{user}", records(behavior))
                        time.sleep(0.0002)

        poster = threading.Thread(target=post)
        poster.start()
        first = backfill(redis, log, prefix="history", keep=KEEP)
        while poster.is_alive():
            assert backfill(redis, log, prefix="history", keep=KEEP).unchanged == len(users)
        poster.join()
        assert first == report(merged=len(users))
        for user in users:
            assert redis.get(f"history:{user}") == records((9, 50), *logged, *arriving)

    @pytest.mark.parametrize(
        ("stored", "loaded", "merged"),
        [
            pytest.param([(1, 10)], [], [(1, 10)], id="nothing to load"),
            pytest.param([], [(1, 10)], [(1, 10)], id="nothing stored"),
            pytest.param([(1, 10)], [(1, 10)], [(1, 10)], id="the same"),
            pytest.param([(1, 10)], [(2, 10)], [(1, 10), (2, 10)], id="same second"),
            pytest.param([(1, 30)], [(2, 10), (1, 30)], [(2, 10), (1, 30)], id="older"),
            pytest.param([(1, 10)], [(2, 2**32 - 1)], [(1, 10), (2, 2**32 - 1)], id="latest"),
        ],
    )
    def test_merged_by_hand(self, stored, loaded, merged):
        assert merge_histories(records(*stored), records(*loaded)) == records(*merged)

    def test_within_a_second_stored_ones_come_first_each_in_their_order(self):
        stored, loaded = range(1, 51), range(100, 50, -1)
        merged = merge_histories(
            records(*((item, second) for second in (10, 20) for item in stored)),
            records(*((item, second) for second in (10, 20) for item in loaded)),
        )
        assert merged == records(
            *((item, second) for second in (10, 20) for item in (*stored, *loaded))
        )

    @pytest.mark.parametrize(
        "stored",
        [b"x", records((1, 10)) + b"half", records((1, 10), (0, 20)), records((-1, 10))],
        ids=["short", "half", "item 0", "negative item"],
    )
    def test_what_is_no_history_is_not_merged(self, stored):
        with pytest.raises(RecordError):
            merge_histories(stored, records((1, 10)))


class TestCorrupt:
    @pytest.mark.parametrize(
        "value",
        [b"x", records((0, 10)), records((1, 10)) + b"half"],
        ids=["short", "item 0", "half"],
    )
    def test_a_broken_value_stays_and_is_reported(self, load, redis, value):
        redis.set("history:eve", value)
        assert load({"ann": steps(1), "eve": steps(2)}) == report(written=1, corrupt=["eve"])
        assert redis.get("history:eve") == value

    def test_a_value_of_another_type_stays_and_is_reported(self, load, redis):
        redis.rpush("history:eve", "x")
        assert load({"eve": steps(2), "bob": steps(3)}) == report(written=1, corrupt=["eve"])
        assert redis.lrange("history:eve", 0, -1) == [b"x"]

    @pytest.mark.parametrize("user", ["eve", "a:b"])
    def test_the_user_is_named_whatever_the_prefix(self, load, redis, user):
        redis.set(f"shop:7:{user}", b"x")
        assert load({user: steps(1)}, prefix="shop:7").corrupt == [user]


class TestRedisAway:
    def test_it_says_so_and_what_to_do(self, away_url, tmp_path):
        log = HistoryLog(write_log(tmp_path / "log", {"ann": steps(1)}))
        with (
            Redis.from_url(away_url, retry=Retry(NoBackoff(), 0)) as redis,
            pytest.raises(HistoryUnavailableError, match=r"Redis did not answer: .* run the comm"),
        ):
            backfill(redis, log, prefix="history", keep=KEEP)

    def test_a_redis_that_refuses_to_write_ends_it(self, load, redis):
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(HistoryUnavailableError, match="maxmemory") as raised:
                load({"ann": steps(1)})
        finally:
            redis.config_set("maxmemory", 0)
        assert str(raised.value).isprintable(), "bytes of records are nothing for a terminal"
        assert load({"ann": steps(1)}) == report(written=1)
