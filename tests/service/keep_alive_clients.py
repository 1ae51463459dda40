"""Clients that keep their connections, as a shop's servers do, and count what goes wrong."""

import http.client
import json
import select
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tests.service.live_service import PATIENCE_S
from tests.service.tiny_bundle import ITEM_IDS

_BODY = json.dumps({"user_id": "ann", "candidates": [int(ITEM_IDS[0])]})
_HEADERS = {"Content-Type": "application/json", "X-Deadline-Ms": "30000"}


class KeepAliveClients:
    """`answers`: how many, by status and version. `failures`: requests without an answer.
    `connections`: how many were opened. `told_to_close`: answers that said so.

    A connection that the server has closed before a request is sent is opened anew, as every client
    does; one that ends after that is a failure. Each client ends where nobody listens any more.
    """

    def __init__(self, port: int) -> None:
        self.answers: Counter[tuple[int, str]] = Counter()
        self.failures: list[str] = []
        self.connections = 0
        self.told_to_close = 0
        self._port = port
        self._lock = threading.Lock()
        self._stop = threading.Event()

    @property
    def n_answered(self) -> int:
        with self._lock:
            return self.answers.total()

    @contextmanager
    def asking(self, clients: int, *, pause_s: float = 0.0) -> Iterator[None]:
        """Ask from so many threads, with a pause after each answer, until the block ends."""
        threads = [threading.Thread(target=self._ask, args=(pause_s,)) for _ in range(clients)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in threads:
                thread.join(PATIENCE_S)

    def wait_until_nobody_listens(self, threads_end_s: float = PATIENCE_S) -> None:
        """Return when a client has found the port closed."""
        assert self._stop.wait(threads_end_s), "the port is never closed"

    def _ask(self, pause_s: float) -> None:
        connection: http.client.HTTPConnection | None = None
        while not self._stop.is_set():
            if connection is not None and _has_been_closed(connection):
                connection.close()
                connection = None
            if connection is None:
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
                try:
                    connection.connect()
                except ConnectionRefusedError:
                    self._stop.set()
                    return
                except OSError as error:
                    self._failed(error)
                    return
                with self._lock:
                    self.connections += 1
            try:
                connection.request("POST", "/score", _BODY, _HEADERS)
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self._failed(error)
                connection.close()
                connection = None
                continue
            says_close = answer.getheader("Connection") == "close"
            with self._lock:
                version = json.loads(body).get("version", "") if answer.status == 200 else ""
                self.answers[answer.status, version] += 1
                self.told_to_close += says_close
            if says_close:
                connection.close()
                connection = None
            time.sleep(pause_s)
        if connection is not None:
            connection.close()

    def _failed(self, error: Exception) -> None:
        with self._lock:
            self.failures.append(repr(error))


def _has_been_closed(connection: http.client.HTTPConnection) -> bool:
    """Return whether there is something to read where nothing was asked: its end."""
    return connection.sock is None or bool(select.select([connection.sock], [], [], 0)[0])
