"""Connections: no more than may be, none that is kept for a client that does not read."""

import asyncio
import os
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.service.dummy_process import dummy_process
from tests.service.histories import NOW, records, steps
from tests.service.live_service import PATIENCE_S, LiveService, wait_until
from tests.service.problem_answers import assert_problem

# Answers of some 400 kB and 40 kB: more than the buffers of a socket, where they are made small.
LARGE = b"GET /users/ann/history?limit=10000 HTTP/1.1\r\nHost: test\r\n%b\r\n"
MEDIUM = b"GET /users/ann/history?limit=1000 HTTP/1.1\r\nHost: test\r\n\r\n"
SMALL = [
    pytest.param(
        b"POST %b HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body),
        id=path.decode(),
    )
    for path, body in [
        (b"/recommend", b'{"user_id": "ann", "k": 90}'),
        (b"/explain", b'{"user_id": "ann", "candidates": [1, 2, 3]}'),
        (b"/score", b'{"user_id": "ann", "candidates": [1, 2, 3]}'),
    ]
]
N_BEHAVIORS = 10_000
# In place of bytes: the client closes its side.
EOF = None


@contextmanager
def connections(service: LiveService, count: int) -> Iterator[list[socket.socket]]:
    """Open connections that say nothing; return when the server has taken all of them."""
    with ExitStack() as stack:
        opened = [
            stack.enter_context(socket.create_connection(service.address, timeout=PATIENCE_S))
            for _ in range(count)
        ]
        wait_until(lambda: n_open(service) >= count, "the server has taken them")
        yield opened


def n_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def n_open(service: LiveService) -> int:
    return len(service.server.server_state.connections)


def waiting_bytes(service: LiveService) -> int:
    """Return how much the sockets of all connections have not taken."""
    connections: list[Any] = list(service.server.server_state.connections)
    return sum(connection.transport.get_write_buffer_size() for connection in connections)


class TestLimit:
    def test_one_connection_too_many_is_told_so_and_closed(self, serve):
        service = serve(max_connections=4)
        with connections(service, 4):
            with httpx.Client(base_url=service.client.base_url, trust_env=False) as another:
                answer = another.get("/healthz")
            problem = assert_problem(answer, 503, "too-many-connections")
            assert problem["detail"] == "4 connections are open, which is as many as may be"
            assert answer.headers["Retry-After"] == "1"
            assert answer.headers["Connection"] == "close"
            wait_until(lambda: n_open(service) == 4, "it is gone")
        wait_until(lambda: n_open(service) == 0, "all are gone")
        assert service.scores() == [1.0]
        assert service.metric("mneme_requests_total", route="other", status="503") == 1
        assert service.metric("mneme_connections") == 1

    def test_those_that_are_open_go_on(self, serve):
        service = serve(max_connections=1)
        assert service.scores() == [1.0]
        with socket.create_connection(service.address, timeout=PATIENCE_S) as another:
            assert another.recv(10_000).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert service.scores() == [1.0]

    def test_a_flood_of_them_leaves_nothing_behind(self, serve):
        service = serve(max_connections=10)
        assert service.scores() == [1.0]
        before = n_files()
        for _ in range(5):
            with connections(service, 10), ExitStack() as stack:
                for _ in range(100):
                    stack.enter_context(
                        socket.create_connection(service.address, timeout=PATIENCE_S)
                    )
                wait_until(lambda: n_open(service) == 10, "the others are refused")
        wait_until(lambda: n_open(service) <= 1, "all are gone")
        wait_until(lambda: n_files() <= before, "so are their descriptors")
        assert service.scores() == [1.0]


class TestSlowReaders:
    """Clients that ask and do not read."""

    @pytest.fixture
    def slow(self, serve, redis) -> LiveService:
        """A service that cuts them off soon, and whose sockets take little."""
        redis.set("history:ann", records(*steps(*range(1, N_BEHAVIORS + 1), start=NOW)))
        service: LiveService = serve(
            answer_taken_s=0.5, request_read_s=0.2, keep_alive_s=10 * PATIENCE_S, explains=True
        )
        listening = service.server.servers[0].sockets[0].fileno()
        with socket.socket(fileno=os.dup(listening)) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # theirs, too
        return service

    @contextmanager
    def client(self, service: LiveService, request: bytes) -> Iterator[socket.socket]:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.settimeout(PATIENCE_S)
            connection.connect(service.address)
            connection.sendall(request)
            wait_until(lambda: n_open(service) == 1, "the server has taken the connection")
            yield connection

    @pytest.mark.parametrize(
        "header", [b"", b"Connection: close\r\n"], ids=["keep-alive", "to be closed"]
    )
    def test_a_large_answer_that_nobody_reads_is_given_up(self, slow, header):
        with self.client(slow, LARGE % header) as connection:
            wait_until(lambda: n_open(slow) == 0, "the connection is cut off")
            received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.count(b'"item_id"') < N_BEHAVIORS

    @pytest.mark.parametrize("later", [b"", b"\r\n", b"GET /hea", b"noise\r\n", EOF], ids=repr)
    def test_so_is_one_that_nearly_fits_whatever_is_sent_after_it(self, slow, later):
        """The service closes the connection in most of the cases: that waits for the answer."""
        with self.client(slow, MEDIUM) as connection:
            wait_until(lambda: waiting_bytes(slow) > 0, "the answer does not fit")
            assert waiting_bytes(slow) < 65_536
            if later is EOF:
                connection.shutdown(socket.SHUT_WR)
            else:
                connection.sendall(later)
            wait_until(lambda: n_open(slow) == 0, "the connection is cut off")

    def test_a_service_that_ends_waits_for_it_no_longer(self, slow):
        with self.client(slow, MEDIUM):
            wait_until(lambda: waiting_bytes(slow) > 0, "the answer does not fit")
            slow.server.should_exit = True
            wait_until(lambda: n_open(slow) == 0, "the connection is cut off")

    @pytest.mark.parametrize("request_bytes", SMALL)
    def test_so_are_small_ones_of_a_client_that_asks_again_and_again(self, slow, request_bytes):
        with self.client(slow, request_bytes) as connection:
            connection.settimeout(0)

            def asks_on() -> bool:
                try:
                    connection.send(request_bytes)
                except BlockingIOError:
                    pass
                except (BrokenPipeError, ConnectionResetError):
                    return True
                return n_open(slow) == 0

            wait_until(asks_on, "the connection is cut off")

    def test_who_reads_slowly_but_in_time_gets_all_of_it(self, slow):
        """In pieces, each after a pause."""
        with self.client(slow, LARGE % b"Connection: close\r\n") as connection:
            time.sleep(0.1)
            received = read_all(connection)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.count(b'"item_id"') == N_BEHAVIORS


def read_all(connection: socket.socket) -> bytes:
    """Return what there is to be read until the server closes, or resets, the connection."""
    received = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65_536):
            received += piece
    return received


class TestOverload:
    """A process of its own, three times as many clients as may be, each with a large request."""

    MOST = 150
    BODY_BYTES = 32_768

    def test_memory_and_descriptors_stay_within_bounds(self, redis_url, tmp_path):
        """So much for each connection: 64 KiB, and eight times the largest body."""
        settings = {
            "max_connections": self.MOST,
            "max_body_bytes": self.BODY_BYTES,
            "max_batch_work": 1,  # one after the other: all others wait
            "redis_url": redis_url,
            "redis_timeout_s": 5.0,
        }
        body = large_body(self.BODY_BYTES)
        with dummy_process(tmp_path, **settings) as service:
            for _ in range(20):
                assert service.score().status_code == 200
            files, resident_bytes = service.n_files, service.resident_bytes_from_here_on()
            statuses = asyncio.run(flood(service.url, body, clients=3 * self.MOST, seconds=3.0))
            assert statuses[200] > 0
            assert statuses[503] > 0
            assert set(statuses) <= {200, 429, 503, CUT_OFF}
            allowed_bytes = self.MOST * (65_536 + 8 * self.BODY_BYTES)
            assert service.peak_resident_bytes - resident_bytes < allowed_bytes
            wait_until(lambda: service.n_files <= files, "the descriptors are free again")
            assert service.score().status_code == 200

    def test_a_process_without_descriptors_waits_for_some_and_does_not_spin(
        self, redis_url, tmp_path
    ):
        with dummy_process(tmp_path, redis_url=redis_url, redis_timeout_s=5.0) as service:
            assert service.score().status_code == 200
            files = service.n_files
            service.allow_files(files + 5)
            port = int(service.url.rpartition(":")[2])
            with ExitStack() as stack:
                for _ in range(50):
                    stack.enter_context(
                        socket.create_connection(("127.0.0.1", port), timeout=PATIENCE_S)
                    )
                wait_until(lambda: service.n_files >= files + 4, "they are used up")
                cpu_s = service.cpu_s
                time.sleep(1.0)
                assert service.cpu_s - cpu_s < 0.5
            wait_until(lambda: service.n_files <= files, "the descriptors are free again")
            assert service.score().status_code == 200


# In place of a status: the server has closed the connection without an answer.
CUT_OFF = 0


def large_body(size: int) -> bytes:
    """Return a request of nearly so many bytes, which is a history."""
    behavior = b'{"item_id":1,"time":1}'
    count = (size - 100) // (len(behavior) + 1)
    history = b",".join([behavior] * count)
    return b'{"user_id":"ann","candidates":[1,2,3],"history":[' + history + b"]}"


async def flood(url: str, body: bytes, *, clients: int, seconds: float) -> Counter[int]:
    """Let so many clients ask, each for one answer after the other; return the statuses."""
    host, port = url.removeprefix("http://").split(":")
    request = (
        b"POST /score HTTP/1.1\r\nHost: test\r\nX-Deadline-Ms: 60000\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    statuses: Counter[int] = Counter()
    ends = time.monotonic() + seconds

    async def client() -> None:
        while time.monotonic() < ends:
            try:
                reader, writer = await asyncio.open_connection(host, port)
                with closing(writer):
                    while time.monotonic() < ends:
                        writer.write(request)
                        head = await reader.readuntil(b"\r\n\r\n")
                        statuses[int(head.split()[1])] += 1
                        (length,) = re.findall(rb"content-length: (\d+)", head)
                        await reader.readexactly(int(length))
            except (ConnectionError, asyncio.IncompleteReadError):
                statuses[CUT_OFF] += 1
                await asyncio.sleep(0.05)

    async with asyncio.timeout(PATIENCE_S + seconds):
        await asyncio.gather(*(client() for _ in range(clients)))
    return statuses
