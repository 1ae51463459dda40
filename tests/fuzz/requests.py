"""What comes by HTTP: the bytes of a connection, bodies, headers; and the experiments file."""

import asyncio
import json
import math
import re
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fastapi.exceptions import RequestValidationError
from pydantic import TypeAdapter, ValidationError
from uvicorn import Config
from uvicorn.server import ServerState

from contract.records import MAX_ITEM, MAX_TIME, MAX_USER_ID_BYTES, decode_records, encode_records
from service import score_endpoint
from service.experiment import Experiment, ExperimentError, parse_experiment
from service.http_protocol import HttpProtocol
from service.problems import validation_response
from service.schemas import (
    MAX_CANDIDATES,
    MAX_DEADLINE_MS,
    MAX_EVENTS,
    MAX_EXPLAINED,
    MAX_RECOMMENDATIONS,
    EventBatch,
    EventsBody,
    ExplainBody,
    RecommendBody,
    ScoreBody,
)
from service.trace_context import read_context
from tests.fuzz.pieces import Pieces

_EXPLAIN = TypeAdapter[ExplainBody](ExplainBody)
_RECOMMEND = TypeAdapter[RecommendBody](RecommendBody)
_EVENTS: TypeAdapter[Any] = TypeAdapter(EventsBody)
_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
_PARENT = re.compile(rb"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]")
_MAX_HEADER_BYTES = 256


def _check_user(user_id: str) -> None:
    assert 1 <= len(user_id.encode()) <= MAX_USER_ID_BYTES


def _check_refusal(error: RequestValidationError) -> None:
    answer = validation_response(error)
    problem = json.loads(bytes(answer.body))
    assert answer.status_code == problem["status"] == 422
    assert problem["detail"]
    assert 1 <= len(problem["errors"]) <= 10


def _scores(given: Pieces) -> None:
    try:
        body = score_endpoint._parse(given.rest())  # what a request goes through
    except RequestValidationError as error:
        _check_refusal(error)
        return
    _check_user(body.user_id)
    assert 1 <= len(body.candidates) <= MAX_CANDIDATES
    assert np.frombuffer(array("q", body.candidates), dtype=np.int64).min() >= 1
    if body.history is not None:
        records_N = decode_records(score_endpoint._records(body.history))
        assert len(records_N) == len(body.history)
    assert ScoreBody.model_validate_json(body.model_dump_json()) == body


def _by_route(adapter: TypeAdapter[Any], raw: bytes) -> Any:
    """Return what FastAPI would hand to a route; None where it would answer 422."""
    try:
        return adapter.validate_python(json.loads(raw))
    except ValidationError as error:
        _check_refusal(RequestValidationError(error.errors(include_url=False)))
    except (ValueError, RecursionError):
        pass
    return None


def _explanations(given: Pieces) -> None:
    body = _by_route(_EXPLAIN, given.rest())
    if body is not None:
        _check_user(body.user_id)
        assert 1 <= len(body.candidates) <= MAX_EXPLAINED
        assert all(1 <= item_id <= MAX_ITEM for item_id in body.candidates)
        assert ExplainBody.model_validate_json(body.model_dump_json()) == body


def _recommendations(given: Pieces) -> None:
    body = _by_route(_RECOMMEND, given.rest())
    if body is not None:
        _check_user(body.user_id)
        assert 1 <= body.k <= MAX_RECOMMENDATIONS
        assert body.ranking_time is None or 0 <= body.ranking_time <= MAX_TIME
        assert RecommendBody.model_validate_json(body.model_dump_json()) == body


def _events(given: Pieces) -> None:
    body = _by_route(_EVENTS, given.rest())
    if body is None:
        return
    events = body.events if isinstance(body, EventBatch) else [body]
    assert 1 <= len(events) <= MAX_EVENTS
    for event in events:
        _check_user(event.user_id)
    raw = encode_records([e.item_id for e in events], [e.time or 0 for e in events])
    assert decode_records(raw)["item"].tolist() == [event.item_id for event in events]


def _headers(given: Pieces) -> None:
    names = (b"x-deadline-ms", b"x-request-id", b"traceparent", b"tracestate")
    headers = list(zip(names, given.parts(len(names)), strict=True))
    try:
        deadline_s = score_endpoint._deadline_s({"headers": headers}, 0.03)
    except RequestValidationError as error:
        _check_refusal(error)
    else:
        assert 0 < deadline_s <= MAX_DEADLINE_MS / 1000
    handed_on = dict(read_context(headers).headers)
    assert _ID.fullmatch(handed_on[b"x-request-id"])
    assert _PARENT.fullmatch(handed_on[b"traceparent"])


def _experiments(given: Pieces) -> None:
    try:
        experiment = parse_experiment(given.rest(), Path("/srv/experiments.toml"))
    except ExperimentError as error:
        if not str(error).startswith("/srv/experiments.toml: "):
            raise
        return
    answering = {name: arm.share for name, arm in experiment.arms.items() if not arm.shadow}
    assert math.isclose(math.fsum(answering.values()), 1, abs_tol=1e-6)
    assert experiment.arm_of("ann") in answering
    assert set(experiment.shadows_of("ann")) <= set(experiment.arms) - set(answering)
    for arm in experiment.arms.values():
        assert 0 < arm.device_weight < math.inf
        assert arm.bundle.is_absolute()
    assert Experiment.model_validate_json(experiment.model_dump_json()).salt == experiment.salt


class _Transport(asyncio.Transport):
    """Keeps what is written; expects nothing more after the end."""

    def __init__(self) -> None:
        super().__init__()
        self.written = bytearray()
        self.ended = self.closing = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return ("127.0.0.1", 8000) if name in {"sockname", "peername"} else default

    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.ended
        self.written += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        self.ended = True

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        self.closing = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


async def _echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the size of the body, unless the client has left."""
    size, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        size += len(message["body"])
        more = message["more_body"]
    assert sum(len(n) + len(v) + 4 for n, v in scope["headers"]) <= _MAX_HEADER_BYTES
    body = b"%d" % size
    headers = [(b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


_CONFIG = Config(_echo, ws="none", lifespan="off", proxy_headers=False, log_config=None)
_ANSWER = re.compile(rb"HTTP/1\.1 (\d{3}) [^\r\n]+\r\n(?:[a-z-]+: [^\r\n]*\r\n)+\r\n")


def _connections(given: Pieces) -> None:
    """Two pieces of bytes, with time in between."""
    first, second = given.parts(2)
    asyncio.run(_connect(first, second))


async def _connect(first: bytes, second: bytes) -> None:
    state, transport = ServerState(), _Transport()
    protocol = HttpProtocol(
        config=_CONFIG,
        server_state=state,
        app_state={},
        max_header_bytes=_MAX_HEADER_BYTES,
        request_read_s=60.0,
        keep_alive_s=60.0,
    )
    protocol.connection_made(transport)
    for data in (first, second):
        if not transport.closing:
            protocol.data_received(data)
        for _ in range(3):
            await asyncio.sleep(0)
    while state.tasks and transport.written.count(b"HTTP/1.1 200") < 100:
        before = len(transport.written)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        if len(transport.written) == before:  # they wait for what does not come
            break
    protocol.connection_lost(None)
    await asyncio.gather(*state.tasks)
    answers = bytes(transport.written).replace(b"HTTP/1.1 100 Continue\r\n\r\n", b"")
    statuses = [int(found[1]) for found in _ANSWER.finditer(answers)]
    assert set(statuses) <= {200, 400, 431}
    assert all(status == 200 for status in statuses[:-1])  # a refusal is the last word
    assert bool(answers) == bool(statuses)
    if statuses and statuses[-1] != 200:
        assert transport.ended


ASKED: list[Callable[[Pieces], None]] = [
    _scores,
    _explanations,
    _recommendations,
    _events,
    _headers,
    _experiments,
    _connections,
]
TOKENS = [
    *(b'"user_id"', b'"candidates"', b'"ranking_time"', b'"history"', b'"item_id"', b'"time"'),
    *(b'"arm"', b'"events"', b'"k"', b'"exclude_seen"', b"NaN", b"Infinity", b"1e999", b"[[[["),
    *(b"9223372036854775807", b"9223372036854775808", b"\\ud800", b"\\u0000", b"null", b"true"),
    *(b"\r\n\r\n", b"Content-Length: 5\r\n", b"Transfer-Encoding: chunked\r\n", b"0\r\n\r\n"),
    *(b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"Expect: 100-continue\r\n", b"HTTP/1.0\r\n"),
    *(b"[arms.a]\n", b"share = 1.0\n", b'bundle = "a"\n', b"shadow = true\n", b"weight = inf\n"),
]


def one_input(data: bytes) -> None:
    """Decode one of them; whatever is raised but what is documented is a find."""
    given = Pieces(data)
    ASKED[given.byte() % len(ASKED)](given)


def seeds() -> list[bytes]:
    """Return inputs that are good ones, and some that nearly are."""
    experiment = (
        b'salt = "s"\n[arms.a]\nbundle = "a"\nshare = 1.0\nhistory_length = 5\n'
        b'[arms.b]\nbundle = "b"\nshare = 0.1\nshadow = true\nweight = 0.5\n'
    )
    score = (
        b'{"user_id": "4711", "candidates": [1193, 661], "ranking_time": 978300760, '
        b'"arm": "main", "history": [{"item_id": 3186, "time": 978300019}]}'
    )
    headers = b"\x02\x00\x04\x00\x37\x0030abcd00-" + b"a" * 32 + b"-" + b"b" * 16 + b"-01a=b"
    request = b"POST /score HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nabcde"
    chunked = (
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5;e=1\r\nabcde\r\n0\r\nT: v\r\n\r\n"
    )
    upgrade = b"GET / HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n\x81\x85"
    connections = [
        request,
        request + request,
        chunked + request,
        upgrade,
        request + b"\x16\x03",
        b"GET / HTTP/1.1\r\nX: " + 300 * b"v",
    ]
    return [
        b"\0" + score,
        b"\1" + score,
        b'\2{"user_id": 4711, "k": 3, "exclude_seen": true, "ranking_time": 978300760}',
        b'\3{"user_id": "4711", "item_id": 1193, "time": 978300760}',
        b'\3{"events": [{"user_id": "4711", "item_id": 1193}]}',
        b"\4" + headers,
        b"\5" + experiment,
        *(b"\6" + len(one[:40]).to_bytes(2, "little") + one for one in connections),
        *(b"\6" + len(one).to_bytes(2, "little") + one for one in connections),
    ]
