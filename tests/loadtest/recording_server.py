"""A small HTTP server in a thread: it notes what it is sent, and answers what the test chooses."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Received:
    """One request; header names are lower case."""

    path: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True, kw_only=True)
class RecordingServer:
    """Where it listens, and what it was sent, in order."""

    url: str
    received: list[Received] = field(default_factory=list)


def _always_200(_received: Received) -> int:
    return 200


@contextmanager
def recording_server(
    status: Callable[[Received], int] = _always_200,
) -> Iterator[RecordingServer]:
    """Serve until the block ends; `status` of the answer is the test's choice."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            raw = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            received = Received(path=self.path, headers=headers, body=json.loads(raw))
            server.received.append(received)
            code = status(received)
            # One piece: two would wait for each other's acknowledgement.
            self.wfile.write(b"HTTP/1.1 %d Chosen\r\nContent-Length: 2\r\n\r\n{}" % code)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256

        def handle_error(self, *_: object) -> None:
            """Clients that leave are no news."""

    with Server(("127.0.0.1", 0), Handler) as listener:
        server = RecordingServer(url=f"http://127.0.0.1:{listener.server_address[1]}")
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()
