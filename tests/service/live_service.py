"""The application behind a real uvicorn on a free port, and what /metrics says of it."""

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI
from prometheus_client.parser import text_string_to_metric_families

from service.connections import limited_protocol
from service.settings import Settings
from tests.service.dummy_model import DummyModel

PATIENCE_S = 30.0
_ARM = ("arm", "version")


@dataclass(frozen=True, kw_only=True)
class LiveService:
    """A client of the running service, some questions to it, and the model behind it."""

    client: httpx.Client
    model: DummyModel
    server: uvicorn.Server

    @property
    def address(self) -> tuple[str, int]:
        url = self.client.base_url
        assert url.port is not None
        return url.host, url.port

    def score(
        self,
        user_id: Any = "ann",
        candidates: Any = (1,),
        deadline_ms: float | str | None = None,
        **fields: Any,
    ) -> httpx.Response:
        headers = {} if deadline_ms is None else {"X-Deadline-Ms": str(deadline_ms)}
        body = {"user_id": user_id, "candidates": candidates, **fields}
        return self.client.post("/score", json=body, headers=headers)

    def scores(self, user_id: Any = "ann", candidates: Any = (1,), **fields: Any) -> list[float]:
        """Return the scores of a request that must succeed."""
        answer = self.score(user_id, candidates, **fields)
        assert answer.status_code == 200, answer.text
        scores: list[float] = answer.json()["scores"]
        return scores

    def recommend(
        self,
        user_id: Any = "ann",
        k: Any = 3,
        deadline_ms: float | str | None = None,
        **fields: Any,
    ) -> httpx.Response:
        headers = {} if deadline_ms is None else {"X-Deadline-Ms": str(deadline_ms)}
        body = {"user_id": user_id, "k": k, **fields}
        return self.client.post("/recommend", json=body, headers=headers)

    def recommended(self, user_id: Any = "ann", k: Any = 3, **fields: Any) -> list[int]:
        """Return the items of a recommendation that must succeed."""
        answer = self.recommend(user_id, k, **fields)
        assert answer.status_code == 200, answer.text
        item_ids: list[int] = answer.json()["item_ids"]
        return item_ids

    def events(self, *events: tuple[Any, Any, Any]) -> httpx.Response:
        """Post (user, item, time)s as a batch."""
        fields = ("user_id", "item_id", "time")
        body = {"events": [dict(zip(fields, event, strict=True)) for event in events]}
        return self.client.post("/events", json=body)

    def metric(self, name: str, **labels: str) -> float:
        """Return a sample of /metrics, 0 where there is none; of all arms unless one is named."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.client.get("/metrics").text)
            for sample in family.samples
            if sample.name == name
            and {k: v for k, v in sample.labels.items() if k in labels or k not in _ARM} == labels
        )

    @contextmanager
    def client_that_leaves(self, request: bytes) -> Iterator[socket.socket]:
        """Send bytes on a connection; close it with the block, and return when the server knows."""
        with socket.create_connection(self.address, timeout=PATIENCE_S) as connection:
            port = connection.getsockname()[1]
            connection.sendall(request)
            wait_until(lambda: port in self._client_ports(), "the server has taken the connection")
            yield connection
        wait_until(lambda: port not in self._client_ports(), "the server has seen it close")
        time.sleep(0.01)  # the service does not ask for a client that was there a moment ago

    def _client_ports(self) -> list[int]:
        connections: list[Any] = list(self.server.server_state.connections)
        return [connection.client[1] for connection in connections if connection.client]

    def wait_for(self, name: str, value: float, **labels: str) -> None:
        """Return when a sample of /metrics has the value."""
        wait_until(lambda: self.metric(name, **labels) == value, f"{name} {labels} = {value}")


def wait_until(
    holds: Callable[[], bool],
    what: str,
    *,
    patience_s: float = PATIENCE_S,
    pause_s: float = 0.005,
) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"never came true: {what}"
        time.sleep(pause_s)


class _PromptServer(uvicorn.Server):
    """It sees soon that it is to end: the tests end hundreds of them."""

    async def main_loop(self) -> None:
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            await asyncio.sleep(0.01)


@contextmanager
def live_service(
    app: FastAPI,
    model: Any,
    settings: Settings | None = None,
    sockets: list[socket.socket] | None = None,
) -> Iterator[LiveService]:
    """Serve `app` from a thread until the block ends, on a free port or on bound sockets.

    `settings`: those of the connections.
    """
    http = limited_protocol(settings or Settings(bundle=Path("unused")))
    config = uvicorn.Config(app, port=0, log_level="critical", http=http, ws="none", lifespan="on")
    server = _PromptServer(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": sockets})
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive(), "the server has started")
        port = server.servers[0].sockets[0].getsockname()[1]
        # No environment: a proxy of the developer's must not come between.
        with httpx.Client(
            base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S, trust_env=False, verify=False
        ) as client:
            yield LiveService(client=client, model=model, server=server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


@contextmanager
def in_background() -> Iterator[Callable[..., "Future[Any]"]]:
    """Yield a function that makes a call in a thread; at the end of the block all have ended."""
    with ThreadPoolExecutor(max_workers=32) as pool:
        yield pool.submit
