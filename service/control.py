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
from typing import Any

HEARTBEAT_S = 1.0

_READ_BYTES = 1 << 16


class Link:
    """One end of the pair, to be made in an event loop. Iterating yields what the other end says,
    until that is gone.

    A transport of asyncio's would forget what was said last when it finds, on writing, that the
    other end is gone: here reading goes on until all is read.
    """

    def __init__(self, end: socket.socket) -> None:
        """Own `end` from now on."""
        end.settimeout(0)
        self._end = end
        self._loop = asyncio.get_running_loop()
        self._begun = b""
        self._unsent = bytearray()
        self._heard: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._all_sent = asyncio.Event()
        self._all_sent.set()
        self._loop.add_reader(end, self._read)

    def say(self, message: str, **fields: object) -> None:
        """Send; what a gone end does not hear is lost."""
        if self._end.fileno() >= 0:
            self._unsent += json.dumps({"message": message, **fields}).encode() + b"\n"
            self._write()

    async def __aiter__(self) -> AsyncIterator[dict[str, Any]]:
        """Yield messages: objects with a `message`."""
        while (line := await self._heard.get()) is not None:
            yield json.loads(line)

    async def close(self) -> None:
        """Send what is left, and end."""
        await self._all_sent.wait()
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end)
            self._end.close()

    def _read(self) -> None:
        # To the end: uvloop tells only once of a connection that was reset.
        while True:
            try:
                data = self._end.recv(_READ_BYTES)
            except BlockingIOError:
                return
            except OSError:  # the other end has not read all, and is gone
                data = b""
            *lines, self._begun = (self._begun + data).split(b"\n")
            for line in lines:
                self._heard.put_nowait(line)
            if not data:
                self._loop.remove_reader(self._end)
                self._heard.put_nowait(None)
                return

    def _write(self) -> None:
        try:
            del self._unsent[: self._end.send(self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # the other end is gone
            self._unsent.clear()
        if self._unsent:
            self._all_sent.clear()
            self._loop.add_writer(self._end, self._write)
        else:
            self._all_sent.set()
            self._loop.remove_writer(self._end)
