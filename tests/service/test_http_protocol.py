"""What a client may send below HTTP's meaning: heads, chunks, requests ahead; and how slowly."""

import asyncio
import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.service.dummy_model import score_of
from tests.service.live_service import PATIENCE_S, LiveService, in_background, wait_until

MAX_HEADER_BYTES = 4096
BODY = json.dumps({"user_id": "ann", "candidates": [1, 2]}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(BODY)
LINE = b"POST /score HTTP/1.1\r\nHost: test\r\n"
WHOLE = LINE + LENGTH + b"\r\n" + BODY
LAST = LINE + LENGTH + b"Connection: close\r\n\r\n" + BODY
CHUNKED = LINE + b"Transfer-Encoding: chunked\r\n"
ALIVE = b"GET /healthz HTTP/1.1\r\nHost: test\r\n\r\n"


def chunk(content: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(content), content)


class Connection:
    """A client that sends bytes as they are."""

    def __init__(self, service: LiveService) -> None:
        self._socket = socket.create_connection(service.address, timeout=PATIENCE_S)
        self._file = self._socket.makefile("rb")

    def send(self, content: bytes) -> None:
        self._socket.sendall(content)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and body of the next answer."""
        status_line = self._file.readline()
        assert status_line.startswith(b"HTTP/1.1 "), status_line
        headers = {}
        while (line := self._file.readline()) != b"\r\n":
            name, value = line.decode().split(":", 1)
            headers[name.lower()] = value.strip()
        return int(status_line.split()[1]), headers, self._file.read(int(headers["content-length"]))

    def scores(self) -> list[float]:
        status, _, body = self.answer()
        assert status == 200, body
        scores: list[float] = json.loads(body)["scores"]
        return scores

    def refusal(self, status: int, kind: str) -> str:
        """Expect a problem and the end of the connection; return its detail."""
        found, headers, body = self.answer()
        problem = json.loads(body)
        assert (found, problem["type"]) == (status, f"urn:mneme:problem:{kind}"), problem
        assert headers["content-type"] == "application/problem+json"
        assert headers["connection"] == "close"
        self.expect_end()
        return str(problem["detail"])

    def expect_end(self) -> None:
        assert self._file.read() == b""

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def limited(serve) -> LiveService:
    """A service of small heads, whose requests have ages to arrive."""
    service: LiveService = serve(max_header_bytes=MAX_HEADER_BYTES, request_read_s=PATIENCE_S)
    return service


@pytest.fixture
def connection(limited) -> Iterator[Connection]:
    connection = Connection(limited)
    yield connection
    connection.close()


def head_of(n_bytes: int, *, headers: int) -> bytes:
    """Return a request for /healthz whose head counts so many bytes, in so many more headers."""
    used = len("/healthz") + len("Host") + len("test") + 4
    each, rest = divmod(n_bytes - used, headers)
    values = [each - len("X-0000") - 4] * headers
    values[0] += rest
    lines = [b"X-%04d: %b\r\n" % (n, b"v" * size) for n, size in enumerate(values)]
    return b"GET /healthz HTTP/1.1\r\nHost: test\r\n" + b"".join(lines) + b"\r\n"


class TestHeads:
    @pytest.mark.parametrize("headers", [1, 100], ids=["one huge header", "many headers"])
    @pytest.mark.parametrize("piece", [7, 100_000], ids=["in pieces", "at once"])
    def test_a_head_of_the_limit_is_read(self, connection, headers, piece):
        request = head_of(MAX_HEADER_BYTES, headers=headers)
        for start in range(0, len(request), piece):
            connection.send(request[start : start + piece])
        assert connection.answer()[0] == 200

    @pytest.mark.parametrize("headers", [1, 100], ids=["one huge header", "many headers"])
    def test_a_larger_one_is_answered_431(self, connection, headers):
        connection.send(head_of(MAX_HEADER_BYTES + 1, headers=headers))
        detail = connection.refusal(431, "head-too-large")
        assert detail == "the request's target and headers have more than 4,096 bytes"

    @pytest.mark.parametrize(
        "flood",
        [
            pytest.param(b"GET /healthz HTTP/1.1\r\nX: " + b"v" * 1_000_000, id="value"),
            pytest.param(b"GET /healthz HTTP/1.1\r\n" + b"n" * 1_000_000, id="name"),
            pytest.param(b"GET /healthz HTTP/1.1\r\n" + b"a:\r\n" * 250_000, id="empty headers"),
            pytest.param(b"GET /" + b"u" * 1_000_000, id="target"),
            pytest.param(CHUNKED + b"\r\n" + b"0\r\n" + b"t:\r\n" * 250_000, id="trailers"),
            pytest.param(CHUNKED + b"\r\n" + b"0\r\nt:" + b"v" * 1_000_000, id="trailer"),
            pytest.param(CHUNKED + b"\r\n" + b"1;" + b"e" * 1_000_000, id="chunk extension"),
        ],
    )
    def test_what_never_ends_is_answered_without_waiting_for_its_end(self, connection, flood):
        connection.send(flood)
        connection.refusal(431, "head-too-large")

    def test_it_is_counted(self, limited, connection):
        connection.send(head_of(MAX_HEADER_BYTES + 1, headers=1))
        connection.refusal(431, "head-too-large")
        assert limited.metric("mneme_requests_total", route="other", status="431") == 1

    def test_a_second_head_is_counted_from_zero(self, connection):
        for _ in range(3):
            connection.send(head_of(MAX_HEADER_BYTES, headers=3))
            assert connection.answer()[0] == 200

    def test_trailers_are_no_headers(self, connection):
        """They come when the application has read its headers, and would change them."""
        connection.send(CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\nX-Deadline-Ms: soon\r\n\r\n")
        assert connection.scores() == [score_of(1), score_of(2)]


NO_HTTP = {
    "noise": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no method": b" /score HTTP/1.1\r\n\r\n",
    "an unknown method": b"SCORE /score HTTP/1.1\r\n\r\n",
    "another version": b"GET /healthz HTTP/7.3\r\n\r\n",
    "a target that is none": b"GET http://[/ HTTP/1.1\r\nHost: test\r\n\r\n",
    "bytes beyond ASCII in the target": b"GET /\xff HTTP/1.1\r\nHost: test\r\n\r\n",
    "a tunnel": b"CONNECT test:80 HTTP/1.1\r\nHost: test\r\n\r\n",
    "NUL in a header": b"GET /healthz HTTP/1.1\r\nX: a\0b\r\n\r\n",
    "a name with a space": b"GET /healthz HTTP/1.1\r\nX Y: a\r\n\r\n",
    "a space before the colon": LINE + b"Content-Length : 5\r\n\r\nabcde",
    "a line that goes on": b"GET /healthz HTTP/1.1\r\nX: a\r\n b: c\r\n\r\n",
    "length and chunks": LINE + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n" + chunk(BODY),
    "chunks and length": CHUNKED + LENGTH + b"\r\n" + chunk(BODY),
    "two lengths": LINE + LENGTH + b"Content-Length: 3\r\n\r\n" + BODY,
    "the same length twice": LINE + LENGTH + LENGTH + b"\r\n" + BODY,
    "a list of lengths": LINE + b"Content-Length: 5, 5\r\n\r\nabcde",
    "a negative length": LINE + b"Content-Length: -1\r\n\r\n",
    "a signed length": LINE + b"Content-Length: +5\r\n\r\nabcde",
    "a length in hex": LINE + b"Content-Length: 0x5\r\n\r\nabcde",
    "a length of 30 digits": LINE + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n",
    "another transfer encoding": LINE + b"Transfer-Encoding: gzip\r\n\r\n" + BODY,
    "almost chunked": LINE + b"Transfer-Encoding: xchunked\r\n\r\n" + chunk(BODY),
    "chunked, and then not": LINE + b"Transfer-Encoding: chunked, identity\r\n\r\n" + chunk(BODY),
    "a chunk without a size": CHUNKED + b"\r\n\r\n" + BODY,
    "a chunk of a negative size": CHUNKED + b"\r\n-5\r\nabcde\r\n",
    "a chunk of a size in 0x": CHUNKED + b"\r\n0x5\r\nabcde\r\n",
    "a chunk of 2 to the 64": CHUNKED + b"\r\n10000000000000000\r\n",
    "a chunk longer than it says": CHUNKED + b"\r\n3\r\nabcde\r\n0\r\n\r\n",
}


class TestNoHttp:
    @pytest.mark.parametrize("request_", NO_HTTP.values(), ids=NO_HTTP.keys())
    def test_it_is_answered_400_and_nothing_runs(self, limited, connection, request_):
        connection.send(request_ + WHOLE)
        assert connection.refusal(400, "malformed-request")
        assert limited.model.runs == []

    def test_it_is_counted(self, limited, connection):
        connection.send(NO_HTTP["noise"])
        connection.refusal(400, "malformed-request")
        assert limited.metric("mneme_requests_total", route="other", status="400") == 1

    def test_an_application_that_waits_for_the_body_is_told(self, limited, connection):
        connection.send(CHUNKED + b"\r\n" + chunk(b"{") + b"no size\r\n")
        connection.refusal(400, "malformed-request")
        limited.wait_for("mneme_requests_total", 1, route="/score", status="499")

    def test_what_was_asked_before_is_answered_first(self, limited, connection):
        with limited.model.held():
            connection.send(WHOLE + NO_HTTP["noise"])
            limited.model.wait_until_busy()
        assert connection.scores() == [score_of(1), score_of(2)]
        connection.expect_end()

    def test_a_body_that_was_refused_already_is_not_refused_again(self, serve):
        """One answer a request: a second one would be taken for the next request's."""
        connection = Connection(serve(max_body_bytes=10))
        connection.send(CHUNKED + b"\r\n" + chunk(BODY))
        assert connection.answer()[0] == 413
        connection.send(b"no size\r\n")
        connection.expect_end()
        connection.close()


AHEAD = WHOLE + ALIVE + CHUNKED + b"\r\n" + chunk(BODY[:9]) + chunk(BODY[9:]) + b"0\r\nX: y\r\n\r\n"


class TestRequestsAhead:
    def test_they_are_answered_in_their_order(self, connection):
        connection.send(WHOLE + ALIVE + WHOLE)
        assert connection.scores() == [score_of(1), score_of(2)]
        assert json.loads(connection.answer()[2]) == {"status": "alive"}
        assert connection.scores() == [score_of(1), score_of(2)]

    def test_of_thousands_some_are_answered_and_the_rest_is_not_kept(self, limited, connection):
        """A client sends again what has no answer when the connection ends."""
        with limited.model.held():
            connection.send(WHOLE + 5000 * ALIVE)
            limited.model.wait_until_busy()
        assert connection.scores() == [score_of(1), score_of(2)]
        answered = [connection.answer() for _ in range(64)]
        assert [status for status, _, _ in answered] == [200] * 64
        assert answered[-1][1]["connection"] == "close"
        connection.expect_end()

    def test_a_slow_answer_costs_the_next_request_none_of_its_time(self, serve):
        """The service does not read on while it answers, and must not blame the client for it."""
        service = serve(request_read_s=0.5)
        connection = Connection(service)
        with service.model.held():
            connection.send(WHOLE + LINE + LENGTH + b"\r\n" + BODY[:5])
            service.model.wait_until_busy()
            time.sleep(1.0)
        assert connection.scores() == [score_of(1), score_of(2)]
        connection.send(BODY[5:])
        assert connection.scores() == [score_of(1), score_of(2)]
        connection.close()

    @given(st.sets(st.integers(1, len(AHEAD) - 1), max_size=12))
    @settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_wherever_they_are_cut_they_are_the_same(self, service, cuts):
        connection = Connection(service)
        places = [0, *sorted(cuts), len(AHEAD)]
        for start, end in pairwise(places):
            connection.send(AHEAD[start:end])
            time.sleep(0.0005)  # so that it is a packet of its own
        assert connection.scores() == [score_of(1), score_of(2)]
        assert json.loads(connection.answer()[2]) == {"status": "alive"}
        assert connection.scores() == [score_of(1), score_of(2)]
        connection.close()


class TestUpgrades:
    @pytest.mark.parametrize("protocol", [b"websocket", b"h2c", b"nonsense"])
    def test_they_are_not_followed_and_the_request_is_answered(self, connection, protocol):
        asked = ALIVE[:-2] + b"Connection: Upgrade\r\nUpgrade: " + protocol + b"\r\n\r\n"
        connection.send(asked + b"\x81\x85\x37\xfa\x21\x3d")
        status, headers, _ = connection.answer()
        assert status == 200
        assert headers["connection"] == "close"
        connection.expect_end()

    def test_a_body_with_one_is_refused(self, connection):
        connection.send(LINE + LENGTH + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n" + BODY)
        detail = connection.refusal(400, "malformed-request")
        assert detail == "only HTTP/1.1 is spoken: a body cannot ask for an upgrade"


SLOWLY = {
    "no request": b"",
    "empty lines": b"\r\n\r\n",
    "half a line": b"POST /sc",
    "half a head": LINE + b"X-Some: thi",
    "no body": LINE + LENGTH + b"\r\n",
    "half a body": LINE + LENGTH + b"\r\n" + BODY[:9],
    "no last chunk": CHUNKED + b"\r\n" + chunk(BODY),
    "half a trailer": CHUNKED + b"\r\n" + chunk(BODY) + b"0\r\nX-Some: thi",
}


class TestTime:
    @pytest.mark.parametrize("begun", list(SLOWLY.values())[2:], ids=list(SLOWLY)[2:])
    def test_what_does_not_arrive_in_time_is_answered_408(self, serve, begun):
        connection = Connection(serve(request_read_s=0.3))
        connection.send(begun)
        detail = connection.refusal(408, "request-too-slow")
        assert detail == "the request had not arrived 0.3 s after it had begun"
        connection.close()

    @pytest.mark.parametrize("begun", list(SLOWLY.values())[:2], ids=list(SLOWLY)[:2])
    def test_a_connection_on_which_nothing_is_asked_is_closed(self, serve, begun):
        connection = Connection(serve(request_read_s=0.3))
        connection.send(begun)
        connection.expect_end()
        connection.close()

    def test_a_connection_that_asks_nothing_more_is_closed(self, serve):
        connection = Connection(serve(keep_alive_s=0.3))
        connection.send(ALIVE)
        assert connection.answer()[0] == 200
        connection.expect_end()
        connection.close()

    def test_empty_lines_do_not_keep_it_open(self, serve):
        connection = Connection(serve(keep_alive_s=0.3, request_read_s=10 * PATIENCE_S))
        connection.send(ALIVE)
        assert connection.answer()[0] == 200
        connection.send(b"\r\n")
        connection.expect_end()
        connection.close()

    def test_the_time_of_the_answer_is_not_the_clients(self, serve):
        service = serve(request_read_s=0.2)
        connection = Connection(service)
        with service.model.held():
            connection.send(WHOLE)
            service.model.wait_until_busy()
            time.sleep(0.6)
        assert connection.scores() == [score_of(1), score_of(2)]
        connection.close()

    def test_each_request_has_its_own_time(self, serve):
        service = serve(request_read_s=2.0)
        connection = Connection(service)
        for _ in range(4):
            for piece in (WHOLE[:40], WHOLE[40:]):
                connection.send(piece)
                time.sleep(0.3)
            assert connection.scores() == [score_of(1), score_of(2)]
        connection.close()

    @pytest.fixture
    def answered_early(self, serve) -> Iterator[Callable[..., Connection]]:
        """Return a function that begins a request and reads the answer, which is there already."""
        with ExitStack() as stack:

            def begin(**changes: float) -> Connection:
                connection = Connection(serve(max_body_bytes=len(BODY) - 1, **changes))
                stack.callback(connection.close)
                connection.send(LINE + LENGTH + b"\r\n")
                assert connection.answer()[0] == 413
                return connection

            yield begin

    def test_an_early_answer_leaves_the_connection_to_further_requests(self, answered_early):
        connection = answered_early(request_read_s=0.5)
        connection.send(BODY)
        time.sleep(0.8)
        connection.send(ALIVE)
        assert connection.answer()[0] == 200

    def test_the_next_request_has_a_time_of_its_own(self, answered_early):
        connection = answered_early(request_read_s=1.0)
        time.sleep(0.5)
        connection.send(BODY + ALIVE[:9])
        time.sleep(0.6)
        connection.send(ALIVE[9:])
        assert connection.answer()[0] == 200

    def test_what_remains_of_a_request_with_an_early_answer_must_arrive(self, answered_early):
        connection = answered_early(request_read_s=0.3, keep_alive_s=10 * PATIENCE_S)
        connection.send(BODY[:9])
        connection.expect_end()

    def test_without_a_further_request_its_connection_is_closed(self, answered_early):
        connection = answered_early(request_read_s=10 * PATIENCE_S, keep_alive_s=0.3)
        connection.send(BODY)
        connection.expect_end()

    def test_a_slow_body_is_awaited_after_an_early_answer(self, answered_early):
        connection = answered_early(request_read_s=PATIENCE_S, keep_alive_s=0.3)
        time.sleep(0.6)
        connection.send(BODY + ALIVE)
        assert connection.answer()[0] == 200

    def test_what_is_sent_after_a_refusal_does_not_keep_the_connection(self, limited):
        connection = Connection(limited)
        connection.send(NO_HTTP["noise"])

        def go_on() -> None:
            while True:
                connection.send(b"x" * 1000)
                time.sleep(0.05)

        with pytest.raises(OSError, match=r"reset|pipe"):
            go_on()
        connection.close()


class TestSlowClients:
    """A thousand clients that send a byte now and then."""

    N_CLIENTS = 1000
    READ_S = 2.0

    def test_they_starve_nobody_and_are_sent_away(self, serve):
        service = serve(request_read_s=self.READ_S)

        async def drip(bodies: bool) -> int:
            reader, writer = await asyncio.open_connection(*service.address)
            try:
                writer.write(LINE + (LENGTH + b"\r\n" if bodies else b"X-Some: "))
                while not reader.at_eof():
                    writer.write(b"{")
                    try:
                        answer = await asyncio.wait_for(reader.read(1000), 0.3)
                    except TimeoutError:
                        continue
                    return int(answer.split()[1])
            finally:
                writer.close()
            return 0

        async def all_drip() -> list[int]:
            clients = [drip(number % 2 == 0) for number in range(self.N_CLIENTS)]
            return await asyncio.gather(*clients)

        with in_background() as begin:
            dripping = begin(asyncio.run, all_drip())
            wait_until(
                lambda: len(service.server.server_state.connections) >= self.N_CLIENTS // 2,
                "the slow clients are there",
            )
            answered = 0
            while not dripping.done():
                assert service.scores() == [score_of(1)]
                answered += 1
        assert answered > 10
        assert dripping.result() == [408] * self.N_CLIENTS
        wait_until(
            lambda: len(service.server.server_state.connections) <= 1, "none of them is kept"
        )
