"""The proxy that holds back and the clients that never finish, as the processes that they are."""

import socket
import time

import pytest

from loadtest.chaos.child import child
from loadtest.chaos.errors import ChaosError
from loadtest.redis_server import redis_process


def test_answers_come_late_while_the_proxy_holds_them_back():
    with (
        redis_process() as node,
        child("loadtest.chaos.slow_proxy", [node.port]) as proxy,
        socket.create_connection(("127.0.0.1", int(proxy.first_line)), timeout=5.0) as connection,
    ):

        def ping_s() -> float:
            started_s = time.monotonic()
            connection.sendall(b"PING\r\n")
            assert connection.recv(100) == b"+PONG\r\n"
            return time.monotonic() - started_s

        assert ping_s() < 0.6
        proxy.tell("0.6")
        time.sleep(0.2)
        assert ping_s() >= 0.6
        proxy.tell("0")
        time.sleep(0.2)
        assert ping_s() < 0.6


def test_pieces_do_not_wait_for_one_another():
    """Ten answers, one after the other on a connection: each is late by the delay, not by ten."""
    with (
        redis_process() as node,
        child("loadtest.chaos.slow_proxy", [node.port]) as proxy,
        socket.create_connection(("127.0.0.1", int(proxy.first_line)), timeout=5.0) as connection,
    ):
        proxy.tell("0.3")
        time.sleep(0.2)
        started_s = time.monotonic()
        for _ in range(10):
            connection.sendall(b"PING\r\n")
            time.sleep(0.01)
        received = b""
        while len(received) < 10 * len(b"+PONG\r\n"):
            received += connection.recv(100)
        assert time.monotonic() - started_s < 1.5


def test_an_answer_that_comes_when_its_asker_has_left_is_dropped(capfd):
    with redis_process() as node, child("loadtest.chaos.slow_proxy", [node.port]) as proxy:
        proxy.tell("0.2")
        time.sleep(0.2)
        with socket.create_connection(("127.0.0.1", int(proxy.first_line))) as connection:
            connection.sendall(b"PING\r\n")
            time.sleep(0.05)
        time.sleep(0.4)
        assert proxy.end() == ""
    assert capfd.readouterr().err == ""


def test_a_proxy_closes_where_its_target_is_away():
    with redis_process() as node, child("loadtest.chaos.slow_proxy", [node.port]) as proxy:
        node.kill()
        with socket.create_connection(("127.0.0.1", int(proxy.first_line))) as connection:
            connection.settimeout(5.0)
            assert connection.recv(1) == b""
        node.start()


def test_slow_clients_connect_drip_and_count_how_often_they_are_cut_off():
    """The server takes three connections, reads two drips of each, and closes them."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(10.0)
        arguments = [server.getsockname()[1], 3]
        with child("loadtest.chaos.slow_clients", arguments) as clients:
            connections = [server.accept()[0] for _ in range(3)]
            starts = sorted(connection.recv(1000) for connection in connections)
            assert clients.first_line == "3 of 3 are connected"
            assert all(start.startswith(b"POST /score HTTP/1.1\r\n") for start in starts)
            drips = sorted(connection.recv(1000) for connection in connections)
            assert set(drips) == {b"X-Drip: 1\r\n", b"a"}
            for connection in connections:
                connection.close()
            again = [server.accept()[0] for _ in range(3)]
            assert clients.end() == "3\n"
            for connection in again:
                connection.close()


def test_a_child_that_does_not_start_is_an_error(capfd):
    with (
        pytest.raises(ChaosError, match=r"loadtest\.chaos\.slow_proxy ended with status 1"),
        child("loadtest.chaos.slow_proxy", ["no port"]),
    ):
        pass
    assert "invalid literal" in capfd.readouterr().err
