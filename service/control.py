"""What supervisor and worker say to each other: JSON objects, one a line, over a pair of sockets.

The supervisor says                     The worker says
accept                                  ready      everything is open and warm
status  status                          serving    connections are accepted
drain                                   alive      once in HEARTBEAT_S, by the event loop
leave   within_s                        failed     reason: it cannot serve, and ends
                                        reload     somebody asked for it by HTTP
"""

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, cast

HEARTBEAT_S = 1.0


class Link(asyncio.Protocol):
    """One end of the pair. Iterating yields what the other end says, until that is gone.

    A stream of asyncio's would forget what was said last when the other end goes without having
    read all that it was told.
    """

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._begun = b""
        self._heard: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._gone = asyncio.Event()

    @classmethod
    async def over(cls, end: socket.socket) -> "Link":
        """Return the link over one end, which it owns from then on."""
        _, link = await asyncio.get_running_loop().create_unix_connection(cls, sock=end)
        return link

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Write by this transport."""
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        """Take the lines apart."""
        *lines, self._begun = (self._begun + data).split(b"\n")
        for line in lines:
            self._heard.put_nowait(line)

    def connection_lost(self, _error: Exception | None) -> None:
        """End the iteration, after what has been said."""
        self._heard.put_nowait(None)
        self._gone.set()

    def say(self, message: str, **fields: object) -> None:
        """Send; what a gone end does not hear is lost."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(json.dumps({"message": message, **fields}).encode() + b"\n")

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Yield messages: objects with a `message`."""
        while (line := await self._heard.get()) is not None:
            yield json.loads(line)

    async def close(self) -> None:
        """Send what is left, and end."""
        if self._transport is not None:
            self._transport.close()
            await self._gone.wait()
