"""Clients that never finish their request: each sends a few bytes a second.

Run as a program, `python -m loadtest.chaos.slow_clients PORT N` keeps N of them on a service until
stdin ends, then prints how often one was cut off. One that is cut off comes back at once: an
attacker does not give up.
"""

import asyncio
import contextlib
import sys

import uvloop

_HEAD = b"POST /score HTTP/1.1\r\nHost: slow\r\nContent-Type: application/json\r\n"
_BODY = b'Content-Length: 100000\r\n\r\n{"user_id": "'
_PAUSE_S = 1.0
_AGAIN_S = 0.1
_CONNECTED_WITHIN_S = 10.0


class SlowClients:
    """`n` clients of `port` on loopback; every other one drips its header, the others a body.

    `cut_off`: how often the service has closed a connection of theirs. `open`: connections now.
    """

    def __init__(self, port: int, n: int) -> None:
        self._port = port
        self._n = n
        self.open = 0
        self.cut_off = 0

    async def run(self, *, opened: asyncio.Event) -> None:
        """Drip until cancelled; sets `opened` when all are connected."""
        await asyncio.gather(*(self._client(number, opened) for number in range(self._n)))

    async def _client(self, number: int, opened: asyncio.Event) -> None:
        start = _HEAD if number % 2 else _HEAD + _BODY
        drip = b"X-Drip: 1\r\n" if number % 2 else b"a"
        while True:
            try:
                await self._drip(start, drip, opened)
            except OSError:
                await asyncio.sleep(_AGAIN_S)

    async def _drip(self, start: bytes, drip: bytes, opened: asyncio.Event) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        self.open += 1
        if self.open == self._n:
            opened.set()
        try:
            writer.write(start)
            while True:
                # An answer of any kind ends the request for the service: it closes, or waits for
                # another one, which is a new slow request then.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE_S):
                        if not await reader.read(1 << 16):
                            break
                writer.write(drip)
                await writer.drain()
        finally:
            self.open -= 1
            self.cut_off += 1
            writer.close()


async def _main(port: int, n: int) -> None:
    clients, opened = SlowClients(port, n), asyncio.Event()
    running = asyncio.create_task(clients.run(opened=opened))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_CONNECTED_WITHIN_S):
            await opened.wait()
    sys.stdout.write(f"{clients.open} of {n} are connected\n")
    sys.stdout.flush()
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    await lines.read()
    cut_off = clients.cut_off
    running.cancel()
    sys.stdout.write(f"{cut_off}\n")


if __name__ == "__main__":
    uvloop.run(_main(int(sys.argv[1]), int(sys.argv[2])))
