"""What metrics, logs and request ids cost: processor time a request, with them and without.

python -m tests.benchmarks.observability

Two services of one bundle share a core and take turns; one of them counts, writes and names
nothing. The model is one gather, so that the share is of the server alone: that of any real model
is smaller. wrk and Redis have another core.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from prometheus_client import Counter, Gauge, Histogram

import service.metrics
from loadtest.benchmarks.overhead import wrk
from loadtest.benchmarks.stand import (
    RunningService,
    histories,
    make_requests,
    pinned,
    two_cores,
)
from loadtest.bundles import make_bundle
from loadtest.machine import describe_machine
from loadtest.open_loop import Target
from loadtest.redis_server import free_port
from service.app import create_app
from service.logs import configure
from service.model import OnnxModel
from service.request_log import RequestLog
from service.settings import Settings

_LENGTH = 1000
_CONNECTIONS = 8
_ROUNDS, _ROUND_S = 40, 1
_IDS = {
    "X-Request-Id": "a-request-of-a-shop-0123456789",
    "Traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}


def main() -> None:
    """Print the processor time a request of both, and the median ratio of a round."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--serve", nargs=3, metavar=("BUNDLE", "REDIS_URL", "PORT"))
    parser.add_argument("--silent", action="store_true")
    options = parser.parse_args()
    if options.serve:
        _serve(*options.serve, silent=options.silent)
    else:
        _measure()


def _measure() -> None:
    print(f"{describe_machine()}, {_CONNECTIONS} connections, {_ROUNDS} rounds of {_ROUND_S} s")
    print(f"{'headers sent':>22}{'silent us':>12}{'as it is us':>12}{'ratio':>8}   quartiles")
    served, measuring = two_cores()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bundle = make_bundle("popularity", folder, history_length=_LENGTH)
        bodies = make_requests(bundle).bodies()
        stack.enter_context(pinned(measuring))
        redis_url = stack.enter_context(histories(bundle, _LENGTH))
        with pinned(served):
            silent, as_it_is = (
                stack.enter_context(_service(bundle, redis_url, folder / name, *flags))
                for name, flags in (("silent", ("--silent",)), ("as-it-is", ()))
            )
        for what, headers in (("none", {}), ("request id and trace", _IDS)):
            taken_us: dict[int, list[float]] = {silent.pid: [], as_it_is.pid: []}
            for turn in range(_ROUNDS):
                # Who is second finds a machine that is warmer, or busier.
                for one in (silent, as_it_is) if turn % 2 else (as_it_is, silent):
                    before_s = one.cpu_s()
                    target = replace(one.target, headers=headers)
                    result = wrk(target, bodies, _CONNECTIONS, _ROUND_S)
                    assert not result.failed, f"{result.failed} requests failed"
                    n_requests = result.requests_per_s * _ROUND_S
                    taken_us[one.pid].append(1e6 * (one.cpu_s() - before_s) / n_requests)
            before, after = taken_us[silent.pid], taken_us[as_it_is.pid]
            ratios = [b / a for a, b in zip(before, after, strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            print(
                f"{what:>22}{statistics.median(before):12.1f}{statistics.median(after):12.1f}"
                f"{quartiles[1]:8.3f}   {quartiles[0]:.3f} .. {quartiles[2]:.3f}",
                flush=True,
            )


@contextmanager
def _service(bundle: Path, redis_url: str, metrics: Path, *flags: str) -> Iterator[RunningService]:
    port = free_port()
    metrics.mkdir()
    command = [sys.executable, "-m", "tests.benchmarks.observability"]
    with (
        (metrics / "log").open("w") as log,
        subprocess.Popen(
            [*command, "--serve", str(bundle), redis_url, str(port), *flags],
            stderr=log,
            # As with several workers, whose metrics cost more.
            env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(metrics)},
        ) as process,
    ):
        try:
            while True:
                try:
                    httpx.get(f"http://127.0.0.1:{port}/readyz").raise_for_status()
                    break
                except httpx.TransportError:
                    assert process.poll() is None, "the service ended"
                    time.sleep(0.1)
            target = Target(host="127.0.0.1", port=port, path="/score")
            yield RunningService(target=target, process=process)
        finally:
            process.terminate()


def _serve(bundle: str, redis_url: str, port: str, *, silent: bool) -> None:
    configure(level="info", style="json", personal_data=False)
    if silent:
        _silence()
    settings = Settings(bundle=Path(bundle), redis_url=redis_url, threads=1)
    app = create_app(settings, partial(OnnxModel, provider="cpu", threads=1))
    uvicorn.run(
        app,
        port=int(port),
        loop="uvloop",
        http="httptools",
        log_config=None,
        access_log=False,
        server_header=False,
    )


def _silence() -> None:
    """Let every metric count nothing and every request have no name, in this process."""

    def nothing(*args: Any, **fields: Any) -> None:
        del args, fields

    def itself(metric: Any, *labels: Any, **named: Any) -> Any:
        del labels, named
        return metric

    def nameless(*args: Any) -> _Nameless:
        del args
        return _Nameless()

    class Nothing:
        def __init__(self, metric: object) -> None:
            del metric

        inc = observe = flush = nothing

    silenced: list[tuple[Any, dict[str, Any]]] = [
        (service.metrics, {"CounterTally": Nothing, "HistogramTally": Nothing}),
        (Counter, {"labels": itself, "inc": nothing}),
        (Gauge, {"labels": itself, "set": nothing, "inc": nothing, "dec": nothing}),
        (Histogram, {"labels": itself, "observe": nothing}),
        (RequestLog, {"begin": nameless, "end": nothing}),
    ]
    for owner, members in silenced:
        for name, member in members.items():
            setattr(owner, name, member)


class _Nameless:
    headers: tuple[()] = ()


if __name__ == "__main__":
    main()
