"""Each way in which one Redis fails: what a call says, and what the policy makes of it by HTTP."""

import asyncio
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from redis import Redis
from redis.asyncio import ConnectionPool

from loadtest.redis_cluster import port_with_bus
from loadtest.redis_server import RedisProcess, free_port, redis_process
from service.breaker import MAX_FAILURES, BreakerState
from service.errors import HistoryUnavailableError
from service.history import Appended
from service.metrics import Metrics
from service.redis_nodes import Patience, RedisNodes, _Lane, _OneNode
from service.redis_url import read_redis_url
from tests.service.dummy_model import score_of
from tests.service.histories import NOW, records
from tests.service.problem_answers import assert_retry
from tests.service.proxies import proxy
from tests.service.redis_stores import fill, open_store, some_histories, until_it_answers

HISTORIES = some_histories(5)
USERS = list(HISTORIES)
BREAKER = {"name": "mneme_redis_breaker_state", "node": "primary", "operation": "fetch"}


@contextmanager
def away() -> Iterator[str]:
    """Nobody listens there."""
    yield f"redis://127.0.0.1:{free_port()}/0"


@contextmanager
def silent() -> Iterator[str]:
    """It takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"redis://127.0.0.1:{server.getsockname()[1]}/0"


@contextmanager
def paused() -> Iterator[str]:
    with redis_process() as process:
        process.send_signal(signal.SIGSTOP)
        yield process.url


@contextmanager
def with_password() -> Iterator[str]:
    with redis_process(None, "--requirepass", "s3cret") as process:
        yield process.url


@contextmanager
def wrong_password() -> Iterator[str]:
    with redis_process(None, "--requirepass", "s3cret") as process:
        yield process.url.replace("://", "://:wr0ng@")


@contextmanager
def without_its_primary() -> Iterator[str]:
    """A replica that has lost its primary, and has been told to give no stale data."""
    with redis_process(
        None,
        *("--replicaof", "127.0.0.1", str(free_port()), "--replica-serve-stale-data", "no"),
    ) as process:
        yield process.url


@contextmanager
def cluster_without_slots() -> Iterator[str]:
    with redis_process(port_with_bus(), "--cluster-enabled", "yes") as process:
        yield process.url


@contextmanager
def cluster_that_is_away() -> Iterator[str]:
    yield f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{free_port()}"


@contextmanager
def sentinels_that_are_away() -> Iterator[str]:
    yield f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/shop"


@contextmanager
def without_rights() -> Iterator[str]:
    with redis_process(config="user mneme on nopass ~* +ping\n") as process:
        yield process.url.replace("://", "://mneme:any@")


FAULTS = [
    pytest.param(away, "ConnectionError", id="away"),
    pytest.param(silent, "TimeoutError", id="silent"),
    pytest.param(paused, "TimeoutError", id="paused"),
    pytest.param(with_password, "AuthenticationError", id="NOAUTH"),
    pytest.param(wrong_password, "AuthenticationError", id="WRONGPASS"),
    pytest.param(without_rights, "NoPermissionError", id="NOPERM"),
    pytest.param(without_its_primary, "MasterDownError", id="MASTERDOWN"),
    pytest.param(cluster_without_slots, "ClusterDownError", id="CLUSTERDOWN"),
    pytest.param(cluster_that_is_away, "no node of the Redis cluster", id="cluster away"),
    pytest.param(sentinels_that_are_away, "MasterNotFoundError", id="sentinels away"),
]


@pytest.mark.parametrize(("fault", "name"), FAULTS)
async def test_a_call_ends_in_its_time_and_says_why(fault, name):
    with fault() as url:
        async with open_store(url, timeout_s=0.5) as store:
            began = time.monotonic()
            for one in await store.fetch(USERS, 8, timeout_s=0.3):
                assert isinstance(one, HistoryUnavailableError)
                assert name in one.detail
            with pytest.raises(HistoryUnavailableError, match=name):
                await store.append({"ann": records((1, NOW))})
            # A second is for the machine: the calls themselves may take 0.3 and 0.5.
            assert time.monotonic() - began < 0.3 + 0.5 + 1.0


@pytest.mark.parametrize(("fault", "_name"), FAULTS)
@pytest.mark.parametrize("policy", ["refuse", "cold"])
def test_the_policy_holds_in_each_fault(serve, fault, _name, policy):
    """For scores; behaviors that are not stored must not look as if they were, by any policy."""
    with fault() as url:
        service = serve(redis_url=url, on_redis_failure=policy, redis_timeout_s=0.05)
        for _ in range(2 * MAX_FAILURES):  # the breaker opens on the way
            answer = service.score("ann", [3, 1])
            if policy == "refuse":
                assert_retry(answer, 503, "history-unavailable")
            else:
                assert answer.json()["scores"] == [score_of(3), score_of(1)]
                assert answer.json()["degraded"] is True
        assert_retry(service.events(("ann", 1, NOW)), 503, "history-unavailable")
        given = service.score("ann", [1], ranking_time=NOW, history=[{"item_id": 5, "time": NOW}])
        assert given.json()["scores"] == [score_of(1, behaviors=1, oldest=5)]
        assert service.metric("mneme_redis_failures_total", operation="fetch") == 2 * MAX_FAILURES


async def test_a_redis_that_reads_its_file_is_away_until_it_has(tmp_path):
    slow = ("--rdbcompression", "no", "--key-load-delay", "100000")  # microseconds
    process = RedisProcess(free_port(), tmp_path, *slow)
    process.start()
    try:
        async with open_store(process.url, timeout_s=1.0) as store:
            await fill(store, HISTORIES)
            with Redis(port=process.port) as client:
                # While it reads, it answers after each 2 MB only.
                client.mset({f"ballast {n}": b"x" * 2**20 for n in range(20)})
                client.save()
            process.kill()
            process.start()
            (one,) = await store.fetch(["ann"], 8)
            assert isinstance(one, HistoryUnavailableError)
            assert one.detail == "Redis did not answer: BusyLoadingError"
            await until_it_answers(store, HISTORIES)
    finally:
        process.stop()


class TestWrites:
    async def test_memory_that_is_full_refuses_writes_and_gives_reads(self):
        with redis_process() as process, Redis(port=process.port) as client:
            async with open_store(process.url) as store:
                await fill(store, HISTORIES)
                client.config_set("maxmemory", 1)
                for _ in range(2 * MAX_FAILURES):
                    with pytest.raises(HistoryUnavailableError, match="used memory > 'maxmemory'"):
                        await store.append({"ann": records((1, NOW))})
                assert await store.fetch(USERS, 8) == list(HISTORIES.values())
                assert store.counted(**BREAKER) == BreakerState.CLOSED

    async def test_a_primary_that_became_a_replica_refuses_writes_and_gives_reads(self):
        with redis_process() as process, Redis(port=process.port) as client:
            async with open_store(process.url) as store:
                await fill(store, HISTORIES)
                client.replicaof("127.0.0.1", free_port())
                for _ in range(2 * MAX_FAILURES):
                    with pytest.raises(HistoryUnavailableError, match="ReadOnlyError"):
                        await store.append({"ann": records((1, NOW))})
                assert await store.fetch(USERS, 8) == list(HISTORIES.values())
                assert store.counted(**BREAKER) == BreakerState.CLOSED
                client.replicaof("NO", "ONE")
                assert await store.append({"ann": records((1, NOW))}) == {"ann": Appended(count=1)}


class TestBreaker:
    async def test_a_paused_redis_is_left_alone_and_found_again(self):
        with redis_process() as process:
            async with open_store(process.url, timeout_s=0.3) as store:
                await fill(store, HISTORIES)
                process.send_signal(signal.SIGSTOP)
                for _ in range(MAX_FAILURES):
                    (one,) = await store.fetch(["ann"], 8)
                    assert isinstance(one, HistoryUnavailableError)
                    assert "TimeoutError" in one.detail
                assert store.counted(**BREAKER) == BreakerState.OPEN
                (one,) = await store.fetch(["ann"], 8)
                assert isinstance(one, HistoryUnavailableError)
                assert one.detail == "Redis did not answer lately, and is left alone for a moment"
                process.send_signal(signal.SIGCONT)
                await until_it_answers(store, HISTORIES)
                assert store.counted(**BREAKER) == BreakerState.CLOSED

    async def test_a_probe_whose_caller_has_left_keeps_nobody_out(self):
        with redis_process() as process:
            async with open_store(process.url, timeout_s=1.0) as store:
                await fill(store, HISTORIES)
                process.send_signal(signal.SIGSTOP)
                for _ in range(MAX_FAILURES):
                    await store.fetch(["ann"], 8, timeout_s=0.1)
                while store.counted(**BREAKER) != BreakerState.HALF_OPEN:
                    probe = asyncio.create_task(store.fetch(["ann"], 8, timeout_s=0.1))
                    await asyncio.sleep(0.02)
                probe.cancel()
                await asyncio.gather(probe, return_exceptions=True)
                process.send_signal(signal.SIGCONT)
                await until_it_answers(store, HISTORIES, timeout_s=0.1)

    async def test_those_who_have_time_keep_it_neither_closed_nor_open(self, logged):
        """Or each read that has little would go on to be waited for in vain."""
        with redis_process() as process:
            async with (
                proxy(process.port, delay_s=0.1) as port,
                open_store(f"redis://127.0.0.1:{port}/0", timeout_s=30.0) as store,
            ):
                for n in range(2 * MAX_FAILURES):
                    assert await store.append({"ann": records((n + 1, NOW))})
                    await store.fetch(["ann"], 8, timeout_s=0.02)
                (event,) = logged.events("redis-away")
                assert (event["operation"], event["within_s"]) == ("fetch", 0.02)
                assert store.counted(**BREAKER) == BreakerState.OPEN
                assert store.counted(**{**BREAKER, "operation": "append"}) == BreakerState.CLOSED
                assert await store.fetch(["bob"], 8) == [b""]
                assert store.counted(**BREAKER) == BreakerState.OPEN

    async def test_it_is_told_once_that_redis_is_away_and_that_it_is_back(self, logged):
        with redis_process() as process:
            async with open_store(process.url, timeout_s=0.5) as store:
                await fill(store, HISTORIES)
                process.stop()
                for _ in range(4 * MAX_FAILURES):
                    await store.fetch(["ann"], 8)
                process.start()
                await until_it_answers(store, {"ann": b""})
        (event,) = logged.events("redis-away")
        assert (event["node"], event["reason"]) == ("primary", "ConnectionError")
        (event,) = logged.events("redis-back")
        assert event["node"] == "primary"
        assert event["away_s"] > 0


async def eventually(store, *, timeout_s: float) -> bool:
    """Return whether a history is read at last, each time within seconds that are told."""
    for _ in range(100):
        if await store.fetch(["ann"], 8, timeout_s=timeout_s) == [b""]:
            return True
        await asyncio.sleep(0.02)
    return False


class TestConnections:
    async def test_nothing_is_asked_for_nobody(self, away_url):
        async with open_store(away_url) as store:
            assert await store.append({}) == {}
            assert await store.fetch([], 8) == []

    async def test_a_restart_costs_no_call_and_is_counted_as_a_repetition(self):
        with redis_process() as process:
            async with open_store(process.url) as store:
                await asyncio.gather(*(store.fetch(["ann"], 8) for _ in range(5)))
                process.stop()
                process.start()
                assert await store.append({"ann": records((1, NOW))}) == {"ann": Appended(count=1)}
                found = await asyncio.gather(*(store.fetch(["ann"], 8) for _ in range(5)))
                assert found == [[records((1, NOW))]] * 5

    async def test_what_came_too_late_is_never_the_answer_to_another_question(self):
        """A reply that is still on its way when its call is given up must be thrown away."""
        with redis_process() as process, Redis(port=process.port) as client:
            async with open_store(process.url) as store:
                await fill(store, HISTORIES)
                for _ in range(20):
                    client.execute_command("CLIENT PAUSE", 20)
                    await store.fetch(USERS[:1], 8, timeout_s=0.005)
                    cancelled = asyncio.create_task(store.fetch(USERS[1:3], 8))
                    await asyncio.sleep(0.002)
                    cancelled.cancel()
                    assert await store.fetch(USERS[3:], 8) == [HISTORIES[u] for u in USERS[3:]]

    async def test_a_connection_that_takes_long_is_there_for_the_next_call(self):
        with redis_process() as process:
            # To greet and to choose the database takes an answer, and so does the question.
            async with (
                proxy(process.port, delay_s=0.2) as port,
                open_store(f"redis://127.0.0.1:{port}/1") as store,
            ):
                (one,) = await store.fetch(["ann"], 8, timeout_s=0.1)
                assert isinstance(one, HistoryUnavailableError)
                assert await eventually(store, timeout_s=0.35)

    async def test_as_many_calls_wait_at_once_as_are_made(self):
        """Also more than redis-py's pools let pass by themselves, 100."""
        with redis_process() as process:
            async with open_store(process.url) as store:
                process.send_signal(signal.SIGSTOP)
                calls = [asyncio.create_task(store.fetch(["ann"], 8)) for _ in range(150)]
                await asyncio.sleep(0.05)
                process.send_signal(signal.SIGCONT)
                assert await asyncio.gather(*calls) == [[b""]] * 150

    async def test_a_bound_of_the_operators_is_no_failure_of_redis(self):
        with redis_process() as process:
            async with open_store(f"{process.url}?max_connections=2") as store:
                process.send_signal(signal.SIGSTOP)
                waiting = {asyncio.create_task(store.fetch(["ann"], 8)) for _ in range(20)}
                while len(waiting) > 2:
                    done, waiting = await asyncio.wait(waiting, return_when="FIRST_COMPLETED")
                    for call in done:
                        (one,) = call.result()
                        assert isinstance(one, HistoryUnavailableError)
                        assert one.detail == "Redis did not answer: MaxConnectionsError"
                assert store.counted(**BREAKER) == BreakerState.CLOSED
                process.send_signal(signal.SIGCONT)
                assert await asyncio.gather(*waiting) == [[b""]] * 2

    async def test_those_who_ask_at_once_whether_it_answers_share_a_connection(self):
        with redis_process() as process, Redis(port=process.port) as client:
            async with open_store(process.url) as store:
                assert await asyncio.gather(*(store.is_ready() for _ in range(50))) == [True] * 50
                assert len(client.client_list()) == 2  # the test's own, and the one
                process.stop()
                assert not await store.is_ready()

    async def test_one_who_leaves_while_others_ask_whether_it_answers_takes_nothing_from_them(self):
        with redis_process() as process, Redis(port=process.port) as client:
            async with open_store(process.url) as store:
                client.execute_command("CLIENT PAUSE", 100)
                first, second = (asyncio.create_task(store.is_ready()) for _ in range(2))
                await asyncio.sleep(0.01)
                first.cancel()
                assert await second
                assert first.cancelled()


class TestRest:
    async def test_a_call_from_before_it_tells_nothing_of_the_node(self, logged):
        """A node that has left the cluster would stay open for good."""
        with silent() as url:
            metrics = Metrics()
            options = read_redis_url(url).async_options(timeout_s=0.2, password_file=None)
            lane = _Lane("node", ConnectionPool(**options), connect_timeout_s=0.2, metrics=metrics)
            nodes = RedisNodes(_OneNode(lane, None), timeout_s=0.2, metrics=metrics)
            asked = [(None, (b"PING\r\n",))]
            calls = [
                asyncio.create_task(nodes.ask(asked, operation="fetch"))
                for _ in range(MAX_FAILURES)
            ]
            await asyncio.sleep(0.01)
            await lane.rest()
            for (outcome,) in await asyncio.gather(*calls):
                assert isinstance(outcome, HistoryUnavailableError)
            state = metrics.registry.get_sample_value(
                "mneme_redis_breaker_state", {"node": "node", "operation": "fetch"}
            )
            assert state == BreakerState.CLOSED
            await nodes.close()
        assert logged.events("redis-away") == []


class TestPatience:
    async def test_it_is_up_at_its_time(self):
        loop = asyncio.get_running_loop()
        with pytest.raises(TimeoutError):
            async with Patience(loop.time() + 0.01):
                await asyncio.sleep(60.0)

    async def test_what_is_done_in_time_is_left_alone(self):
        async with Patience(asyncio.get_running_loop().time() + 60.0):
            await asyncio.sleep(0)

    async def test_what_arrived_while_the_loop_stood_still_is_read(self):
        ours, theirs = socket.socketpair()
        with theirs:
            reader, writer = await asyncio.open_connection(sock=ours)
            async with Patience(asyncio.get_running_loop().time() + 0.01):
                reading = asyncio.create_task(reader.readexactly(4))
                await asyncio.sleep(0)
                theirs.sendall(b"here")
                time.sleep(0.05)  # noqa: ASYNC251  # the loop stands still
                assert await reading == b"here"
            writer.close()
            await writer.wait_closed()
