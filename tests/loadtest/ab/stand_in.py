"""A server with the interface of a service with two arms, whose scores are known.

Arm `right` knows the true click probabilities of a world, arm `wrong` ranks by their opposite.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from loadtest.world import World

# A status with which it closes the connection in place of an answer.
HANG_UP = 0

Reply = tuple[int, dict[str, Any]]


class StandIn:
    """What the server does, to be changed by a test. `asked`: bodies, by path, with headers."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.asked: dict[str, list[tuple[dict[str, Any], dict[str, str]]]] = {}
        self.models: list[dict[str, Any]] = [
            {"arm": "wrong", "share": 0.5, "shadow": False, "model": "w", "version": "w-1"},
            {"arm": "right", "share": 0.5, "shadow": False, "model": "r", "version": "r-1"},
            {"arm": "dark", "share": 0.0, "shadow": True, "model": "d", "version": "d-1"},
        ]
        self.share_of_right = 0.5
        self.url = ""
        self._index = {int(item): index for index, item in enumerate(world.item_ids)}

    def arm(self, user_id: str) -> str:
        digest = hashlib.sha256(user_id.encode()).digest()
        return "right" if digest[0] / 256 < self.share_of_right else "wrong"

    def score(self, body: dict[str, Any]) -> Reply:
        arm = self.arm(body["user_id"])
        items = np.array([self._index[item] for item in body["candidates"]])
        truth = self.world.click_probabilities(np.array(int(body["user_id"]) - 1), items)
        scores = truth if arm == "right" else -truth
        return 200, {"scores": scores.tolist(), "arm": arm, "version": f"{arm}-1"}

    def events(self, body: dict[str, Any]) -> Reply:
        return 200, {"appended": len(body["events"]), "duplicates": 0}

    def reply(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Reply:
        self.asked.setdefault(path, []).append((body, headers))
        if path == "/models":
            return 200, {"models": self.models}
        if path == "/score":
            return self.score(body)
        return self.events(body) if path == "/events" else (404, {"title": "Not Found"})


@contextmanager
def serve(stand_in: StandIn) -> Iterator[None]:
    """Run it on a free port of loopback until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        # The answer's head and body are two writes, the second of which would wait for an ack.
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            status, content = stand_in.reply(self.path, body, dict(self.headers))
            if status == HANG_UP:
                self.close_connection = True
                return
            written = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(written)))
            self.end_headers()
            self.wfile.write(written)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        stand_in.url = f"http://127.0.0.1:{server.server_port}"
        try:
            yield
        finally:
            server.shutdown()
            thread.join()
