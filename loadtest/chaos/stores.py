"""History stores that can be hurt: one redis-server, or a cluster of them, on loopback.

Both append every write to a file and wait for the disk before they acknowledge it
(`appendfsync always`), so that what was acknowledged must survive a kill.
"""

import signal
import subprocess
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Protocol

import redis
from redis.crc import key_slot

from loadtest.chaos.errors import ChaosError
from loadtest.redis_server import find_redis_server, free_port, wait_for_redis

_DURABLE = ("--appendonly", "yes", "--appendfsync", "always", "--save", "")
_PRIMARIES = 3
_SLOTS = 16_384
_FIRST_SLOTS = tuple(_SLOTS * part // _PRIMARIES for part in range(_PRIMARIES))
_HIGHEST_PORT, _BUS_OFFSET = 65_535, 10_000
_NODE_TIMEOUT_MS = "1000"
_CLUSTER_TIMEOUT_S = 30.0


class Store(Protocol):
    """What a history store has for the measurement."""

    @property
    def url(self) -> str:
        """Where the service finds it."""

    def fill(self, values: Mapping[bytes, bytes]) -> None:
        """Set all keys."""

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the values, b"" where there is none."""


class RedisNode:
    """One redis-server with its files in `folder`; `flags` are added to its command line."""

    def __init__(self, folder: Path, *flags: str, port: int | None = None) -> None:
        self.port = free_port() if port is None else port
        folder.mkdir(parents=True, exist_ok=True)
        self._command = [
            *(str(find_redis_server()), "--port", str(self.port), "--bind", "127.0.0.1"),
            *("--dir", str(folder), "--maxmemory-policy", "noeviction", *_DURABLE, *flags),
        ]
        self.start()

    @property
    def url(self) -> str:
        """Where the service finds it."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start the server, which reads its file, and return when it answers."""
        # In a group of its own: Ctrl-C must reach the parent alone.
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL, process_group=0)
        wait_for_redis(self._process, self.port)

    def kill(self) -> None:
        """End the server by SIGKILL."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """Stop the server where it is: connections stay open, and nothing is answered."""
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused server go on."""
        self._process.send_signal(signal.SIGCONT)

    def allow_memory(self, size_bytes: int) -> None:
        """Refuse writes that need more than `size_bytes`; 0 is no limit."""
        with self.client() as client:
            client.config_set("maxmemory", size_bytes)

    def can_write(self) -> bool:
        """Return whether a write finds the memory that it needs."""
        with self.client() as client:
            try:
                client.set("probe", "")
            except redis.OutOfMemoryError:
                return False
        return True

    def client(self) -> redis.Redis:
        """Return a client of this server."""
        return redis.Redis(host="127.0.0.1", port=self.port)

    def fill(self, values: Mapping[bytes, bytes]) -> None:
        """Set all keys."""
        with self.client() as client:
            client.mset(dict(values))

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the values, b"" where there is none."""
        if not keys:
            return []
        with self.client() as client:
            return [value or b"" for value in client.mget(keys)]


class RedisClusterNodes:
    """Three primaries with a replica each."""

    def __init__(self, nodes: list[RedisNode]) -> None:
        self.nodes = nodes
        self._form()

    @property
    def url(self) -> str:
        """Where the service finds it."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)

    def fill(self, values: Mapping[bytes, bytes]) -> None:
        """Set all keys."""
        for part, keys in self._by_part(list(values)).items():
            with self._primary(part).client() as client:
                for key in keys:
                    client.set(key, values[key])

    def read(self, keys: Sequence[bytes]) -> list[bytes]:
        """Return the values, b"" where there is none."""
        found: dict[bytes, bytes] = {}
        for part, owned in self._by_part(keys).items():
            with self._primary(part).client() as client:
                found |= {key: client.get(key) or b"" for key in owned}
        return [found[key] for key in keys]

    def wait_for_replicas(self) -> None:
        """Return when every replica has caught up with its primary."""
        _wait_until("the replicas have caught up", lambda: all(map(_is_linked, self._replicas())))

    def kill_primary(self) -> None:
        """End the first primary by SIGKILL."""
        self.nodes[0].kill()

    def has_failed_over(self) -> bool:
        """Return whether the first primary's replica has taken its place, for all to see."""
        return _is_primary(self._replicas()[0]) and all(map(_is_whole, self.nodes[1:]))

    def _replicas(self) -> list[RedisNode]:
        return self.nodes[_PRIMARIES:]

    # redis-py's client of clusters leaves connections open when a node is gone. As no slots are
    # moved here, a key is served by one of two nodes.

    def _by_part(self, keys: Sequence[bytes]) -> dict[int, list[bytes]]:
        parts: dict[int, list[bytes]] = {}
        for key in keys:
            part = bisect_right(_FIRST_SLOTS, key_slot(key)) - 1
            parts.setdefault(part, []).append(key)
        return parts

    def _primary(self, part: int) -> RedisNode:
        primary, heir = self.nodes[part], self._replicas()[part]
        return heir if _is_primary(heir) else primary

    def _form(self) -> None:
        first, *others = self.nodes
        with first.client() as client:
            for node in others:
                client.execute_command("CLUSTER", "MEET", "127.0.0.1", node.port)
        primaries = self.nodes[:_PRIMARIES]
        for node, first_slot, end in zip(
            primaries, _FIRST_SLOTS, (*_FIRST_SLOTS[1:], _SLOTS), strict=True
        ):
            with node.client() as client:
                client.execute_command("CLUSTER", "ADDSLOTS", *range(first_slot, end))
        _wait_until("all nodes have met", lambda: all(map(self._knows_all, self.nodes)))
        for primary, replica in zip(primaries, self._replicas(), strict=True):
            with primary.client() as client:
                name = client.execute_command("CLUSTER", "MYID")
            with replica.client() as client:
                client.execute_command("CLUSTER", "REPLICATE", name)
        _wait_until("the cluster is whole", lambda: all(map(_is_whole, self.nodes)))
        self.wait_for_replicas()

    def _knows_all(self, node: RedisNode) -> bool:
        return _cluster_info(node)["cluster_known_nodes"] == str(len(self.nodes))


@contextmanager
def redis_node(folder: Path) -> Iterator[RedisNode]:
    """Run one durable Redis, and end it with the block."""
    node = RedisNode(folder)
    try:
        yield node
    finally:
        node.kill()


@contextmanager
def redis_cluster(folder: Path) -> Iterator[RedisClusterNodes]:
    """Run a cluster, and end it with the block."""
    flags = ("--cluster-enabled", "yes", "--cluster-node-timeout", _NODE_TIMEOUT_MS)
    with ExitStack() as stack:
        nodes = []
        for number in range(2 * _PRIMARIES):
            nodes.append(RedisNode(folder / f"node-{number}", *flags, port=_cluster_port()))
            stack.callback(nodes[-1].kill)
        yield RedisClusterNodes(nodes)


def _cluster_port() -> int:
    # A node of a cluster listens 10,000 above its port, too.
    while (port := free_port()) > _HIGHEST_PORT - _BUS_OFFSET:
        pass
    return port


def _cluster_info(node: RedisNode) -> dict[str, str]:
    with node.client() as client:
        # redis-py parses the replies of commands whose whole name it is given.
        info = client.execute_command("CLUSTER INFO")
    return {str(name): str(value) for name, value in info.items()}


def _is_primary(node: RedisNode) -> bool:
    with node.client() as client:
        return bool(client.info("replication")["role"] == "master")


def _is_whole(node: RedisNode) -> bool:
    return _cluster_info(node)["cluster_state"] == "ok"


def _is_linked(replica: RedisNode) -> bool:
    with replica.client() as client:
        return bool(client.info("replication").get("master_link_status") == "up")


def _wait_until(what: str, holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + _CLUSTER_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise ChaosError(f"{what}: not within {_CLUSTER_TIMEOUT_S:.0f} s")
        time.sleep(0.05)
