"""History stores that can be hurt: one redis-server, or a cluster of them, on loopback.

Both append every write to a file and wait for it before they acknowledge it (`appendfsync always`),
so that what was acknowledged must survive a kill.
"""

import tempfile
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from loadtest.redis_cluster import LocalCluster, redis_cluster
from loadtest.redis_server import RedisProcess, redis_process

_DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
_MEMORY = Path("/dev/shm")  # noqa: S108 # a folder of its own is made there
_PRIMARIES = 3
_FIRST_SLOTS = tuple(REDIS_CLUSTER_HASH_SLOTS * part // _PRIMARIES for part in range(_PRIMARIES))


class Store(Protocol):
    """What a history store has for the measurement."""

    @property
    def url(self) -> str:
        """Where the service finds it."""

    def fill(self, values: Mapping[bytes, bytes]) -> None:
        """Set all keys."""

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the values, b"" where there is none."""


class SingleStore:
    """One redis-server, `process`."""

    def __init__(self, process: RedisProcess) -> None:
        self.process = process

    @property
    def url(self) -> str:
        """Where the service finds it."""
        return self.process.url

    def fill(self, values: Mapping[bytes, bytes]) -> None:
        """Set all keys."""
        _fill(self.process, values)

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the values, b"" where there is none."""
        return _read(self.process, keys)

    def allow_memory(self, size_bytes: int) -> None:
        """Refuse writes that need more than `size_bytes`; 0 is no limit."""
        with _client(self.process) as client:
            client.config_set("maxmemory", size_bytes)

    def can_write(self) -> bool:
        """Return whether a write finds the memory that it needs."""
        with _client(self.process) as client:
            try:
                client.set("probe", "")
            except redis.OutOfMemoryError:
                return False
        return True


class ClusterStore:
    """Three primaries with a replica each."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._cluster = cluster

    @property
    def url(self) -> str:
        """Where the service finds it."""
        return self._cluster.url

    def fill(self, values: Mapping[bytes, bytes]) -> None:
        """Set all keys; returns when the replicas have them, too."""
        for part, keys in _by_part(list(values)).items():
            primary = self._primary(part)
            _fill(primary, {key: values[key] for key in keys})
            with _client(primary) as client:
                client.wait(1, 0)

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the values, b"" where there is none."""
        found: dict[bytes, bytes] = {}
        for part, owned in _by_part(keys).items():
            found |= zip(owned, _read(self._primary(part), owned), strict=True)
        return [found[key] for key in keys]

    def kill_primary(self) -> None:
        """End the first primary by SIGKILL."""
        self._cluster.nodes[0].kill()

    def has_failed_over(self) -> bool:
        """Return whether the first primary's replica has taken its place, for all to see."""
        return _is_primary(self._heir(0)) and all(map(_is_whole, self._cluster.nodes[1:]))

    # Not by redis-py's client of clusters, which leaves connections open when a node is gone. As no
    # slots are moved here, a key is served by one of two nodes.

    def _primary(self, part: int) -> RedisProcess:
        heir = self._heir(part)
        return heir if _is_primary(heir) else self._cluster.nodes[part]

    def _heir(self, part: int) -> RedisProcess:
        return self._cluster.nodes[_PRIMARIES + part]


@contextmanager
def single_store() -> Iterator[SingleStore]:
    """Run one durable Redis, and end it with the block."""
    # Its process is what is killed here, not the machine. While a disk syncs, Redis reads nothing:
    # that would be in all latencies.
    folder = _MEMORY if _MEMORY.is_dir() else None
    with (
        tempfile.TemporaryDirectory(prefix="mneme-redis-", dir=folder) as name,
        redis_process(None, "--dir", name, *_DURABLE) as process,
    ):
        yield SingleStore(process)


@contextmanager
def cluster_store() -> Iterator[ClusterStore]:
    """Run a durable cluster, and end it with the block."""
    with redis_cluster(_PRIMARIES, _PRIMARIES, *_DURABLE) as cluster:
        yield ClusterStore(cluster)


def _client(process: RedisProcess) -> redis.Redis:
    return redis.Redis(port=process.port)


def _fill(process: RedisProcess, values: Mapping[bytes, bytes]) -> None:
    with _client(process) as client:
        for key, value in values.items():
            client.set(key, value)


def _read(process: RedisProcess, keys: Sequence[bytes]) -> list[bytes]:
    with _client(process) as client:
        return [client.get(key) or b"" for key in keys]


def _by_part(keys: Sequence[bytes]) -> dict[int, list[bytes]]:
    """Return the keys by the number of the primary that has their slots at the start."""
    parts: dict[int, list[bytes]] = {}
    for key in keys:
        parts.setdefault(bisect_right(_FIRST_SLOTS, key_slot(key)) - 1, []).append(key)
    return parts


def _is_primary(process: RedisProcess) -> bool:
    with _client(process) as client:
        return bool(client.info("replication")["role"] == "master")


def _is_whole(process: RedisProcess) -> bool:
    with _client(process) as client:
        # redis-py parses the replies of commands whose whole name it is given.
        info = client.execute_command("CLUSTER INFO")
    return bool(info["cluster_state"] == "ok")
