"""Histories in a real Redis: bytes, reads, appends, and a Redis that is away."""

import asyncio
import socket
from contextlib import AsyncExitStack, asynccontextmanager

import pytest

from service.errors import (
    CorruptHistoryError,
    HistoryUnavailableError,
    IdempotencyKeyReusedError,
)
from service.history import Appended, HistoryStore, Idempotency, history_key
from service.redis_nodes import connect
from tests.service.dummy_model import HISTORY_LENGTH as KEEP
from tests.service.histories import records, steps

ANN = "history:ann"


@asynccontextmanager
async def open_store(url, *, keep=KEEP, timeout_s=5.0):
    store = HistoryStore(connect(url, timeout_s=timeout_s), prefix="history", keep=keep)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize(
    ("user_id", "key"),
    [("ann", b"history:ann"), ("a:b", b"history:a:b"), ("é", b"history:\xc3\xa9")],
    ids=["plain", "with a colon", "not ascii"],
)
def test_a_history_stands_under_prefix_and_user(user_id, key):
    assert history_key("history", user_id) == key


class TestFetch:
    async def test_an_unknown_user_has_an_empty_history(self, store):
        assert await store.fetch(["nobody"], 8) == [b""]

    async def test_users_come_in_the_order_asked(self, store, redis):
        redis.set("history:ann", records((1, 10)))
        redis.set("history:bob", records((2, 20), (3, 30)))
        found = await store.fetch(["bob", "nobody", "ann"], 8)
        assert found == [records((2, 20), (3, 30)), b"", records((1, 10))]

    async def test_only_the_newest_are_read(self, store, redis):
        redis.set(ANN, records(*steps(1, 2, 3, 4, 5)))
        assert await store.fetch(["ann"], 2) == [records(*steps(1, 2, 3, 4, 5)[-2:])]

    async def test_nobody_is_read_without_asking_redis(self, away_store):
        assert await away_store.fetch([], 8) == []

    @pytest.mark.parametrize(
        "length_bytes",
        [1, 11, 13, 12 * KEEP - 1, 12 * KEEP + 1, 12 * 3 * KEEP + 5],
        ids=lambda n: f"{n} bytes",
    )
    async def test_broken_length_is_one_users_error(self, store, redis, length_bytes):
        """Longer than what is read, too: there the cut range alone looks whole."""
        redis.set(ANN, b"\x01" * length_bytes)
        redis.set("history:bob", records((2, 20)))
        broken, bob = await store.fetch(["ann", "bob"], KEEP)
        assert isinstance(broken, CorruptHistoryError)
        assert broken.detail == (
            f"the history of user 'ann' cannot be read: a history of {length_bytes} bytes is not "
            "a whole number of 12-byte records"
        )
        assert bob == records((2, 20))

    @pytest.mark.parametrize("make", ["rpush", "sadd"])
    async def test_a_value_of_another_type_is_one_users_error(self, store, redis, make):
        getattr(redis, make)(ANN, "x")
        broken, nobody = await store.fetch(["ann", "nobody"], KEEP)
        assert isinstance(broken, CorruptHistoryError)
        assert "'ann' cannot be read: the key holds something other than a string" in broken.detail
        assert nobody == b""


class TestAppend:
    async def test_bytes_are_the_records_of_the_contract(self, store, redis):
        largest = (2**63 - 1, 2**32 - 1)
        assert await store.append({"ann": records((258, 3))}) == {"ann": Appended(count=1)}
        assert await store.append({"ann": records(largest)}) == {"ann": Appended(count=1)}
        assert redis.get(ANN) == (
            b"\x02\x01\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00"
            b"\xff\xff\xff\xff\xff\xff\xff\x7f\xff\xff\xff\xff"
        )

    async def test_many_users_in_one_call(self, store, redis):
        outcome = await store.append({"ann": records((1, 10), (2, 20)), "bob": records((3, 30))})
        assert outcome == {"ann": Appended(count=2), "bob": Appended(count=1)}
        assert redis.get(ANN) == records((1, 10), (2, 20))
        assert redis.get("history:bob") == records((3, 30))

    async def test_a_repetition_changes_nothing(self, store, redis):
        await store.append({"ann": records((1, 10), (2, 20))})
        assert await store.append({"ann": records((1, 10), (2, 20))}) == {"ann": Appended(count=0)}
        assert redis.get(ANN) == records((1, 10), (2, 20))

    async def test_of_a_part_that_is_new_only_that_is_appended(self, store, redis):
        await store.append({"ann": records((1, 10), (2, 20))})
        assert await store.append({"ann": records((2, 20), (3, 30))}) == {"ann": Appended(count=1)}
        assert redis.get(ANN) == records((1, 10), (2, 20), (3, 30))

    async def test_a_behavior_twice_in_one_call_is_appended_once(self, store, redis):
        assert await store.append({"ann": records((1, 10), (1, 10))}) == {"ann": Appended(count=1)}
        assert redis.get(ANN) == records((1, 10))

    async def test_another_time_or_item_or_user_is_another_behavior(self, store):
        await store.append({"ann": records((1, 10))})
        assert await store.append({"ann": records((1, 11), (2, 10)), "bob": records((1, 10))}) == {
            "ann": Appended(count=2),
            "bob": Appended(count=1),
        }

    async def test_a_repetition_is_found_while_at_most_128_others_have_come_since(self, redis_url):
        """The stated limit of idempotence."""
        later = steps(*range(2, 2 + 129))
        async with open_store(redis_url, keep=1000) as store:
            await store.append({"ann": records((1, 10))})
            await store.append({"ann": records(*later[:-1])})
            assert await store.append({"ann": records((1, 10))}) == {"ann": Appended(count=0)}
            await store.append({"ann": records(later[-1])})
            assert await store.append({"ann": records((1, 10))}) == {"ann": Appended(count=1)}

    @pytest.mark.parametrize("is_cut", [False, True], ids=["of a new user", "and is cut"])
    @pytest.mark.parametrize("keep", [50, 300, 600, 1000])
    async def test_a_repetition_of_a_thousand_changes_nothing(self, redis_url, redis, keep, is_cut):
        posted = records(*steps(*range(1, 1001)))
        async with open_store(redis_url, keep=keep) as store:
            for time in (10, 20) if is_cut else ():
                await store.append({"ann": records(*((item, time) for item in range(1, keep + 1)))})
            assert await store.append({"ann": posted}) == {"ann": Appended(count=1000)}
            assert redis.get(ANN) == posted[-12 * keep :]
            for _ in range(2):
                assert await store.append({"ann": posted}) == {"ann": Appended(count=0)}
            assert redis.get(ANN) == posted[-12 * keep :]

    async def test_a_repetition_of_a_thousand_is_found_behind_128_others(self, redis_url, redis):
        posted = records(*steps(*range(1, 1001)))
        others = records(*((item, 10) for item in range(1, 129)))
        async with open_store(redis_url, keep=1000) as store:
            await store.append({"ann": posted})
            await store.append({"ann": others})
            assert await store.append({"ann": posted}) == {"ann": Appended(count=0)}
        assert redis.get(ANN) == posted + others

    async def test_what_is_new_to_a_thousand_is_appended_where_fewer_are_kept(
        self, redis_url, redis
    ):
        behaviors = steps(*range(1, 1011))
        async with open_store(redis_url, keep=50) as store:
            await store.append({"ann": records(*behaviors[:1000])})
            outcome = await store.append({"ann": records(*behaviors[10:])})
        assert outcome == {"ann": Appended(count=10)}
        assert redis.get(ANN) == records(*behaviors[-60:])

    async def test_twice_what_is_kept_is_not_cut(self, store, redis):
        behaviors = records(*steps(*range(1, 2 * KEEP + 1)))
        await store.append({"ann": behaviors[: 12 * KEEP]})
        await store.append({"ann": behaviors[12 * KEEP :]})
        assert redis.get(ANN) == behaviors
        assert await store.fetch(["ann"], store.longest) == [behaviors]

    async def test_more_than_twice_is_cut_to_the_newest_kept(self, store, redis):
        behaviors = steps(*range(1, 2 * KEEP + 2))
        await store.append({"ann": records(*behaviors[:KEEP])})
        await store.append({"ann": records(*behaviors[KEEP:-1])})
        assert await store.append({"ann": records(behaviors[-1])}) == {"ann": Appended(count=1)}
        assert redis.get(ANN) == records(*behaviors[-KEEP:])

    async def test_one_call_may_bring_more_than_is_kept(self, store, redis):
        behaviors = steps(*range(1, 5 * KEEP))
        assert await store.append({"ann": records(*behaviors)}) == {
            "ann": Appended(count=5 * KEEP - 1)
        }
        assert redis.get(ANN) == records(*behaviors[-KEEP:])

    async def test_expiry_outlives_append_and_cut(self, store, redis):
        redis.set(ANN, records((1, 10)), ex=1000)
        for time in (20, 30):
            behaviors = ((item, time) for item in range(1, KEEP + 1))
            await store.append({"ann": records(*behaviors)})
        assert redis.strlen(ANN) == 12 * KEEP
        assert 0 < redis.ttl(ANN) <= 1000

    @pytest.mark.parametrize("value", [b"x", records((1, 10)) + b"half"], ids=["short", "half"])
    async def test_a_broken_value_stays_and_others_are_served(self, store, redis, value):
        redis.set(ANN, value)
        outcome = await store.append({"ann": records((1, 10)), "bob": records((2, 20))})
        assert isinstance(outcome["ann"], CorruptHistoryError)
        assert "'ann' cannot be read: its length or type is wrong" in outcome["ann"].detail
        assert outcome["bob"] == Appended(count=1)
        assert redis.get(ANN) == value
        assert redis.get("history:bob") == records((2, 20))

    async def test_a_value_of_another_type_stays_and_others_are_served(self, store, redis):
        redis.rpush(ANN, "x")
        outcome = await store.append({"ann": records((1, 10)), "bob": records((2, 20))})
        assert isinstance(outcome["ann"], CorruptHistoryError)
        assert outcome["bob"] == Appended(count=1)
        assert redis.lrange(ANN, 0, -1) == [b"x"]

    async def test_simultaneous_repetitions_append_once(self, store, redis):
        outcomes = await asyncio.gather(
            *(store.append({"ann": records((1, 10))}) for _ in range(20))
        )
        assert sorted(outcome["ann"].count for outcome in outcomes) == [0] * 19 + [1]
        assert redis.get(ANN) == records((1, 10))

    async def test_several_writers_lose_nothing_while_histories_are_cut(self, redis, redis_url):
        items = range(1, 2 * KEEP + 41)
        async with AsyncExitStack() as stack:
            stores = [await stack.enter_async_context(open_store(redis_url)) for _ in range(4)]
            outcomes = await asyncio.gather(
                *(stores[item % 4].append({"ann": records((item, 10))}) for item in items)
            )
        assert [outcome["ann"].count for outcome in outcomes] == [1] * len(items)
        kept = redis.get(ANN)
        assert KEEP <= len(kept) // 12 <= 2 * KEEP
        assert len({kept[i : i + 12] for i in range(0, len(kept), 12)}) == len(kept) // 12

    async def test_it_goes_on_when_redis_forgets_its_scripts(self, store, redis):
        await store.append({"ann": records((1, 10))})
        redis.script_flush()
        assert await store.append({"ann": records((2, 20))}) == {"ann": Appended(count=1)}

    async def test_a_redis_that_refuses_to_write_is_away(self, store, redis):
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(HistoryUnavailableError, match="used memory > 'maxmemory'"):
                await store.append({"ann": records((1, 10))})
        finally:
            redis.config_set("maxmemory", 0)
        assert await store.append({"ann": records((1, 10))}) == {"ann": Appended(count=1)}


ONE = Idempotency.of("one", b"the body")


class TestIdempotencyKey:
    async def test_the_same_call_again_appends_nothing_and_gets_the_same_answer(self, store, redis):
        first = await store.append(
            {"ann": records((1, 10)), "bob": records((2, 20))}, idempotency=ONE
        )
        # Without a time, a repetition's is another.
        again = await store.append(
            {"ann": records((1, 11)), "bob": records((2, 21))}, idempotency=ONE
        )
        assert first == {"ann": Appended(count=1), "bob": Appended(count=1)}
        assert again == {
            "ann": Appended(count=1, earlier=True),
            "bob": Appended(count=1, earlier=True),
        }
        assert redis.get(ANN) == records((1, 10))

    async def test_another_body_is_refused_before_anything_is_appended(self, store, redis):
        await store.append({"ann": records((1, 10))}, idempotency=ONE)
        other = Idempotency.of("one", b"another body")
        with pytest.raises(IdempotencyKeyReusedError, match="another body"):
            await store.append({"bob": records((2, 20))}, idempotency=other)
        assert redis.get("history:bob") is None

    async def test_another_key_is_another_call(self, store):
        await store.append({"ann": records((1, 10))}, idempotency=ONE)
        other = Idempotency.of("two", b"the body")
        outcome = await store.append({"ann": records((1, 11))}, idempotency=other)
        assert outcome == {"ann": Appended(count=1)}

    async def test_the_same_key_of_another_caller_is_another_call(self, store, redis):
        for item, caller in enumerate(("", "shop", "web"), start=1):
            idempotency = Idempotency.of("one", b"body %d" % item, caller=caller)
            outcome = await store.append({"ann": records((item, 10))}, idempotency=idempotency)
            assert outcome == {"ann": Appended(count=1)}
        assert redis.get(ANN) == records((1, 10), (2, 10), (3, 10))

    async def test_what_is_known_by_what_it_is_is_not_appended_with_a_key_either(self, store):
        await store.append({"ann": records((1, 10))})
        outcome = await store.append({"ann": records((1, 10), (2, 20))}, idempotency=ONE)
        assert outcome == {"ann": Appended(count=1)}
        again = await store.append({"ann": records((1, 10), (2, 20))}, idempotency=ONE)
        assert again == {"ann": Appended(count=1, earlier=True)}

    async def test_a_call_that_served_some_users_serves_the_others_when_repeated(
        self, store, redis
    ):
        redis.set("history:bob", b"broken")
        both = {"ann": records((1, 10)), "bob": records((2, 20))}
        first = await store.append(both, idempotency=ONE)
        assert first["ann"] == Appended(count=1)
        assert isinstance(first["bob"], CorruptHistoryError)
        redis.delete("history:bob")
        assert await store.append(both, idempotency=ONE) == {
            "ann": Appended(count=1, earlier=True),
            "bob": Appended(count=1),
        }

    async def test_what_memory_refused_is_appended_when_there_is_some(self, store, redis):
        redis.config_set("maxmemory", 1)
        try:
            with pytest.raises(HistoryUnavailableError, match="used memory > 'maxmemory'"):
                await store.append({"ann": records((1, 10))}, idempotency=ONE)
        finally:
            redis.config_set("maxmemory", 0)
        assert await store.append({"ann": records((1, 10))}, idempotency=ONE) == {
            "ann": Appended(count=1)
        }

    async def test_simultaneous_repetitions_append_once(self, store, redis):
        outcomes = await asyncio.gather(
            *(store.append({"ann": records((1, n))}, idempotency=ONE) for n in range(20))
        )
        assert sorted(outcome["ann"].earlier for outcome in outcomes) == [False] + [True] * 19
        assert redis.strlen(ANN) == 12

    async def test_keys_are_known_for_their_life_and_cost_bounded_memory(self, redis_url, redis):
        store = HistoryStore(
            connect(redis_url, timeout_s=5.0), prefix="history", keep=KEEP, idempotency_life_s=50.0
        )
        await store.append({"ann": records((1, 10))}, idempotency=ONE)
        await store.append({"ann": records((1, 10))}, idempotency=ONE)
        await store.close()
        keys = sorted(redis.keys("mneme-idempotency:*"))
        assert len(keys) == 2
        assert all(0 < redis.ttl(key) <= 50 for key in keys)
        assert sum(redis.memory_usage(key) for key in keys) < 400
        assert redis.ttl(ANN) == -1

    async def test_a_key_whose_life_is_over_may_come_with_another_body(self, store, redis):
        await store.append({"ann": records((1, 10))}, idempotency=ONE)
        claim = next(key for key in redis.keys("mneme-idempotency:*") if b"{" not in key)
        redis.delete(claim)  # it began to live a moment before the others
        other = Idempotency.of("one", b"another body")
        outcome = await store.append({"ann": records((2, 20))}, idempotency=other)
        assert outcome == {"ann": Appended(count=1)}

    async def test_they_are_nobodys_history(self, store):
        await store.append({"ann": records((1, 10))}, idempotency=ONE)
        assert await store.some_users(50) == ["ann"]


class TestAway:
    async def test_each_call_says_so(self, away_store):
        (error,) = await away_store.fetch(["ann"], 8)
        assert isinstance(error, HistoryUnavailableError)
        assert error.detail == "Redis did not answer: ConnectionError"
        with pytest.raises(HistoryUnavailableError, match="Redis did not answer: ConnectionError"):
            await away_store.append({"ann": records((1, 10))})
        assert not await away_store.is_ready()

    async def test_a_redis_that_is_silent_is_given_up(self):
        with socket.create_server(("127.0.0.1", 0)) as silent:
            url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
            async with open_store(url, timeout_s=0.05) as store:
                (error,) = await store.fetch(["ann"], 8)
                assert isinstance(error, HistoryUnavailableError)
                assert error.detail == "Redis did not answer: TimeoutError"
                assert not await store.is_ready()

    async def test_a_redis_that_comes_back_is_used_again(self, stoppable_redis):
        async with open_store(stoppable_redis.url) as store:
            await store.append({"ann": records((1, 10))})
            assert await store.is_ready()
            stoppable_redis.stop()
            (error,) = await store.fetch(["ann"], 8)
            assert isinstance(error, HistoryUnavailableError)
            assert not await store.is_ready()
            stoppable_redis.start()
            assert await store.is_ready()
            assert await store.append({"ann": records((2, 20))}) == {"ann": Appended(count=1)}
            assert await store.fetch(["ann"], 8) == [records((2, 20))]

    async def test_a_restart_that_nobody_noticed_costs_no_request(self, stoppable_redis):
        """The pooled connection is dead; the call is made once more on a new one."""
        async with open_store(stoppable_redis.url) as store:
            await store.append({"ann": records((1, 10))})
            stoppable_redis.stop()
            stoppable_redis.start()
            assert await store.append({"ann": records((2, 20))}) == {"ann": Appended(count=1)}
