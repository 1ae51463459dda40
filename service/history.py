"""Histories in Redis: one string of records a user, under `<prefix>:<user id>`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha1
from typing import Any

from hiredis import pack_command
from redis.exceptions import NoScriptError, ResponseError

from contract.errors import RecordError
from contract.records import RECORD_BYTES, check_length
from service.errors import (
    CorruptHistoryError,
    HistoryUnavailableError,
    IdempotencyKeyReusedError,
)
from service.hash_tags import beside
from service.redis_nodes import RedisNodes, Replies
from service.settings import IDEMPOTENCY_PREFIX

# A call posted again finds what it has appended while so many others, at most, have come since.
DEDUPLICATION_BEHAVIORS = 128
_DEDUPLICATION_BYTES = RECORD_BYTES * DEDUPLICATION_BEHAVIORS

# Life of an idempotency key unless the store is told another, in seconds.
IDEMPOTENCY_LIFE_S = 3600.0

FINGERPRINT_BYTES = 16

_CORRUPT = -1
# KEYS[1] history, KEYS[2] what the idempotency key has done to it, if one came; ARGV: records to
# append, bytes to keep, fingerprint of the body, life of the key in ms.
# One function does all of it, so that a retry, a trim and an append never interleave. Of more
# records than are kept the newest alone are appended: a repetition, which finds no others, would
# put those before behind them. They count as new where all of the newest are. Returns how many
# records were new, and 1 where they were so to an earlier call.
_APPEND = f"""
local length = redis.call('STRLEN', KEYS[1])
if length % {RECORD_BYTES} ~= 0 then return {{{_CORRUPT}, 0}} end
if KEYS[2] then
  local done = redis.call('GET', KEYS[2])
  if done and string.sub(done, 1, {FINGERPRINT_BYTES}) == ARGV[3] then
    return {{tonumber(string.sub(done, {FINGERPRINT_BYTES + 1})), 1}}
  end
end
local recent = redis.call('GETRANGE', KEYS[1], -(#ARGV[1] + {_DEDUPLICATION_BYTES}), -1)
local known, met, posted = {{}}, {{}}, {{}}
for i = 1, #recent, {RECORD_BYTES} do
  known[string.sub(recent, i, i + {RECORD_BYTES - 1})] = true
end
for i = 1, #ARGV[1], {RECORD_BYTES} do
  local record = string.sub(ARGV[1], i, i + {RECORD_BYTES - 1})
  if not met[record] then
    met[record] = true
    posted[#posted + 1] = record
  end
end
local keep = tonumber(ARGV[2])
local first = math.max(1, #posted - keep / {RECORD_BYTES} + 1)
local fresh, before = {{}}, 0
for i, record in ipairs(posted) do
  if not known[record] then
    if i < first then before = before + 1 else fresh[#fresh + 1] = record end
  end
end
if #fresh > 0 then length = redis.call('APPEND', KEYS[1], table.concat(fresh)) end
if length > 2 * keep then
  redis.call('SET', KEYS[1], redis.call('GETRANGE', KEYS[1], -keep, -1), 'KEEPTTL')
end
local new = #fresh
if first + new > #posted then new = new + before end
if KEYS[2] then redis.call('SET', KEYS[2], ARGV[3] .. new, 'PX', ARGV[4]) end
return {{new, 0}}
"""
# KEYS[1] idempotency key; ARGV: fingerprint of the body, life in ms. Returns whether it is the
# key's own.
_CLAIM = """
local known = redis.call('GET', KEYS[1])
if known then return known == ARGV[1] and 1 or 0 end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])
return 1
"""


class _Script:
    """A Lua function, called by its hash, or by its text where Redis does not know it."""

    def __init__(self, text: str) -> None:
        self._text = text.encode()
        self._sha1 = sha1(self._text, usedforsecurity=False).hexdigest().encode()

    def call(self, keys: Sequence[bytes], arguments: Sequence[bytes | int]) -> bytes:
        """Return the packed command that calls it."""
        return _packed(b"EVALSHA", self._sha1, len(keys), *keys, *arguments)

    def load_and_call(self, keys: Sequence[bytes], arguments: Sequence[bytes | int]) -> bytes:
        """Return the packed command that calls it, and makes it known."""
        return _packed(b"EVAL", self._text, len(keys), *keys, *arguments)


@dataclass(frozen=True, kw_only=True)
class Idempotency:
    """A client's key for one call of `append`. `fingerprint`: 16 bytes of what is posted."""

    key: str
    fingerprint: bytes

    @classmethod
    def of(cls, key: str, body: bytes, *, caller: str = "") -> "Idempotency":
        """Return the key with the fingerprint of a body; those of other callers are other keys.

        `caller`: the name of an API key, which has no spaces, or nothing where none is asked for.
        """
        return cls(key=f"{caller} {key}", fingerprint=_digest(body))


@dataclass(frozen=True, kw_only=True)
class Appended:
    """How many records were new to a user's history; `earlier`: to a call with the same key."""

    count: int
    earlier: bool = False


def history_key(prefix: str, user_id: str) -> bytes:
    """Return the Redis key of a user's history."""
    return f"{prefix}:{user_id}".encode()


class HistoryStore:
    """Reads and appends histories; one pipeline, and so one round trip, for a whole batch.

    `keep`: behaviors that are kept of a user at least; a value is cut back to them when it holds
    more than twice as many. `idempotency_life_s`: seconds for which a client's keys are known.
    """

    def __init__(
        self,
        redis: RedisNodes,
        *,
        prefix: str,
        keep: int,
        idempotency_life_s: float = IDEMPOTENCY_LIFE_S,
    ) -> None:
        self._redis = redis
        self._prefix = prefix
        self._keep = keep
        self._life_ms = max(1, round(1000 * idempotency_life_s))
        self._append = _Script(_APPEND)
        self._claim = _Script(_CLAIM)

    def keep_at_least(self, behaviors: int) -> None:
        """Keep so many of a user from now on, unless more are kept already."""
        self._keep = max(self._keep, behaviors)

    @property
    def longest(self) -> int:
        """Behaviors of the longest value that `append` leaves behind."""
        return 2 * self._keep

    async def fetch(
        self, user_ids: Sequence[str], length: int, *, timeout_s: float = math.inf
    ) -> list[bytes | CorruptHistoryError | HistoryUnavailableError]:
        """Return each user's newest `length` records, as they are stored; b"" for an unknown user.

        The newest are those that were stored last; one that was reported late is among them, and
        `contract.records` puts it where it belongs. A value that is no history, or that Redis did
        not give in `timeout_s` or in the time of its nodes, becomes an error in its place.
        """
        if not user_ids:
            return []
        first = -RECORD_BYTES * length
        asked = []
        for user_id in user_ids:
            key = history_key(self._prefix, user_id)
            # The range alone looks whole even where the value is not: it is cut from the end.
            commands = (_packed(b"GETRANGE", key, first, -1), _packed(b"STRLEN", key))
            asked.append((key, commands))
        answers = await self._redis.ask(asked, operation="fetch", timeout_s=timeout_s)
        return [
            _checked(user_id, replies) for user_id, replies in zip(user_ids, answers, strict=True)
        ]

    async def some_users(self, n: int) -> list[str]:
        """Return up to `n` users, drawn at random; one that is drawn again stands there once.

        Raises HistoryUnavailableError when Redis does not answer.
        """
        prefix = history_key(self._prefix, "")
        answers = await self._redis.ask([(None, (_packed(b"RANDOMKEY"),))] * n, operation="fetch")
        users = set()
        for replies in answers:
            if isinstance(replies, HistoryUnavailableError):
                raise replies
            (key,) = replies
            if isinstance(key, ResponseError):
                raise HistoryUnavailableError(_refusal("read", key))
            # Redis may hold other things, or nothing.
            if key is not None and key.startswith(prefix):
                users.add(key[len(prefix) :].decode(errors="replace"))
        return sorted(users)

    async def append(
        self, records: Mapping[str, bytes], *, idempotency: Idempotency | None = None
    ) -> dict[str, Appended | CorruptHistoryError]:
        """Append records to each user's history; return how many were new, or the error.

        A record that stands among the user's newest 128 already, or among as many more as the call
        brings, is not appended again, so a failed call can be repeated. With `idempotency`, a call
        with the same key and the same fingerprint appends nothing where an earlier one has
        appended, and returns what that did.

        Raises HistoryUnavailableError when Redis does not answer or refuses to write; then some
        users may have been served. Raises IdempotencyKeyReusedError, before anything is appended,
        where the key is known with another fingerprint.
        """
        if idempotency is not None:
            await self._claim_key(idempotency)
        calls: list[tuple[list[bytes], list[bytes | int]]] = []
        for user_id, raw in records.items():
            key = history_key(self._prefix, user_id)
            keys = [key]
            arguments: list[bytes | int] = [raw, RECORD_BYTES * self._keep]
            if idempotency is not None:
                keys.append(_key_beside(key, idempotency.key))
                arguments += [idempotency.fingerprint, self._life_ms]
            calls.append((keys, arguments))
        answers = await self._called(self._append, calls)
        outcome: dict[str, Appended | CorruptHistoryError] = {}
        failed: HistoryUnavailableError | None = None
        for user_id, replies in zip(records, answers, strict=True):
            reply = _only(replies)
            if isinstance(reply, HistoryUnavailableError):
                failed = reply
            elif _is_wrong_type(reply) or (isinstance(reply, list) and reply[0] == _CORRUPT):
                outcome[user_id] = _corrupt(user_id, "its length or type is wrong")
            elif isinstance(reply, list):
                outcome[user_id] = Appended(count=reply[0], earlier=bool(reply[1]))
            else:
                failed = HistoryUnavailableError(_refusal("write", reply))
        if failed is not None:
            raise failed
        return outcome

    async def is_ready(self) -> bool:
        """Return whether Redis answers."""
        return await self._redis.is_up()

    async def close(self) -> None:
        """Close all connections."""
        await self._redis.close()

    async def _claim_key(self, idempotency: Idempotency) -> None:
        key = f"{IDEMPOTENCY_PREFIX}:{_digest(idempotency.key.encode()).hex()}".encode()
        (replies,) = await self._called(
            self._claim, [([key], [idempotency.fingerprint, self._life_ms])]
        )
        reply = _only(replies)
        if isinstance(reply, HistoryUnavailableError):
            raise reply
        if not isinstance(reply, int):
            raise HistoryUnavailableError(_refusal("write", reply))
        if not reply:
            raise IdempotencyKeyReusedError(
                "Idempotency-Key: it came with another body before; a repetition must be the same, "
                "and another request needs another key"
            )

    async def _called(
        self, script: _Script, calls: Sequence[tuple[list[bytes], list[bytes | int]]]
    ) -> list[Replies]:
        asked = [(keys[0], (script.call(keys, arguments),)) for keys, arguments in calls]
        answers = await self._redis.ask(asked, operation="append")
        unknown = [n for n, one in enumerate(answers) if isinstance(_only(one), NoScriptError)]
        if unknown:
            asked = [(calls[n][0][0], (script.load_and_call(*calls[n]),)) for n in unknown]
            again = await self._redis.ask(asked, operation="append")
            for n, replies in zip(unknown, again, strict=True):
                answers[n] = replies
        return answers


def _packed(*words: bytes | int) -> bytes:
    packed: bytes = pack_command(words)  # type: ignore[arg-type]  # its stub is wrong
    return packed


def _only(replies: Replies) -> Any:
    return replies if isinstance(replies, HistoryUnavailableError) else replies[0]


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=FINGERPRINT_BYTES).digest()


def _key_beside(key: bytes, idempotency_key: str) -> bytes:
    """Return where stands what an idempotency key has done to a history: in its slot."""
    digest = _digest(b"\0".join([key, idempotency_key.encode()]))
    return beside(key, prefix=f"{IDEMPOTENCY_PREFIX}:", suffix=f":{digest.hex()}")


def _checked(
    user_id: str, replies: Replies
) -> bytes | CorruptHistoryError | HistoryUnavailableError:
    if isinstance(replies, HistoryUnavailableError):
        return replies
    raw, length_bytes = replies
    if _is_wrong_type(raw):
        return _corrupt(user_id, "the key holds something other than a string")
    if not isinstance(raw, bytes) or not isinstance(length_bytes, int):
        return HistoryUnavailableError(_refusal("read", raw))
    try:
        check_length(length_bytes)
        # Both commands run one after the other: a value may have appeared between them.
        check_length(len(raw))
    except RecordError as error:
        return _corrupt(user_id, str(error))
    return raw


def _refusal(what: str, reply: Any) -> str:
    return f"Redis refused to {what}: {type(reply).__name__}: {reply}"


def _is_wrong_type(reply: Any) -> bool:
    return isinstance(reply, ResponseError) and "WRONGTYPE" in str(reply)


def _corrupt(user_id: str, reason: str) -> CorruptHistoryError:
    return CorruptHistoryError(f"the history of user {user_id!r} cannot be read: {reason}")
