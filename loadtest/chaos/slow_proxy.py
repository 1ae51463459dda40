"""A TCP proxy that holds back what it hands on.

Run as a program, `python -m loadtest.chaos.slow_proxy PORT` hands on to that port of loopback and
prints its own; each line of stdin is the delay from then on, in seconds, of every piece of an
answer. It ends with stdin.
"""

import asyncio
import contextlib
import sys

import uvloop

_CHUNK_BYTES = 1 << 16


class SlowProxy:
    """Hands on to `port` of loopback; `delay_s` is added to each piece on its way back."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.delay_s = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection until either side closes it."""
        try:
            onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", self._port)
        except OSError:
            writer.close()
            return
        ways = [
            asyncio.create_task(self._hand_on(reader, onward_writer)),
            asyncio.create_task(self._hand_back(onward_reader, writer)),
        ]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        for one in (writer, onward_writer):
            one.close()

    async def _hand_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):  # the way back ends with this one
            while piece := await reader.read(_CHUNK_BYTES):
                writer.write(piece)
                await writer.drain()

    async def _hand_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        with contextlib.suppress(OSError):
            while piece := await reader.read(_CHUNK_BYTES):
                # As a long line does: every piece is late, and none waits for another one.
                loop.call_later(self.delay_s, _write, writer, piece)


def _write(writer: asyncio.StreamWriter, piece: bytes) -> None:
    if not writer.is_closing():  # who asked may have left meanwhile
        writer.write(piece)


async def _main(port: int) -> None:
    proxy = SlowProxy(port)
    server = await asyncio.start_server(proxy.serve, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    while line := await lines.readline():
        proxy.delay_s = float(line)


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1])))
