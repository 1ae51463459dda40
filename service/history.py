"""Histories in Redis: one string of records a user, under `<prefix>:<user id>`."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hiredis import pack_command
from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError, ResponseError

from contract.errors import RecordError
from contract.records import RECORD_BYTES, check_length
from service.errors import CorruptHistoryError, HistoryUnavailableError

# A behavior posted again is found among so many newest ones, and not appended again.
DEDUPLICATION_BEHAVIORS = 128

_CORRUPT = -1
# KEYS[1] history; ARGV: records to append, bytes to keep, bytes in which to look for duplicates.
# One function does all of it, so that a retry, a trim and an append never interleave.
_APPEND = f"""
local length = redis.call('STRLEN', KEYS[1])
if length % {RECORD_BYTES} ~= 0 then return {_CORRUPT} end
local recent = redis.call('GETRANGE', KEYS[1], -tonumber(ARGV[3]), -1)
local known, fresh = {{}}, {{}}
for i = 1, #recent, {RECORD_BYTES} do
  known[string.sub(recent, i, i + {RECORD_BYTES - 1})] = true
end
for i = 1, #ARGV[1], {RECORD_BYTES} do
  local record = string.sub(ARGV[1], i, i + {RECORD_BYTES - 1})
  if not known[record] then
    known[record] = true
    fresh[#fresh + 1] = record
  end
end
if #fresh > 0 then length = redis.call('APPEND', KEYS[1], table.concat(fresh)) end
local keep = tonumber(ARGV[2])
if length > 2 * keep then
  redis.call('SET', KEYS[1], redis.call('GETRANGE', KEYS[1], -keep, -1), 'KEEPTTL')
end
return #fresh
"""


def history_key(prefix: str, user_id: str) -> bytes:
    """Return the Redis key of a user's history."""
    return f"{prefix}:{user_id}".encode()


class HistoryStore:
    """Reads and appends histories; one pipeline, and so one round trip, for a whole batch.

    `redis`: a client that returns bytes. `keep`: behaviors that are kept of a user at least; a
    value is cut back to them when it holds more than twice as many.
    """

    def __init__(self, redis: Redis, *, prefix: str, keep: int) -> None:
        self._redis = redis
        self._prefix = prefix
        self._keep = keep
        self._append = redis.register_script(_APPEND)

    def keep_at_least(self, behaviors: int) -> None:
        """Keep so many of a user from now on, unless more are kept already."""
        self._keep = max(self._keep, behaviors)

    @property
    def longest(self) -> int:
        """Behaviors of the longest value that `append` leaves behind."""
        return 2 * self._keep

    async def fetch(
        self, user_ids: Sequence[str], length: int
    ) -> list[bytes | CorruptHistoryError]:
        """Return each user's newest `length` records, oldest first; b"" for an unknown user.

        A value that is no history becomes an error in its place. Raises HistoryUnavailableError
        when Redis does not answer.
        """
        if not user_ids:
            return []
        first = -RECORD_BYTES * length
        commands = bytearray()
        for user_id in user_ids:
            key = history_key(self._prefix, user_id)
            commands += pack_command(("GETRANGE", key, first, -1))  # type: ignore[arg-type]
            # The range alone looks whole even where the value is not: it is cut from the end.
            commands += pack_command(("STRLEN", key))  # type: ignore[arg-type]  # its stub is wrong
        replies = await _answer(self._ask(bytes(commands), 2 * len(user_ids)))
        return [
            _checked(user_id, raw, length_bytes)
            for user_id, raw, length_bytes in zip(
                user_ids, replies[::2], replies[1::2], strict=True
            )
        ]

    async def some_users(self, n: int) -> list[str]:
        """Return up to `n` users, drawn at random; one that is drawn again stands there once.

        Raises HistoryUnavailableError when Redis does not answer.
        """
        prefix = history_key(self._prefix, "")
        keys = await _answer(self._ask(pack_command(("RANDOMKEY",)) * n, n))
        users = set()
        for key in keys:
            if isinstance(key, ResponseError):
                raise HistoryUnavailableError(f"Redis refused to read: {key}")
            # Redis may hold other things, or nothing.
            if key is not None and key.startswith(prefix):
                users.add(key[len(prefix) :].decode(errors="replace"))
        return sorted(users)

    async def _ask(self, commands: bytes, n_replies: int) -> list[Any]:
        """Send packed commands as they are and return the replies, errors in their places.

        redis-py's pipeline does the same with a timer and five calls for each reply; that would be
        a fifth of what a request costs.
        """
        pool = self._redis.connection_pool
        for is_last_attempt in (False, True):
            connection = await pool.get_connection()  # type: ignore[no-untyped-call]
            try:
                async with asyncio.timeout(connection.socket_timeout):
                    await connection.send_packed_command(commands, check_health=False)
                    return [await _reply(connection) for _ in range(n_replies)]
            except RedisConnectionError:
                # A restarted Redis has closed its connections: the next one is new.
                await connection.disconnect()
                if is_last_attempt:
                    raise
            except TimeoutError:
                await connection.disconnect()
                raise
            finally:
                await pool.release(connection)
        raise AssertionError("unreachable")

    async def append(self, records: Mapping[str, bytes]) -> dict[str, int | CorruptHistoryError]:
        """Append records to each user's history; return how many were new, or the error.

        A record that stands among the user's newest 128 already is not appended again, so a
        failed call can be repeated. Raises HistoryUnavailableError when Redis does not answer or
        refuses to write; then some users may have been served.
        """
        pipeline = self._redis.pipeline(transaction=False)
        for user_id, raw in records.items():
            await self._append(
                keys=[history_key(self._prefix, user_id)],
                args=[
                    raw,
                    RECORD_BYTES * self._keep,
                    RECORD_BYTES * DEDUPLICATION_BEHAVIORS,
                ],
                client=pipeline,
            )
        replies = await _answer(pipeline.execute(raise_on_error=False))
        outcome: dict[str, int | CorruptHistoryError] = {}
        for user_id, reply in zip(records, replies, strict=True):
            if isinstance(reply, int) and reply != _CORRUPT:
                outcome[user_id] = reply
            elif reply == _CORRUPT or _is_wrong_type(reply):
                outcome[user_id] = _corrupt(user_id, "its length or type is wrong")
            else:
                raise HistoryUnavailableError(f"Redis refused to write: {reply}")
        return outcome

    async def is_ready(self) -> bool:
        """Return whether Redis answers."""
        try:
            await self._redis.ping()
        except (RedisError, OSError):
            return False
        return True

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.aclose()


def connect(url: str, *, timeout_s: float) -> Redis:
    """Return a client that gives up after `timeout_s` and retries a lost connection once.

    Connections are made when they are first needed: Redis may be away at the start.
    """
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        # One attempt more than the first, at once: a restarted Redis has closed its connections.
        retry=Retry(NoBackoff(), 1),
    )


async def _reply(connection: AbstractConnection) -> Any:
    try:
        # The caller's timeout is one for all replies.
        return await connection.read_response(disable_decoding=True, timeout=math.inf)
    except ResponseError as error:
        return error


async def _answer(command: Any) -> list[Any]:
    try:
        replies: list[Any] = await command
    except (RedisError, OSError) as error:
        raise HistoryUnavailableError(f"Redis did not answer: {type(error).__name__}") from error
    return replies


def _checked(user_id: str, raw: Any, length_bytes: Any) -> bytes | CorruptHistoryError:
    if _is_wrong_type(raw):
        return _corrupt(user_id, "the key holds something other than a string")
    if not isinstance(raw, bytes) or not isinstance(length_bytes, int):
        raise HistoryUnavailableError(f"Redis refused to read: {raw}")
    try:
        check_length(length_bytes)
        # Both commands run one after the other: a value may have appeared between them.
        check_length(len(raw))
    except RecordError as error:
        return _corrupt(user_id, str(error))
    return raw


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply)


def _corrupt(user_id: str, reason: str) -> CorruptHistoryError:
    return CorruptHistoryError(f"the history of user {user_id!r} cannot be read: {reason}")
