"""Histories on real Redis servers that fail, come back, move their slots, and change places."""

import asyncio
import signal
import threading
import time
from functools import partial

import pytest
from redis import Redis
from redis.crc import key_slot

from loadtest.redis_cluster import LocalCluster, redis_cluster, redis_sentinels
from loadtest.redis_server import free_port
from service.breaker import MAX_FAILURES
from service.errors import HistoryUnavailableError
from service.history import Appended, Idempotency, history_key
from tests.service.histories import NOW, records
from tests.service.redis_stores import (
    KEEP,
    fill,
    open_store,
    some_histories,
    until_it_answers,
)

HISTORIES = some_histories(60)
USERS = list(HISTORIES)


@pytest.fixture(scope="module")
def _cluster():
    with redis_cluster(3) as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: LocalCluster) -> LocalCluster:
    """Three primaries on loopback; they are empty when a test begins."""
    for node in range(3):
        _cluster.command(node, "FLUSHALL")
    return _cluster


def reason(outcome) -> str:
    assert isinstance(outcome, HistoryUnavailableError)
    return outcome.detail


class TestCluster:
    async def test_a_batch_of_users_of_all_nodes_is_read_and_written_in_order(self, cluster):
        async with open_store(cluster.url) as store:
            await fill(store, HISTORIES)
            found = await store.fetch([*USERS, "nobody", *USERS[:3]], KEEP)
            assert found == [*HISTORIES.values(), b"", *list(HISTORIES.values())[:3]]
            assert await store.is_ready()
        sizes = [cluster.command(node, "DBSIZE") for node in range(3)]
        assert sum(sizes) == len(HISTORIES)
        assert min(sizes) > 0

    async def test_one_node_of_the_url_is_enough(self, cluster):
        async with open_store(f"redis+cluster://127.0.0.1:{cluster.nodes[1].port}") as store:
            await fill(store, HISTORIES)

    async def test_a_node_of_the_url_may_be_away(self, cluster):
        url = f"{cluster.url.replace('://', f'://127.0.0.1:{free_port()},')}"
        async with open_store(url) as store:
            await fill(store, HISTORIES)

    async def test_a_sample_draws_users_of_several_nodes(self, cluster):
        async with open_store(cluster.url) as store:
            await fill(store, HISTORIES)
            users = await store.some_users(60)
        assert set(users) <= set(USERS)
        assert len({cluster.node_of(history_key("history", user)) for user in users}) > 1

    async def test_each_node_learns_the_function_when_it_is_asked(self, cluster):
        async with open_store(cluster.url) as store:
            await fill(store, HISTORIES)
            for node in range(3):
                cluster.command(node, "SCRIPT FLUSH")
            assert set((await store.append(HISTORIES)).values()) == {Appended(count=0)}

    @pytest.mark.parametrize(
        "user", ["ann", "a{b}c", "{a", "a}b", "{}a", "}{", "a{}b{c}", "{b}{c}"], ids=repr
    )
    async def test_a_key_of_the_client_stands_in_the_slot_of_the_history(self, cluster, user):
        """Redis refuses a function that touches two slots."""
        idempotency = Idempotency.of("one", b"body")
        async with open_store(cluster.url) as store:
            first = await store.append({user: records((1, NOW))}, idempotency=idempotency)
            again = await store.append({user: records((1, NOW + 9))}, idempotency=idempotency)
            assert await store.fetch([user], KEEP) == [records((1, NOW))]
        assert first == {user: Appended(count=1)}
        assert again == {user: Appended(count=1, earlier=True)}

    async def test_without_the_clusters_url_it_is_refused(self, cluster):
        async with open_store(cluster.nodes[0].url) as store:
            found = await store.fetch(USERS, KEEP)
        assert any("MovedError" in reason(one) for one in found if not isinstance(one, bytes))

    async def test_users_of_a_dead_node_fail_and_no_others(self):
        with redis_cluster(3) as cluster:
            async with open_store(cluster.url, timeout_s=0.5) as store:
                await fill(store, HISTORIES)
                lost = {u for u in USERS if cluster.node_of(history_key("history", u)) == 2}
                for node in (0, 1):
                    cluster.command(node, "CONFIG SET", "cluster-require-full-coverage", "no")
                cluster.nodes[2].kill()
                for _ in range(2 * MAX_FAILURES):
                    found = dict(zip(USERS, await store.fetch(USERS, KEEP), strict=True))
                    assert {u for u, one in found.items() if one == HISTORIES[u]} == (
                        set(USERS) - lost
                    )
                assert store.counted(
                    "mneme_redis_breaker_state",
                    node=f"127.0.0.1:{cluster.nodes[2].port}",
                    operation="fetch",
                )
                with pytest.raises(HistoryUnavailableError):
                    await store.append(HISTORIES)
                assert await store.is_ready()


class TestSlotsOnTheMove:
    async def test_nothing_wrong_and_nothing_missing_is_read_while_slots_move(self, cluster):
        """Every slot with a history goes to another node and back, key by key."""
        async with open_store(cluster.url) as store, open_store(cluster.url) as writer:
            await fill(store, HISTORIES)
            moved = threading.Event()
            errors: list[Exception] = []

            def move() -> None:
                try:
                    for user in USERS[:20]:
                        key = history_key("history", user)
                        source = cluster.node_of(key)
                        target = (source + 1) % 3
                        pause = partial(time.sleep, 0.005)
                        slot = key_slot(key)
                        cluster.move_slot(slot, source=source, target=target, halfway=pause)
                        cluster.move_slot(slot, source=target, target=source, halfway=pause)
                except Exception as error:  # noqa: BLE001  # told below
                    errors.append(error)
                finally:
                    moved.set()

            thread = threading.Thread(target=move)
            thread.start()
            n_reads = 0
            while not moved.is_set():
                assert await store.fetch([*USERS, "nobody"], KEEP) == [*HISTORIES.values(), b""]
                n_reads += 1
                outcome = await writer.append({"writer": records((n_reads, NOW + n_reads))})
                assert outcome == {"writer": Appended(count=1)}
                await asyncio.sleep(0)
            thread.join()
            assert not errors
            assert n_reads > 20
            assert await store.fetch(["writer"], 1) == [records((n_reads, NOW + n_reads))]

    async def test_a_key_that_has_moved_is_read_where_it_is_while_its_slot_is_moving(self, cluster):
        async with open_store(cluster.url) as store:
            await fill(store, HISTORIES)
            key = history_key("history", USERS[0])
            source = cluster.node_of(key)
            target = (source + 1) % 3
            ids = [cluster.command(n, "CLUSTER MYID").decode() for n in (source, target)]
            slot = key_slot(key)
            cluster.command(target, "CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
            cluster.command(source, "CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
            assert await store.fetch(USERS, KEEP) == list(HISTORIES.values())
            port = cluster.nodes[target].port
            cluster.command(source, "MIGRATE", "127.0.0.1", port, key, 0, 5000)
            assert await store.fetch(USERS, KEEP) == list(HISTORIES.values())
            assert await store.append({USERS[0]: records((7, NOW + 7))}) == {
                USERS[0]: Appended(count=1)
            }
            (found,) = await store.fetch([USERS[0]], 1)
            assert found == records((7, NOW + 7))
            for node in (target, source):
                cluster.command(node, "CLUSTER SETSLOT", slot, "NODE", ids[1])
            assert await store.fetch([USERS[0]], 1) == [records((7, NOW + 7))]
            cluster.move_slot(slot, source=target, target=source)


class TestFailover:
    async def test_a_replica_takes_the_place_of_a_dead_primary(self):
        with redis_cluster(3, 3) as cluster:
            async with open_store(cluster.url, timeout_s=0.5) as store:
                await fill(store, HISTORIES)
                for number in range(3):  # acknowledged by its replica, too
                    assert cluster.command(number, "WAIT", 1, 5000) == 1
                cluster.nodes[0].kill()
                await until_it_answers(store, HISTORIES)
                assert (await store.append({u: records((9, NOW + 9)) for u in USERS})) == {
                    u: Appended(count=1) for u in USERS
                }

    async def test_a_paused_primary_is_replaced_too(self):
        with redis_cluster(3, 3) as cluster:
            async with open_store(cluster.url, timeout_s=0.5) as store:
                await fill(store, HISTORIES)
                for number in range(3):
                    assert cluster.command(number, "WAIT", 1, 5000) == 1
                cluster.nodes[1].send_signal(signal.SIGSTOP)
                await until_it_answers(store, HISTORIES)

    async def test_sentinels_name_another_primary(self):
        with redis_sentinels("shop") as (primary, url):
            async with open_store(url, timeout_s=0.5) as store:
                await fill(store, HISTORIES)
                with Redis(port=primary.port) as client:
                    assert client.wait(1, 5000) == 1
                primary.kill()
                await until_it_answers(store, HISTORIES)
                assert await store.append({"ann": records((1, NOW))}) == {"ann": Appended(count=1)}
