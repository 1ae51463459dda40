"""What stands between a client and a real Redis: a slow network, or an end of TLS."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def proxy(
    port: int, *, delay_s: float = 0.0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """Pass connections on to a port of loopback, each answer so much later; yield where."""
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        replies, requests = await asyncio.open_connection("127.0.0.1", port)
        tasks.add(asyncio.create_task(_pass_on(reader, requests, 0.0)))
        tasks.add(asyncio.create_task(_pass_on(replies, writer, delay_s)))

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pass_on(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, delay_s: float
) -> None:
    try:
        while data := await reader.read(1 << 16):
            await asyncio.sleep(delay_s)
            writer.write(data)
            await writer.drain()
    except OSError:
        pass  # one of the two has gone, and so does the other
    finally:
        writer.close()
