"""How many connections a worker holds, and how long a client may take to read its answer.

A connection costs what its request and its answer have of bytes. What bounds their number and their
time therefore bounds the memory of a worker.
"""

import asyncio
from functools import partial
from typing import Any, cast

from service.descriptors import max_connections
from service.errors import TooManyConnectionsError
from service.http_protocol import HttpProtocol
from service.settings import Settings


def limited_protocol(settings: Settings) -> type[asyncio.Protocol]:
    """Return what `uvicorn.Config(http=...)` makes a connection's protocol of; needs ws="none"."""
    limited = partial(
        LimitedProtocol,
        max_header_bytes=settings.max_header_bytes,
        request_read_s=settings.request_read_s,
        keep_alive_s=settings.keep_alive_s,
        max_connections=max_connections(settings),
        answer_taken_s=settings.answer_taken_s,
    )
    return cast(type[asyncio.Protocol], limited)  # uvicorn only calls it


class LimitedProtocol(HttpProtocol):
    """One connection; see HttpProtocol for what it may send.

    `max_connections`: of the worker; those beyond are answered 503 and closed before anything of
    theirs is read. `answer_taken_s`: seconds in which the client must take what does not fit into
    the socket's buffer; then the connection is cut off.
    """

    def __init__(
        self, *args: Any, max_connections: int, answer_taken_s: float, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._max_connections = max_connections
        self._answer_taken_s = answer_taken_s
        self._taking: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, if there is a place for it."""
        super().connection_made(transport)
        # A single byte that waits starts the clock. Whoever closes the connection, it stays open
        # until its buffer is empty, and no longer reads or is told of anything meanwhile.
        transport.set_write_buffer_limits(high=0)
        if len(self.connections) > self._max_connections:
            self._turn_away()
        self._count_connections()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self._stop_taking()
        super().connection_lost(exc)
        self._count_connections()

    def pause_writing(self) -> None:
        """Begin to wait for the client: the socket's buffer is full of what it has not taken."""
        super().pause_writing()
        self._taking = self.loop.call_later(self._answer_taken_s, self._cut_off)

    def resume_writing(self) -> None:
        """The client has taken it, or the socket has the rest."""
        self._stop_taking()
        super().resume_writing()

    def _cut_off(self) -> None:
        self._taking = None
        self.transport.abort()

    def _stop_taking(self) -> None:
        if self._taking is not None:
            self._taking.cancel()
            self._taking = None

    def _turn_away(self) -> None:
        error = TooManyConnectionsError(
            f"{self._max_connections:,} connections are open, which is as many as may be"
        )
        self.refuse_by(error)
        self.transport.close()

    def _count_connections(self) -> None:
        if self.metrics is not None:
            self.metrics.connections.set(len(self.connections))
