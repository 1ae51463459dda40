"""Real redis-servers that are hurt, and what they hold afterwards."""

from loadtest.chaos.bench import wait_until
from loadtest.chaos.stores import cluster_store, single_store


def test_what_was_written_survives_a_kill():
    with single_store() as store:
        store.fill({b"a": b"1", b"b": b"2"})
        store.process.kill()
        store.process.start()
        assert store.read([b"b", b"none", b"a"]) == [b"2", b"", b"1"]
        assert store.read([]) == []


def test_a_server_without_memory_reads_and_does_not_write():
    with single_store() as store:
        store.fill({b"a": b"1"})
        store.allow_memory(1)
        assert not store.can_write()
        assert store.read([b"a"]) == [b"1"]
        store.allow_memory(0)
        assert store.can_write()


def test_a_cluster_outlives_a_primary():
    values = {f"key-{number}".encode(): b"%d" % number for number in range(50)}
    with cluster_store() as store:
        store.fill(values)
        assert store.read([*values, b"none"]) == [*values.values(), b""]
        assert not store.has_failed_over()
        store.kill_primary()
        assert wait_until(store.has_failed_over, within_s=30.0) is not None
        assert store.read(list(values)) == list(values.values())
