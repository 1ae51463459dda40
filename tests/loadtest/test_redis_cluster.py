"""A cluster and sentinels on loopback, as the tests of Redis' failures use them."""

from redis import RedisCluster
from redis.cluster import ClusterNode
from redis.crc import key_slot
from redis.sentinel import Sentinel

from loadtest.redis_cluster import port_with_bus, redis_cluster, redis_sentinels


def test_a_cluster_serves_every_slot_and_moves_them_with_their_keys():
    with redis_cluster(3) as cluster:
        nodes = [ClusterNode("127.0.0.1", node.port) for node in cluster.nodes]
        with RedisCluster(startup_nodes=nodes) as client:
            for n in range(50):
                client.set(f"k{n}", n)
            assert sum(cluster.command(node, "DBSIZE") for node in range(3)) == 50
            source = cluster.node_of(b"k7")
            target = (source + 1) % 3
            calls: list[int] = []
            cluster.move_slot(
                key_slot(b"k7"), source=source, target=target, halfway=lambda: calls.append(1)
            )
            assert calls == [1]
            assert cluster.node_of(b"k7") == target
            assert client.get("k7") == b"7"


def test_a_replica_follows_its_primary():
    with redis_cluster(3, 1) as cluster:
        key = next(f"k{n}" for n in range(1000) if cluster.node_of(f"k{n}".encode()) == 0)
        cluster.command(0, "SET", key, "x")
        assert cluster.command(0, "WAIT", 1, 5000) == 1
        assert cluster.command(3, "DBSIZE") == 1


def test_sentinels_know_the_primary_and_its_replica():
    with redis_sentinels("shop") as (primary, url):
        assert url.startswith("redis+sentinel://127.0.0.1:")
        hosts = [one.split(":") for one in url.split("//")[1].split("/")[0].split(",")]
        sentinel = Sentinel([(host, int(port)) for host, port in hosts])
        assert sentinel.discover_master("shop") == ("127.0.0.1", primary.port)
        assert len(sentinel.discover_slaves("shop")) == 1


def test_a_port_has_room_for_its_bus():
    assert 1024 < port_with_bus() <= 55_535
