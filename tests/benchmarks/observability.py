"""What metrics, logs and request ids cost: processor time a request, with them and without.

python -m tests.benchmarks.observability

Two applications in one process take turns, request by request as their servers call them; one of
them counts, writes and names nothing. The model is one gather and there are no sockets, so that the
share is of the least that a request costs: of a real one it is smaller.
"""

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import uvloop
from starlette.types import ASGIApp, Message

from loadtest.benchmarks.stand import histories, make_requests
from loadtest.bundles import make_bundle
from loadtest.machine import describe_machine

_LENGTH = 1000
_TOGETHER, _BLOCK, _TURNS, _WARM_TURNS = 8, 100, 80, 5
_IDS = {
    "x-request-id": "a-request-of-a-shop-0123456789",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}


def main() -> None:
    """Print the processor time a request of both, and the median ratio of a turn."""
    print(f"{describe_machine()}, {_TURNS} turns of {_BLOCK} x {_TOGETHER} requests")
    print(f"{'headers sent':>22}{'silent us':>12}{'as it is us':>12}{'ratio':>8}   quartiles")
    with tempfile.TemporaryDirectory() as name:
        bundle = make_bundle("popularity", Path(name), history_length=_LENGTH)
        # Processes that share their metrics, as workers do, pay more for them; read on import.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = name
        with histories(bundle, _LENGTH) as redis_url:
            uvloop.run(_measure(bundle, redis_url))


async def _measure(bundle: Path, redis_url: str) -> None:
    from service.app import create_app
    from service.logs import configure
    from service.model import OnnxModel
    from service.settings import Settings

    settings = Settings(
        bundle=bundle, redis_url=redis_url, redis_timeout_s=5.0, deadline_s=10.0, threads=1
    )
    configure(level="info", style="json", personal_data=False)

    def make() -> Any:
        return create_app(settings, lambda folder: OnnxModel(folder, threads=1))

    bodies = make_requests(bundle).bodies()
    async with AsyncExitStack() as stack:
        with (
            mock.patch("service.metrics.CounterTally", _Nothing),
            mock.patch("service.metrics.HistogramTally", _Nothing),
            mock.patch("service.app.RequestLog", _NoLog),
        ):
            silent = make()
            await stack.enter_async_context(silent.router.lifespan_context(silent))
        as_it_is = make()
        await stack.enter_async_context(as_it_is.router.lifespan_context(as_it_is))
        for what, headers in (("none", {}), ("request id and trace", _IDS)):
            taken_us: dict[Any, list[float]] = {silent: [], as_it_is: []}
            for turn in range(_WARM_TURNS + _TURNS):
                for app in (silent, as_it_is) if turn % 2 else (as_it_is, silent):
                    began = time.process_time()
                    await _ask(app, bodies, headers)
                    # What a request adds is written within its turn.
                    app.state.services.metrics.flush()
                    seconds = time.process_time() - began
                    if turn >= _WARM_TURNS:
                        taken_us[app].append(1e6 * seconds / (_BLOCK * _TOGETHER))
            before, after = taken_us[silent], taken_us[as_it_is]
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            print(
                f"{what:>22}{statistics.median(before):12.1f}{statistics.median(after):12.1f}"
                f"{quartiles[1]:8.3f}   {quartiles[0]:.3f} .. {quartiles[2]:.3f}",
                flush=True,
            )


async def _ask(app: ASGIApp, bodies: list[bytes], headers: Mapping[str, str]) -> None:
    for first in range(0, _BLOCK * _TOGETHER, _TOGETHER):
        some = (bodies[(first + n) % len(bodies)] for n in range(_TOGETHER))
        await asyncio.gather(*(_request(app, body, headers) for body in some))


async def _request(app: ASGIApp, body: bytes, headers: Mapping[str, str]) -> None:
    sent = {"host": "127.0.0.1:8000", "content-length": str(len(body)), **headers}
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/score",
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in sent.items()],
        "server": ("127.0.0.1", 8000),
    }
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]
    statuses = []

    async def receive() -> Message:
        if not messages:  # a client that stays
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    assert statuses == [200], statuses


class _Nothing:
    """In place of a tally."""

    def __init__(self, metric: object) -> None:
        del metric

    def inc(self, amount: float = 1) -> None:
        pass

    def observe(self, value: float) -> None:
        pass

    def flush(self) -> None:
        pass


class _NoLog:
    """In place of a RequestLog; its requests have no names."""

    headers: tuple[()] = ()

    def __init__(self, settings: object) -> None:
        del settings

    def begin(self, *_: object) -> "_NoLog":
        return self

    def end(self, *_: object, **__: object) -> None:
        pass

    async def close(self) -> None:
        pass


if __name__ == "__main__":
    main()
