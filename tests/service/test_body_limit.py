"""Bodies that are too large, announced or not, refused before they are gathered."""

import gzip
import json
import socket
from collections.abc import Iterator

import pytest

from tests.service.dummy_model import score_of
from tests.service.problem_answers import assert_invalid, assert_problem

LIMIT = 1000


@pytest.fixture
def limited(serve):
    return serve(max_body_bytes=LIMIT)


def body_of(n_bytes: int) -> bytes:
    """Return a request for item 2 of exactly so many bytes."""
    body = json.dumps({"user_id": "ann", "candidates": [2]}).encode()
    return body + b" " * (n_bytes - len(body))


def in_pieces(body: bytes, size: int | None = None) -> Iterator[bytes]:
    """Let httpx send the body chunked, without a length; in ten pieces unless said."""
    size = size or len(body) // 10
    for start in range(0, len(body), size):
        yield body[start : start + size]


def raw_exchange(address: tuple[str, int], request: bytes) -> bytes:
    """Send bytes as they are and return the first of the answer."""
    with socket.create_connection(address, timeout=30.0) as connection:
        connection.sendall(request)
        return connection.recv(65_536)


@pytest.mark.parametrize("send", [bytes, in_pieces], ids=["announced", "chunked"])
class TestBothWays:
    def test_a_body_of_the_limit_is_read(self, limited, send):
        answer = limited.client.post("/score", content=send(body_of(LIMIT)))
        assert answer.json()["scores"] == [score_of(2)]

    @pytest.mark.parametrize("n_bytes", [LIMIT + 1, 100 * LIMIT])
    def test_a_larger_one_is_answered_413(self, limited, send, n_bytes):
        answer = limited.client.post("/score", content=send(body_of(n_bytes)))
        problem = assert_problem(answer, 413, "body-too-large")
        assert problem["detail"] == "the body has more than 1,000 bytes"
        assert limited.model.runs == []

    def test_events_have_the_same_limit(self, limited, redis, send):
        answer = limited.client.post("/events", content=send(body_of(LIMIT + 1)))
        assert_problem(answer, 413, "body-too-large")
        assert redis.keys() == []

    def test_a_client_that_sends_it_all_still_reads_the_answer(self, service, send):
        """Megabytes more than any socket buffers; and the next request is answered."""
        answer = service.client.post("/score", content=send(b" " * 8_000_000))
        assert_problem(answer, 413, "body-too-large")
        assert service.scores("ann", [2]) == [score_of(2)]

    def test_it_is_counted(self, limited, send):
        limited.client.post("/score", content=send(body_of(LIMIT + 1)))
        assert limited.metric("mneme_requests_total", route="/score", status="413") == 1


class TestEncodings:
    @pytest.mark.parametrize("route", ["/score", "/recommend", "/explain", "/events"])
    @pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip"])
    def test_an_encoded_body_is_refused_and_not_unpacked(self, service, route, encoding):
        answer = service.client.post(
            route, content=gzip.compress(bytes(1000)), headers={"Content-Encoding": encoding}
        )
        problem = assert_problem(answer, 415, "unsupported-encoding")
        assert problem["detail"] == "the body has a Content-Encoding, expected plain JSON"

    def test_the_encoding_that_is_none_is_read(self, service):
        headers = {"Content-Encoding": "identity"}
        answer = service.client.post("/score", content=body_of(100), headers=headers)
        assert answer.json()["scores"] == [score_of(2)]


def test_an_announced_terabyte_is_refused_before_it_is_sent(limited):
    answer = raw_exchange(
        limited.address,
        b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: 1000000000000\r\n\r\n",
    )
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"urn:mneme:problem:body-too-large" in answer


def test_chunks_without_an_end_are_refused_at_the_limit(limited):
    answer = raw_exchange(
        limited.address,
        b"POST /score HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
        + 2 * (b"1f5\r\n" + 0x1F5 * b" " + b"\r\n"),
    )
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_chunks_may_split_the_body_anywhere(limited):
    """Even between the bytes of one character."""
    body = json.dumps({"user_id": "é⭐", "candidates": [2]}, ensure_ascii=False).encode()
    answer = limited.client.post("/score", content=in_pieces(body, size=1))
    assert answer.json()["scores"] == [score_of(2)]


def test_a_chunked_body_that_is_not_valid_is_explained(limited):
    answer = limited.client.post("/score", content=in_pieces(b'{"user_id": '))
    assert_invalid(answer, "body", "not valid JSON")


def test_a_client_that_leaves_amid_its_body_disturbs_nobody(limited):
    with socket.create_connection(limited.address) as connection:
        connection.sendall(
            b"POST /score HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n"
        )
    with socket.create_connection(limited.address) as connection:
        connection.sendall(b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: 90\r\n\r\n{")
    assert limited.scores("ann", [2]) == [score_of(2)]


def test_the_default_takes_every_body_that_the_fields_allow_for_candidates(service):
    """1,000 candidates of 19 digits, for a user of 128 bytes."""
    answer = service.score("x" * 128, [2**63 - 1 - n for n in range(1000)])
    assert answer.status_code == 200
