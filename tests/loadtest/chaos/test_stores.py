"""Real redis-servers that are hurt, and what they hold afterwards."""

import pytest
import redis

from loadtest.chaos.bench import wait_until
from loadtest.chaos.stores import redis_cluster, redis_node


def test_what_was_written_survives_a_kill(tmp_path):
    with redis_node(tmp_path) as node:
        node.fill({b"a": b"1", b"b": b"2"})
        node.kill()
        with pytest.raises(redis.ConnectionError), node.client() as client:
            client.ping()
        node.start()
        assert node.read([b"b", b"none", b"a"]) == [b"2", b"", b"1"]
        assert node.read([]) == []


def test_a_paused_server_does_not_answer_until_it_goes_on(tmp_path):
    with redis_node(tmp_path) as node:
        node.pause()
        with (
            pytest.raises(redis.TimeoutError),
            redis.Redis(port=node.port, socket_timeout=0.2) as client,
        ):
            client.ping()
        node.resume()
        with node.client() as client:
            assert client.ping()


def test_a_server_without_memory_reads_and_does_not_write(tmp_path):
    with redis_node(tmp_path) as node:
        node.fill({b"a": b"1"})
        node.allow_memory(1)
        assert not node.can_write()
        assert node.read([b"a"]) == [b"1"]
        node.allow_memory(0)
        assert node.can_write()
        node.fill({b"b": b"2"})
        assert node.read([b"b"]) == [b"2"]


def test_a_cluster_outlives_a_primary(tmp_path):
    values = {f"key-{number}".encode(): b"%d" % number for number in range(50)}
    with redis_cluster(tmp_path) as cluster:
        cluster.fill(values)
        cluster.wait_for_replicas()
        assert cluster.read([*values, b"none"]) == [*values.values(), b""]
        assert not cluster.has_failed_over()
        cluster.kill_primary()
        assert wait_until(cluster.has_failed_over, within_s=30.0) is not None
        assert cluster.read(list(values)) == list(values.values())
