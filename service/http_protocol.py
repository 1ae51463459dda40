"""uvicorn's HTTP/1.1 protocol, with an end to what a client may send and how long it may take.

uvicorn's own has neither: a head may have any size, a request may take for ever to arrive, and
requests that are sent ahead (pipelined) are kept whatever their number.
"""

import asyncio
from typing import Any

import httptools
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.errors import (
    HeadTooLargeError,
    MalformedRequestError,
    RequestTooSlowError,
    ServiceError,
)
from service.metrics import Metrics
from service.problems import problem_response

# Where the lifespan leaves the application's metrics for its connections.
METRICS = "mneme.metrics"

# What refused requests count as: their path, if there is one yet, means nothing.
_ROUTE = "other"
# Requests that wait on one connection for the answer of an earlier one.
_MAX_PIPELINED = 64
_OF_A_BODY = (b"content-length", b"transfer-encoding")
# ": " and the end of the line.
_BYTES_AROUND_A_HEADER = 4
# A connection that is closed with unread bytes is reset, and the client may lose the answer: what
# it still sends is thrown away for so long.
_LINGER_S = 1.0


class HttpProtocol(HttpToolsProtocol):
    """One connection.

    `max_header_bytes`: target, names and values of a request's head, and trailers: more are
    answered 431. `request_read_s`: seconds from the beginning of a request, or of the connection,
    to the last byte of the request's body: what takes longer is answered 408. `keep_alive_s`:
    seconds that an answered connection may wait for its next request. What is no HTTP/1.1 is
    answered 400. All of them close the connection, once the requests before have their answers.
    """

    def __init__(
        self,
        *args: Any,
        max_header_bytes: int,
        request_read_s: float,
        keep_alive_s: float,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = keep_alive_s  # type: ignore[assignment]  # goes to call_later
        self.metrics: Metrics | None = self.app_state.get(METRICS)
        self._max_header_bytes = max_header_bytes
        self._request_read_s = request_read_s
        self._reading: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle | None = None
        # Of the message that is being received.
        self._in_message = False
        self._in_head = False
        self._head_bytes = 0
        self._unparsed_bytes = 0
        # Nothing more is read: what has been accepted is answered, and the connection is closed.
        self._ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request."""
        super().connection_made(transport)
        self._reading = self.loop.call_later(self._request_read_s, self._too_slow)

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._stop_clock()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has come, refuse what does not hold."""
        if len(data) <= self._max_header_bytes:
            self._feed(data)
            return
        # Bit by bit, so that the limit is noticed before all of it has been parsed.
        for start in range(0, len(data), self._max_header_bytes):
            self._feed(data[start : start + self._max_header_bytes])

    def _feed(self, data: bytes) -> None:
        if self._ending or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._unparsed_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request is answered as if it had not asked; the parser reads nothing more.
            self._ending = True
        except httptools.HttpParserError as error:
            refusal = error.__context__
            if not isinstance(refusal, ServiceError):
                refusal = MalformedRequestError(f"the request is not valid HTTP/1.1: {error}")
            self._refuse(refusal)
            return
        if self._in_message and self._head_bytes + self._unparsed_bytes > self._max_header_bytes:
            self._refuse(self._head_too_large())
            return
        if self._in_message or self._is_idle():
            if self._reading is None:
                self._reading = self.loop.call_later(self._request_read_s, self._too_slow)
        elif self._reading is not None:
            self._stop_clock()

    def on_message_begin(self) -> None:
        """Begin to count. Raises where too many requests wait already."""
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise MalformedRequestError(
                f"more than {_MAX_PIPELINED} requests were sent before the first was answered"
            )
        super().on_message_begin()
        self._in_message = self._in_head = True
        self._head_bytes = self._unparsed_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Count a piece of the target."""
        super().on_url(url)
        self._count(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header. Trailers are read, and are none: the application has begun."""
        self._count(len(name) + len(value) + _BYTES_AROUND_A_HEADER)
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Let the application begin."""
        upgrade = self.parser.should_upgrade()
        if upgrade and any(name in _OF_A_BODY for name, _ in self.headers):
            # The parser takes the body for the other protocol.
            raise MalformedRequestError("only HTTP/1.1 is spoken: a body cannot ask for an upgrade")
        if self.url.partition(b"?")[0][-3:].lower() == b"%0a":
            # Starlette's routes end with `$`, which a line break passes: what asks for a path by
            # name would take this for another one.
            raise MalformedRequestError("the path of the request ends with a line break")
        super().on_headers_complete()
        self._in_head = False
        self._head_bytes = self._unparsed_bytes = 0  # from here on: of trailers
        if upgrade:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body on."""
        self._unparsed_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Stop the clock of the request."""
        self._in_message = False
        self._unparsed_bytes = 0
        super().on_message_complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _count(self, n_bytes: int) -> None:
        self._unparsed_bytes = 0
        self._head_bytes += n_bytes
        if self._head_bytes > self._max_header_bytes:
            raise self._head_too_large()

    def _head_too_large(self) -> HeadTooLargeError:
        return HeadTooLargeError(
            f"the request's target and headers have more than {self._max_header_bytes:,} bytes"
        )

    def _is_idle(self) -> bool:
        return self._answering is None or self._answering.response_complete

    def _stop_clock(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _too_slow(self) -> None:
        self._reading = None
        if self._others_wait():
            # It is the service that holds this request up.
            self._reading = self.loop.call_later(self._request_read_s, self._too_slow)
        elif self._in_message and not self._ending:
            self._refuse(
                RequestTooSlowError(
                    f"the request had not arrived {self._request_read_s:g} s after it had begun"
                )
            )
        else:
            self.transport.close()

    def _others_wait(self) -> bool:
        """Return whether requests before the one that is being received wait for an answer."""
        reads_its_body = self._in_message and not self._in_head
        return bool(self.pipeline) or not (reads_its_body or self._is_idle())

    def _refuse(self, error: ServiceError) -> None:
        """Read nothing more; answer the request that is being received, if it is its turn."""
        if self._others_wait():
            if self.pipeline and self._in_message and not self._in_head:
                self.pipeline.popleft()  # the one that is being received
            last = self.pipeline[0][0] if self.pipeline else self._answering
            assert last is not None
            last.keep_alive = False
            self._ending = True
            return
        self._stop_clock()
        self._ending = True
        begun = self.cycle if self._in_message and not self._in_head else None
        if begun is None or not begun.response_started:
            if begun is not None:  # its application waits for the body
                begun.disconnected = True
                begun.message_event.set()
            self.refuse_by(error)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._reading = self.loop.call_later(_LINGER_S, self.transport.close)

    def refuse_by(self, error: ServiceError) -> None:
        """Write an answer in the place of the application's, and count it."""
        answer = problem_response(error)
        lines = [
            f"HTTP/1.1 {error.status.value} {error.status.phrase}".encode(),
            *(b"%b: %b" % header for header in answer.raw_headers),
            b"connection: close",
        ]
        self.transport.write(b"\r\n".join([*lines, b"", bytes(answer.body)]))
        if self.metrics is not None:
            self.metrics.count_answer(_ROUTE, error.status.value)
