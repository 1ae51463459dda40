"""Asks Redis: one server, the primary that sentinels name, or the nodes of a cluster.

redis-py makes the connections and finds the nodes. What is sent is packed already, many commands at
once: one round trip for each node, without redis-py's work for each command and reply.

Every call has a time within which it must end. What fails at once (a connection that a restarted
Redis has closed) is repeated within it, after a moment; so only what may be done twice is asked.
A node that fails again and again is left alone by a circuit breaker. Each operation has its own,
and so has each time within which calls must end: a node that is too slow for the few milliseconds
of a score may well be fast enough for an append.
"""

import asyncio
import logging
import math
import random
import time
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hiredis import pack_command
from redis.asyncio import ConnectionPool, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    AuthenticationError,
    BusyLoadingError,
    ClusterDownError,
    MaxConnectionsError,
    MovedError,
    ReadOnlyError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError

from service.breaker import BreakerState, CircuitBreaker
from service.errors import HistoryUnavailableError
from service.logs import log_event
from service.redis_url import read_redis_url, sentinel_options, takes_tls

if TYPE_CHECKING:
    from service.metrics import Metrics

_log = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
Operation = Literal["fetch", "append"]
# What is done, and the seconds within which it must be.
_Kind = tuple[Operation, float]
# A key, None where any node will do, and the packed commands that concern it.
Asked = tuple[bytes | None, Sequence[bytes]]
# The replies, in the order of the commands, those that are errors too; or no replies.
Replies = list[Any] | HistoryUnavailableError

_MAX_REPETITIONS = 2
# A repetition waits for a random part of so long, and the second for twice as much.
_PAUSE_S: Mapping[Operation, float] = {"fetch": 0.002, "append": 0.02}
# Each call takes a connection of its own: who calls bounds their number. redis-py would, at 100.
_MAX_CONNECTIONS = 2**31
# A slot that moves answers by redirections; two that move at once need some of them.
_MAX_REDIRECTIONS = 8
# Between two looks at a cluster's topology.
_TOPOLOGY_PAUSE_S = 0.25
# A loop that is so late has stood still: nothing that arrived meanwhile has been read.
_LATE_S = 0.002
_FAILURES = (RedisError, RedisClusterException, OSError)
_NOWHERE = "no node of the Redis cluster is known to have the key"
_IS_MOVING = "the key was on the move from one node of the Redis cluster to another"
_LEFT_ALONE = "Redis did not answer lately, and is left alone for a moment"
_PING = pack_command(("PING",))
_ASKING = pack_command(("ASKING",))


class Patience:
    """Like `asyncio.timeout_at`, for a time on the clock of the running loop.

    A loop that stood still runs its timers before it reads its sockets, so the time would be up for
    an answer that has long been there: such a loop gets another moment, once.
    """

    def __init__(self, until: float) -> None:
        self._until = until
        self._timeout = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._until, self._expire, loop)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        await self._timeout.__aexit__(kind, error, trace)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now = loop.time()
        self._timeout.reschedule(now + _LATE_S if now - self._until > _LATE_S else now)


@dataclass(frozen=True, slots=True)
class _Call:
    """What is asked of one node or several: its kind, and the time of the loop when it must end."""

    kind: _Kind
    until: float

    @property
    def operation(self) -> Operation:
        return self.kind[0]


class _Lane:
    """The way to one node: its connections, and its breakers."""

    def __init__(
        self, name: str, pool: ConnectionPool, *, connect_timeout_s: float, metrics: "Metrics"
    ) -> None:
        self._name = name
        self._pool = pool
        self._connect_timeout_s = connect_timeout_s
        self._states = {
            operation: metrics.redis_breaker_state.labels(name, operation) for operation in _PAUSE_S
        }
        self._breakers: dict[_Kind, CircuitBreaker] = {}
        # Since when those are open that are.
        self._opened: dict[_Kind, float] = {}
        self._connecting: set[asyncio.Task[AbstractConnection]] = set()
        self._releasing: set[asyncio.Task[None]] = set()
        self._show_closed()

    def breaker(self, kind: _Kind) -> CircuitBreaker:
        """Return the breaker of calls of one kind."""
        breaker = self._breakers.get(kind)
        if breaker is None:
            breaker = self._breakers[kind] = self._new_breaker(kind)
        return breaker

    async def exchange(self, commands: bytes, n_replies: int, until: float) -> list[Any]:
        """Send commands and return the replies, errors in their places, by a time of the loop.

        Raises what redis-py raises, or OSError; the connection is closed then.
        """
        async with Patience(until):
            connection = await self._connection(until)
            try:
                await connection.send_packed_command(commands, check_health=False)
                replies = await _replies(connection, n_replies)
                if _is_read_only(replies[0]):
                    # It was the primary when this connection was made.
                    raise ReadOnlyError
            except BaseException:
                # What it has not answered yet must not be taken for the next answer.
                await connection.disconnect(nowait=True)
                raise
            finally:
                await self._pool.release(connection)
        return replies

    async def rest(self) -> None:
        """Close what is open: there is nothing to ask for at present."""
        self._breakers.clear()
        self._opened.clear()
        self._show_closed()
        await self._pool.disconnect()

    async def close(self) -> None:
        """Close all connections."""
        for task in (*self._connecting, *self._releasing):
            task.cancel()
        await asyncio.gather(*self._connecting, *self._releasing, return_exceptions=True)
        self._show_closed()
        await self._pool.aclose()

    async def _connection(self, until: float) -> AbstractConnection:
        connection: AbstractConnection = self._pool.get_available_connection()  # type: ignore[no-untyped-call]
        if connection.is_connected:
            with suppress(RedisError, OSError):
                # Whatever there is to be read, its end for one, is no answer of ours.
                if not await connection.can_read():
                    return connection
            await connection.disconnect(nowait=True)
        # It goes on when the caller's time is up, which may be too short for it: the next caller
        # finds it done.
        loop = asyncio.get_running_loop()
        half = (loop.time() + until) / 2
        task = asyncio.create_task(self._connect(connection))
        self._connecting.add(task)
        task.add_done_callback(self._connecting.discard)
        try:
            connection = await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._keep)
            raise
        if loop.time() > half:
            # What is left may be too short for an answer, and then the connection would be lost.
            await self._pool.release(connection)
            raise TimeoutError
        return connection

    async def _connect(self, connection: AbstractConnection) -> AbstractConnection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await connection.connect()  # type: ignore[no-untyped-call]
            # From here on, `exchange` looks at the clock.
            connection.socket_timeout = None
        except BaseException:
            await connection.disconnect(nowait=True)
            await self._pool.release(connection)
            raise
        return connection

    def _keep(self, task: "asyncio.Task[AbstractConnection]") -> None:
        if not task.cancelled() and task.exception() is None:
            releasing = asyncio.ensure_future(self._pool.release(task.result()))
            self._releasing.add(releasing)
            releasing.add_done_callback(self._releasing.discard)

    def _new_breaker(self, kind: _Kind) -> CircuitBreaker:
        def tell(state: BreakerState, reason: str) -> None:
            # A call that began before a rest still counts for the breaker of that time.
            if self._breakers.get(kind) is breaker:
                self._tell(kind, state, reason)

        breaker = CircuitBreaker(on_change=tell)
        return breaker

    def _show_closed(self) -> None:
        for state in self._states.values():
            state.set(BreakerState.CLOSED)

    def _tell(self, kind: _Kind, state: BreakerState, reason: str) -> None:
        operation, limit_s = kind
        self._states[operation].set(
            max(one.state for (of, _), one in self._breakers.items() if of == operation)
        )
        now = time.monotonic()
        told: dict[str, Any] = {
            "node": self._name,
            "operation": operation,
            "within_s": limit_s,
        }
        if state is BreakerState.CLOSED:
            away_s = round(now - self._opened.pop(kind, now), 3)
            log_event(_log, logging.INFO, "redis-back", **told, away_s=away_s)
        elif state is BreakerState.OPEN and kind not in self._opened:
            self._opened[kind] = now
            log_event(_log, logging.WARNING, "redis-away", **told, reason=reason)


class _OneNode:
    """One server, or the primary that the sentinels name whenever a connection is made.

    Its methods are those of `_Cluster`.
    """

    def __init__(self, lane: _Lane, sentinel: Sentinel | None) -> None:
        self.lane = lane
        self._sentinel = sentinel

    def lanes(self) -> Sequence[_Lane]:
        """Return the one."""
        return (self.lane,)

    async def find(self, until: float) -> None:
        del until

    def suspect(self) -> None:
        pass

    async def close(self) -> None:
        await self.lane.close()
        if self._sentinel is not None:
            await self._sentinel.aclose()


class _Cluster:
    """The primaries of a cluster. redis-py's client asks for the topology, and for nothing else."""

    def __init__(
        self,
        hosts: Sequence[tuple[str, int]],
        options: Mapping[str, Any],
        *,
        timeout_s: float,
        metrics: "Metrics",
    ) -> None:
        self._hosts = hosts
        self._options = dict(options)
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._client = self._new_client()
        # Each node that has ever been one, by its address; those that have slots; the node of each.
        self._known: dict[str, _Lane] = {}
        self._primaries: tuple[_Lane, ...] = ()
        self._of_slot: dict[int, _Lane] = {}
        self._looking: asyncio.Task[None] | None = None
        self._look_from = 0.0

    def lane(self, key: bytes | None) -> _Lane | None:
        """Return the node of a key, or any for None; None where nobody is known to have it."""
        if key is None:
            return random.choice(self._primaries) if self._primaries else None  # noqa: S311
        return self._of_slot.get(key_slot(key))

    def lanes(self) -> Sequence[_Lane]:
        """Return all nodes that have keys."""
        return self._primaries

    async def find(self, until: float) -> None:
        """Learn of the nodes, by a time of the loop."""
        self.suspect()
        if self._looking is not None:
            with suppress(TimeoutError):
                async with Patience(until):
                    await asyncio.shield(self._looking)

    def suspect(self) -> None:
        """Look again, in the background: a node has failed."""
        if self._looking is None and time.monotonic() >= self._look_from:
            self._looking = asyncio.create_task(self._look())

    def moved(self, error: MovedError) -> None:
        """Learn that a slot is somewhere else now."""
        self._of_slot[error.slot_id] = lane = self._lane_at(error.host, error.port)
        if lane not in self._primaries:
            self._primaries = (*self._primaries, lane)

    def redirected(self, error: AskError) -> _Lane:
        """Return the node that a key is just moving to."""
        return self._lane_at(error.host, error.port)

    async def close(self) -> None:
        """Close all connections."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.gather(self._looking, return_exceptions=True)
        await _close_client(self._client)
        for lane in self._known.values():
            await lane.close()

    async def _look(self) -> None:
        manager = self._client.nodes_manager
        try:
            await manager.initialize()
        except _FAILURES as error:
            log_event(_log, logging.DEBUG, "redis-topology-unknown", reason=type(error).__name__)
            # None of the nodes it knew of answers: the next look begins with those of the URL.
            client, self._client = self._client, self._new_client()
            await _close_client(client)
        else:
            self._of_slot = {
                slot: self._lane_at(nodes[0].host, int(nodes[0].port))
                for slot, nodes in manager.slots_cache.items()
            }
            former, self._primaries = self._primaries, tuple(set(self._of_slot.values()))
            for lane in set(former).difference(self._primaries):
                await lane.rest()
        finally:
            self._look_from = time.monotonic() + _TOPOLOGY_PAUSE_S
            self._looking = None

    def _lane_at(self, host: str, port: int) -> _Lane:
        name = f"{host}:{port}"
        lane = self._known.get(name)
        if lane is None:
            lane = self._known[name] = _Lane(
                name,
                ConnectionPool(**self._options, host=host, port=port),
                connect_timeout_s=self._timeout_s,
                metrics=self._metrics,
            )
        return lane

    def _new_client(self) -> RedisCluster:
        options = dict(self._options)
        return RedisCluster(
            startup_nodes=[ClusterNode(host, port) for host, port in self._hosts],
            # A slot that nobody has is no reason to leave the others alone.
            require_full_coverage=False,
            ssl=takes_tls(options),
            **options,
        )


class RedisNodes:
    """The nodes with the histories, as `connect` finds them.

    `timeout_s`: within which every call ends.
    """

    def __init__(
        self, topology: _OneNode | _Cluster, *, timeout_s: float, metrics: "Metrics"
    ) -> None:
        self._topology = topology
        self._timeout_s = timeout_s
        self._retries = {
            operation: metrics.redis_retries.labels(operation) for operation in _PAUSE_S
        }
        self._pinging: asyncio.Task[bool] | None = None

    async def ask(
        self, asked: Sequence[Asked], *, operation: Operation, timeout_s: float = math.inf
    ) -> list[Replies]:
        """Return the replies to each of `asked`, or why there are none.

        One round trip for each node, and more where slots move or connections are lost. Whatever is
        asked may reach Redis twice. `timeout_s`: where less than what the nodes were made with.
        """
        if not asked:
            return []
        limit_s = min(self._timeout_s, timeout_s)
        until = asyncio.get_running_loop().time() + limit_s
        call = _Call((operation, limit_s), until)
        topology = self._topology
        if isinstance(topology, _OneNode):
            commands = [of_key for _, of_key in asked]
            return await self._ask_lane(topology.lane, commands, call)
        if not topology.lanes():
            await topology.find(until)
        outcome: list[Replies] = [HistoryUnavailableError(_NOWHERE)] * len(asked)
        # What is left to be asked, and the node that a redirection has named.
        left: dict[int, _Lane | None] = dict.fromkeys(range(len(asked)))
        for _ in range(1 + _MAX_REDIRECTIONS):
            ways: dict[tuple[_Lane, bool], list[int]] = {}
            for n, named in left.items():
                lane = named or topology.lane(asked[n][0])
                if lane is None:
                    outcome[n] = HistoryUnavailableError(_NOWHERE)
                    topology.suspect()
                else:
                    ways.setdefault((lane, named is not None), []).append(n)
            found = await _gathered(
                [
                    self._ask_lane(lane, [asked[n][1] for n in places], call, is_named=is_named)
                    for (lane, is_named), places in ways.items()
                ]
            )
            for places, replies in zip(ways.values(), found, strict=True):
                for n, one in zip(places, replies, strict=True):
                    outcome[n] = one
            left, must_wait = _redirections(topology, outcome, left)
            if not left:
                return outcome
            if must_wait and not await self._pause(call, 0):
                break
        for n in left:
            outcome[n] = HistoryUnavailableError(_IS_MOVING)
        return outcome

    async def is_up(self) -> bool:
        """Return whether Redis answers: any of its nodes. Who asks meanwhile hears the same."""
        if self._pinging is None or self._pinging.done():
            self._pinging = asyncio.create_task(self._ping())
        return await asyncio.shield(self._pinging)

    async def close(self) -> None:
        """Close all connections."""
        if self._pinging is not None:
            self._pinging.cancel()
            await asyncio.gather(self._pinging, return_exceptions=True)
        await self._topology.close()

    async def _ping(self) -> bool:
        until = asyncio.get_running_loop().time() + self._timeout_s
        if not self._topology.lanes():
            await self._topology.find(until)
        return any(await _gathered([_is_up(lane, until) for lane in self._topology.lanes()]))

    async def _ask_lane(
        self,
        lane: _Lane,
        commands: Sequence[Sequence[bytes]],
        call: _Call,
        *,
        is_named: bool = False,
    ) -> list[Replies]:
        if not lane.breaker(call.kind).allows():
            self._topology.suspect()
            return [HistoryUnavailableError(_LEFT_ALONE)] * len(commands)
        flat = [command for some in commands for command in some]
        if is_named:
            # The node takes part in a move: it answers for keys that are there only when told so.
            replies = await self._exchange(
                lane, b"".join(_ASKING + command for command in flat), 2 * len(flat), call
            )
            if isinstance(replies, list):
                replies = replies[1::2]
        else:
            replies = await self._exchange(lane, b"".join(flat), len(flat), call)
        if isinstance(replies, HistoryUnavailableError):
            return [replies] * len(commands)
        each = iter(replies)
        return [list(islice(each, len(some))) for some in commands]

    async def _exchange(self, lane: _Lane, commands: bytes, n_replies: int, call: _Call) -> Replies:
        breaker = lane.breaker(call.kind)
        try:
            outcome = await self._repeated(lane, commands, n_replies, call)
        except BaseException:
            breaker.gave_up()
            raise
        if isinstance(outcome, list):
            breaker.succeeded()
            return outcome
        self._topology.suspect()
        if isinstance(outcome, ReadOnlyError | MaxConnectionsError):
            breaker.gave_up()  # it can be read; Redis was not even asked
        else:
            breaker.failed(type(outcome).__name__)
        return HistoryUnavailableError(f"Redis did not answer: {type(outcome).__name__}")

    async def _repeated(
        self, lane: _Lane, commands: bytes, n_replies: int, call: _Call
    ) -> list[Any] | Exception:
        """Return the replies, or the last failure."""
        for repetition in count():
            try:
                replies = await lane.exchange(commands, n_replies, call.until)
            except (AuthenticationError, BusyLoadingError) as error:
                return error  # both are lost connections to redis-py
            except (RedisConnectionError, ReadOnlyError) as error:
                if repetition == _MAX_REPETITIONS or not await self._pause(call, repetition):
                    return error
            except _FAILURES as error:
                return error
            else:
                # MASTERDOWN is a kind of it.
                return replies[0] if isinstance(replies[0], ClusterDownError) else replies
        raise AssertionError("unreachable")

    async def _pause(self, call: _Call, repetition: int) -> bool:
        """Wait for a moment; return whether there is time for that and for more."""
        pause_s = random.uniform(0.0, _PAUSE_S[call.operation] * 2**repetition)  # noqa: S311
        if asyncio.get_running_loop().time() + pause_s >= call.until:
            return False
        self._retries[call.operation].inc()
        await asyncio.sleep(pause_s)
        return True


def connect(
    url: str,
    *,
    timeout_s: float,
    password_file: Path | None = None,
    metrics: "Metrics | None" = None,
) -> RedisNodes:
    """Return the nodes that a URL of `service.redis_url` names; every call ends in `timeout_s`.

    Connections are made when they are first needed: Redis may be away at the start. `metrics`:
    where repetitions and breakers are counted. Raises ValueError for a URL that is none.
    """
    if metrics is None:
        # Only here: the processes' folder of metrics must be known before it is imported.
        from service.metrics import Metrics

        metrics = Metrics()
    address = read_redis_url(url)
    options = {
        "max_connections": _MAX_CONNECTIONS,
        **address.async_options(timeout_s=timeout_s, password_file=password_file),
    }
    topology: _OneNode | _Cluster
    if address.kind == "cluster":
        options.pop("db", None)
        topology = _Cluster(address.hosts, options, timeout_s=timeout_s, metrics=metrics)
    elif address.kind == "sentinel":
        tls = takes_tls(options)
        sentinel = Sentinel(  # type: ignore[no-untyped-call]
            address.hosts, sentinel_kwargs=sentinel_options(address, options, tls=tls)
        )
        pool = SentinelConnectionPool(address.service, sentinel, ssl=tls, **options)  # type: ignore[no-untyped-call]
        # Each of the sentinels may keep it waiting, and then the primary.
        longest_s = timeout_s * (1 + len(address.hosts))
        lane = _Lane(address.service, pool, connect_timeout_s=longest_s, metrics=metrics)
        topology = _OneNode(lane, sentinel)
    else:
        lane = _Lane(
            "primary", ConnectionPool(**options), connect_timeout_s=timeout_s, metrics=metrics
        )
        topology = _OneNode(lane, None)
    return RedisNodes(topology, timeout_s=timeout_s, metrics=metrics)


async def _gathered(coroutines: Sequence[Coroutine[Any, Any, ResultT]]) -> Sequence[ResultT]:
    # One, which is the usual number, needs no task of its own.
    if len(coroutines) == 1:
        return [await coroutines[0]]
    return await asyncio.gather(*coroutines)


def _redirections(
    topology: _Cluster, outcome: Sequence[Replies], asked: Iterable[int]
) -> tuple[dict[int, _Lane | None], bool]:
    """Return what is to be asked anew, of whom, and whether that must wait."""
    left: dict[int, _Lane | None] = {}
    must_wait = False
    for n in asked:
        replies = outcome[n]
        if isinstance(replies, HistoryUnavailableError):
            continue
        for reply in replies:
            if isinstance(reply, MovedError):
                topology.moved(reply)
                left[n] = None
            elif isinstance(reply, AskError):
                left[n] = topology.redirected(reply)
            elif isinstance(reply, TryAgainError):
                left[n], must_wait = None, True
    return left, must_wait


async def _is_up(lane: _Lane, until: float) -> bool:
    try:
        (reply,) = await lane.exchange(_PING, 1, until)
    except _FAILURES:
        return False
    return not isinstance(reply, ResponseError)


async def _replies(connection: AbstractConnection, n: int) -> list[Any]:
    replies: list[Any] = []
    for _ in range(n):
        try:
            # The caller's timeout is one for all replies.
            reply = await connection.read_response(disable_decoding=True, timeout=math.inf)
        except ResponseError as error:
            reply = error
        replies.append(reply)
    return replies


def _is_read_only(reply: Any) -> bool:
    # A function of Lua has the code somewhere in its message.
    return isinstance(reply, ReadOnlyError) or (
        isinstance(reply, ResponseError) and "-READONLY" in str(reply)
    )


async def _close_client(client: RedisCluster) -> None:
    for nodes in ("nodes_cache", "startup_nodes"):
        await client.nodes_manager.aclose(nodes)
