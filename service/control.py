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
from contextlib import suppress
from typing import Any

HEARTBEAT_S = 1.0
_MAX_LINE_BYTES = 1 << 20


class Link:
    """One end of the pair. Iterating yields what the other end says, until that is gone."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def over(cls, end: socket.socket) -> "Link":
        """Return the link over one end, which it owns from then on."""
        return cls(*await asyncio.open_unix_connection(sock=end, limit=_MAX_LINE_BYTES))

    def say(self, message: str, **fields: object) -> None:
        """Send; what a gone end does not hear is lost."""
        with suppress(OSError, RuntimeError):
            self._writer.write(json.dumps({"message": message, **fields}).encode() + b"\n")

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Yield messages: objects with a `message`."""
        with suppress(OSError):
            while line := await self._reader.readline():
                yield json.loads(line)

    async def close(self) -> None:
        """Send what is left, and end."""
        self._writer.close()
        with suppress(OSError):
            await self._writer.wait_closed()
