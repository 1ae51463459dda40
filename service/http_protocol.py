"""uvicorn's HTTP/1.1 protocol, with an end to what a client may send and how long it may take.

uvicorn's own has neither: a head may have any size, a request may take for ever to arrive, and
requests that are sent ahead (pipelined) are kept whatever their number.
"""

import asyncio
from typing import Any

import httptools
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

    `max_header_bytes`: target, names and values of a request's head: more are answered 431, as is
    twice as much that is neither a whole head nor part of a body. `request_read_s`: seconds from
    the beginning of a request, or of the connection, to the last byte of the request's body: what
    takes longer is answered 408. `keep_alive_s`: seconds that an answered connection may wait for
    its next request. What is no HTTP/1.1 is answered 400. All of them close the connection, once
    the requests before have their answers.
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
        # Of the message that is being received; the request before it.
        self._in_message = False
        self._in_head = False
        self._before: RequestResponseCycle | None = None
        # What has come of it without becoming a head or a part of a body: in whole calls, which
        # hold no more than a head may, so that most requests need not be counted at all.
        self._pending_bytes = 0
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
        for start in range(0, len(data), self._max_header_bytes):
            if not self.transport.is_closing():
                self._feed(data[start : start + self._max_header_bytes])

    def _feed(self, data: bytes) -> None:
        if self._ending:
            return
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
        if self._in_message:
            self._pending_bytes += len(data)
            if self._pending_bytes > 2 * self._max_header_bytes:
                self._refuse(self._head_too_large())
            elif self._reading is None:
                self._reading = self.loop.call_later(self._request_read_s, self._too_slow)

    def on_message_begin(self) -> None:
        """Take note of a new request. Raises where too many wait already."""
        if len(self.pipeline) >= _MAX_PIPELINED:
            raise MalformedRequestError(
                f"more than {_MAX_PIPELINED} requests were sent before the first was answered"
            )
        super().on_message_begin()
        # Not before, so that empty lines do not keep a connection open.
        self._unset_keepalive_if_required()
        self._in_message = self._in_head = True
        self._pending_bytes = 0

    def on_headers_complete(self) -> None:
        """Let the application begin. Raises where the head cannot be what it seems."""
        if self._pending_bytes:  # otherwise it has come at once, and fits
            around = len(self.headers) * _BYTES_AROUND_A_HEADER
            size = sum(len(name) + len(value) for name, value in self.headers)
            if len(self.url) + size + around > self._max_header_bytes:
                raise self._head_too_large()
        upgrade = self.parser.should_upgrade()
        if upgrade and any(name in _OF_A_BODY for name, _ in self.headers):
            # The parser takes the body for the other protocol.
            raise MalformedRequestError("only HTTP/1.1 is spoken: a body cannot ask for an upgrade")
        self._before = self.cycle
        super().on_headers_complete()
        self._in_head = False
        self._pending_bytes = 0
        # Trailers go nowhere: the application has begun to read the headers.
        self.headers = []
        if upgrade:
            self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body on."""
        super().on_body(body)
        self._pending_bytes = 0

    def on_message_complete(self) -> None:
        """Take note of the end of the request."""
        super().on_message_complete()
        self._in_message = False
        self._stop_clock()
        if self.cycle.response_complete:
            # Before the end of the request, so that no other could begin until now.
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Begin the next answer, or wait for the next request."""
        super().on_response_complete()
        if self._in_message:  # it is not waited for: what is being received has a clock of its own
            self._unset_keepalive_if_required()

    def _head_too_large(self) -> HeadTooLargeError:
        return HeadTooLargeError(
            f"the request's target and headers have more than {self._max_header_bytes:,} bytes"
        )

    def _is_idle(self) -> bool:
        # They are answered in their order. Before the first there is none, whatever its type says.
        return self.cycle is None or self.cycle.response_complete  # type: ignore[redundant-expr]

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

    @property
    def _in_body(self) -> bool:
        return self._in_message and not self._in_head

    def _others_wait(self) -> bool:
        """Return whether requests before the one that is being received wait for an answer."""
        return bool(self.pipeline) or not (self._in_body or self._is_idle())

    def _refuse(self, error: ServiceError) -> None:
        """Read nothing more; answer the request that is being received, if it is its turn."""
        if self._others_wait():
            last = self.cycle
            if self._in_body:
                self.pipeline.popleft()  # the one that is being received
                assert self._before is not None
                last = self._before
            last.keep_alive = False
            self._ending = True
            return
        self._stop_clock()
        self._ending = True
        begun = self.cycle if self._in_body else None
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
