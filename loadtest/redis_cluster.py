"""Redis Cluster and Redis Sentinel on loopback, made by hand as their documentation says."""

import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from redis import Redis
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot
from redis.exceptions import RedisError

from loadtest.redis_server import RedisProcess, RedisServerError, free_port, redis_process

_PATIENCE_S = 30.0
_BUS = 10_000  # nodes talk to one another on their port plus this


class LocalCluster:
    """Its processes, primaries first, and the questions that only an operator asks."""

    def __init__(self, nodes: Sequence[RedisProcess], n_primaries: int) -> None:
        self.nodes = nodes
        self.n_primaries = n_primaries
        self.url = "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in nodes)

    def command(self, node: int, *words: Any) -> Any:
        """Return a node's reply to a command."""
        with Redis(port=self.nodes[node].port) as client:
            return client.execute_command(*words)

    def node_of(self, key: bytes) -> int:
        """Return the node that says that it has a key's slot."""
        for node in range(len(self.nodes)):
            for first, last, (_, port, *_), *_ in self.command(node, "CLUSTER SLOTS"):
                if first <= key_slot(key) <= last:
                    return next(n for n, one in enumerate(self.nodes) if one.port == port)
        raise LookupError(key)

    def move_slot(
        self, slot: int, *, source: int, target: int, halfway: Callable[[], None] = lambda: None
    ) -> None:
        """Move a slot with its keys; `halfway` is called while it is on both nodes."""
        ids = [self.command(n, "CLUSTER MYID").decode() for n in (source, target)]
        self.command(target, "CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        self.command(source, "CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        keys = self.command(source, "CLUSTER GETKEYSINSLOT", slot, 1000)
        for n, key in enumerate(keys):
            if n == len(keys) // 2:
                halfway()
            port = self.nodes[target].port
            self.command(source, "MIGRATE", "127.0.0.1", port, key, 0, 5000)
        for node in (target, source):
            self.command(node, "CLUSTER SETSLOT", slot, "NODE", ids[1])

    def wait(self, among: Sequence[int] | None = None) -> None:
        """Return when all nodes (or those named) say that every slot is served."""
        deadline = time.monotonic() + _PATIENCE_S
        chosen = range(len(self.nodes)) if among is None else among
        while not all(self._is_well(node, len(chosen)) for node in chosen):
            if time.monotonic() > deadline:
                raise RedisServerError(f"the cluster was not whole within {_PATIENCE_S:.0f} s")
            time.sleep(0.05)

    def _is_well(self, node: int, n_known: int) -> bool:
        try:
            info = self.command(node, "CLUSTER INFO")
            slots = self.command(node, "CLUSTER SLOTS")
        except RedisError:
            return False
        told = info if isinstance(info, dict) else {}
        known = {port for _, _, *owners in slots for _, port, *_ in owners}
        return told.get("cluster_state") == "ok" and len(known) >= n_known


@contextmanager
def redis_cluster(
    n_primaries: int = 3, n_replicas: int = 0, *arguments: str, node_timeout_ms: int = 1000
) -> Iterator[LocalCluster]:
    """Run a cluster, its slots dealt out evenly, and yield it; end it with the block.

    Replica number n follows primary number n. `arguments`: of every redis-server.
    """
    with ExitStack() as stack:
        nodes = [
            stack.enter_context(
                redis_process(
                    port_with_bus(),
                    *("--cluster-enabled", "yes", "--cluster-node-timeout", str(node_timeout_ms)),
                    *arguments,
                )
            )
            for _ in range(n_primaries + n_replicas)
        ]
        # All of them first: each takes its time to end, and they take it together.
        stack.callback(_end_together, nodes)
        cluster = LocalCluster(nodes, n_primaries)
        for number in range(n_primaries):
            first, last = (
                REDIS_CLUSTER_HASH_SLOTS * n // n_primaries for n in (number, number + 1)
            )
            cluster.command(number, "CLUSTER ADDSLOTS", *range(first, last))
            # Or two nodes would claim the same epoch, and one would have to give way.
            cluster.command(number, "CLUSTER SET-CONFIG-EPOCH", number + 1)
        for node in nodes[1:]:
            cluster.command(0, "CLUSTER MEET", "127.0.0.1", node.port)
        cluster.wait(range(n_primaries))
        for number in range(n_replicas):
            primary = cluster.command(number, "CLUSTER MYID").decode()
            _repeat(cluster, n_primaries + number, "CLUSTER REPLICATE", primary)
        cluster.wait()
        yield cluster


@contextmanager
def redis_sentinels(name: str) -> Iterator[tuple[RedisProcess, str]]:
    """Run a primary that a replica follows and three sentinels watch; yield it, and their URL.

    The replica takes its place when it has not answered for half a second.
    """
    with ExitStack() as stack:
        primary = stack.enter_context(redis_process())
        stack.enter_context(redis_process(None, "--replicaof", "127.0.0.1", str(primary.port)))
        config = (
            f"sentinel monitor {name} 127.0.0.1 {primary.port} 2\n"
            f"sentinel down-after-milliseconds {name} 500\n"
            f"sentinel failover-timeout {name} 3000\n"
        )
        watching = [
            stack.enter_context(redis_process(None, "--sentinel", config=config)) for _ in range(3)
        ]
        deadline = time.monotonic() + _PATIENCE_S
        while not all(_knows_the_others(one.port, name) for one in watching):
            if time.monotonic() > deadline:
                raise RedisServerError(f"the sentinels did not meet within {_PATIENCE_S:.0f} s")
            time.sleep(0.05)
        hosts = ",".join(f"127.0.0.1:{one.port}" for one in watching)
        yield primary, f"redis+sentinel://{hosts}/{name}/0"


def _end_together(nodes: Sequence[RedisProcess]) -> None:
    for node in nodes:
        node.send_signal(signal.SIGTERM)


def _knows_the_others(port: int, name: str) -> bool:
    with Redis(port=port) as client:
        state = client.sentinel_masters()[name]
    return bool(state["num-slaves"] == 1 and state["num-other-sentinels"] == 2)


def _repeat(cluster: LocalCluster, node: int, *words: Any) -> None:
    """Ask until it works: a node may not have heard of the others yet."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            cluster.command(node, *words)
        except RedisError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def port_with_bus() -> int:
    """Return a free port whose neighbour for the talk among nodes is free, too."""
    while True:
        port = free_port()
        # OverflowError: there is no such port.
        with suppress(OSError, OverflowError):
            free_port(port + _BUS)
            return port
