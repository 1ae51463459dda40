"""Copies the histories of a prepared log into Redis: in pipelined chunks, safe to run again."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from redis import ConnectionPool, Redis, RedisCluster
from redis.cluster import ClusterNode
from redis.exceptions import RedisClusterException, RedisError
from redis.sentinel import Sentinel

from contract.errors import RecordError
from contract.history_log import HistoryLog
from contract.records import decode_records
from service.errors import HistoryUnavailableError
from service.history import history_key
from service.redis_url import read_redis_url, sentinel_options, takes_tls

CHUNK_USERS = 500
_MAX_ATTEMPTS = 10
# KEYS[1] history; ARGV: the value that was merged, the merged value.
_REPLACE_IF_SAME = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return 0 end
redis.call('SET', KEYS[1], ARGV[2], 'KEEPTTL')
return 1
"""


@dataclass(kw_only=True)
class BackfillReport:
    """Users by outcome. `corrupt`: ids whose stored value is no history; it was left as it is."""

    written: int
    merged: int
    unchanged: int
    corrupt: list[str]


def blocking_client(
    url: str, *, timeout_s: float, password_file: Path | None = None
) -> Redis | RedisCluster:
    """Return a client for `backfill`. Raises ValueError for a URL that is none, and
    HistoryUnavailableError where no node of a cluster answers; others may be away at the start.
    """
    address = read_redis_url(url)
    options = address.options(timeout_s=timeout_s, password_file=password_file)
    if address.kind == "single":
        return Redis.from_pool(ConnectionPool(**options))
    tls = takes_tls(options)
    if address.kind == "cluster":
        options.pop("db", None)
        nodes = [ClusterNode(*host) for host in address.hosts]  # type: ignore[no-untyped-call]
        try:
            return RedisCluster(startup_nodes=nodes, ssl=tls, **options)
        except (RedisError, RedisClusterException) as error:
            raise HistoryUnavailableError(
                f"Redis did not answer: {type(error).__name__}; no node of the cluster was found"
            ) from error
    sentinel = Sentinel(  # type: ignore[no-untyped-call]
        address.hosts,
        sentinel_kwargs=sentinel_options(address, options, tls=tls),
        ssl=tls,
        **options,
    )
    client: Redis = sentinel.master_for(address.service)  # type: ignore[no-untyped-call]
    return client


def backfill(
    redis: Redis | RedisCluster,
    log: HistoryLog,
    *,
    prefix: str,
    keep: int,
    progress: Callable[[int], object] = lambda _: None,
) -> BackfillReport:
    """Load each user's newest `keep` behaviors of the log; `progress` hears of users done.

    A history that stands in Redis already gets what it lacks of the log's. So nothing that came in
    meanwhile is lost, and another run changes nothing. Raises
    HistoryUnavailableError when Redis does not answer; what was done until then stays, whole.
    """
    report = BackfillReport(written=0, merged=0, unchanged=0, corrupt=[])
    try:
        for n_users, chunk in _chunks(log, prefix, keep):
            pipeline = redis.pipeline(transaction=False)
            for key, raw in chunk.items():
                pipeline.set(key, raw, nx=True)
            existing = [
                key for key, done in zip(chunk, pipeline.execute(), strict=True) if done is None
            ]
            report.written += len(chunk) - len(existing)
            _merge(redis, {key: chunk[key] for key in existing}, report, prefix)
            progress(n_users)
    except (RedisError, RedisClusterException, OSError) as error:
        raise HistoryUnavailableError(
            # Escaped: redis-py quotes the command, and with it bytes of records.
            f"Redis did not answer: {str(error)!a}; what was loaded stays, run the command again"
        ) from error
    return report


def merge_histories(stored: bytes, loaded: bytes) -> bytes:
    """Return `stored` with those records of `loaded` that it lacks, by time; `stored` itself when
    it lacks none. Within a second, stored ones come first.

    Raises RecordError when `stored` is no history.
    """
    stored_N, loaded_N = decode_records(stored), decode_records(loaded)
    missing_N = loaded_N[~np.isin(loaded_N, stored_N)]
    if not missing_N.size:
        return stored
    both = np.concatenate([stored_N, missing_N])
    return both[np.argsort(both["time"], kind="stable")].tobytes()


def _chunks(log: HistoryLog, prefix: str, keep: int) -> Iterator[tuple[int, dict[bytes, bytes]]]:
    for start in range(0, len(log), CHUNK_USERS):
        users = range(start, min(start + CHUNK_USERS, len(log)))
        histories = {
            history_key(prefix, log.user_id(user)): log.history(user, newest=keep) for user in users
        }
        yield len(users), {key: raw for key, raw in histories.items() if raw}


def _merge(
    redis: Redis | RedisCluster, chunk: dict[bytes, bytes], report: BackfillReport, prefix: str
) -> None:
    pending = dict(chunk)
    for _ in range(_MAX_ATTEMPTS):
        if not pending:
            return
        pipeline = redis.pipeline(transaction=False)
        for key in pending:
            pipeline.get(key)
        stored = pipeline.execute(raise_on_error=False)
        pipeline = redis.pipeline(transaction=False)
        written: list[bytes] = []
        for (key, loaded), value in zip(list(pending.items()), stored, strict=True):
            try:
                merged = _merged(value, loaded)
            except RecordError:
                report.corrupt.append(key.decode().removeprefix(f"{prefix}:"))
                del pending[key]
                continue
            if merged == value:
                report.unchanged += 1
                del pending[key]
                continue
            # A history that was appended to since it was read is read and merged once more.
            # A cluster's pipeline has no method for it.
            pipeline.execute_command("EVAL", _REPLACE_IF_SAME, 1, key, value or b"", merged)
            written.append(key)
        for key, replaced in zip(written, pipeline.execute(), strict=True):
            if replaced:
                report.merged += 1
                del pending[key]
    if pending:
        raise HistoryUnavailableError(
            f"{len(pending)} histories changed faster than they could be merged; run again"
        )


def _merged(stored: object, loaded: bytes) -> bytes:
    if stored is None:  # it expired since it was found there
        return loaded
    if not isinstance(stored, bytes):
        raise RecordError("the key holds something other than a string")
    return merge_histories(stored, loaded)
