"""Debian's Prometheus as a child process, with the project's own configuration."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.redis_server import free_port
from tests.service.live_service import PATIENCE_S

DEPLOYED = Path(__file__).parents[2] / "deploy" / "prometheus"
needs_prometheus = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="prometheus and promtool are not there: apt-get install prometheus",
)
# Short next to a test's patience, long next to what a scrape takes.
_EVERY = "500ms"


@dataclass(frozen=True, kw_only=True)
class Prometheus:
    """Questions to a running Prometheus."""

    client: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the samples of an instant query, which must be valid."""
        answer = self.client.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        found: list[dict[str, Any]] = answer["data"]["result"]
        return found

    def value(self, expression: str) -> float | None:
        """Return the value of the one sample that there may be."""
        samples = self.query(expression)
        assert len(samples) <= 1, samples
        return float(samples[0]["value"][1]) if samples else None

    def firing(self) -> set[str]:
        """Return the names of the alerts that fire."""
        alerts = self.client.get("/api/v1/alerts").json()["data"]["alerts"]
        return {one["labels"]["alertname"] for one in alerts if one["state"] == "firing"}


@contextmanager
def prometheus_server(folder: Path, target: str) -> Iterator[Prometheus]:
    """Watch the service at `target` until the block ends.

    By copies of the deployed files in `folder`, that look twice a second, and whose alerts wait for
    nothing.
    """
    own = f"127.0.0.1:{free_port()}"
    config = (DEPLOYED / "prometheus.yml").read_text()
    for deployed, here in (("service:8000", target), ("localhost:9090", own)):
        assert config.count(deployed) == 1
        config = config.replace(deployed, here)
    config = re.sub(r"_interval: \w+", f"_interval: {_EVERY}", config)
    (folder / "prometheus.yml").write_text(config)
    rules = (DEPLOYED / "rules.yml").read_text()
    (folder / "rules.yml").write_text(re.sub(r"for: \w+", "for: 0s", rules))
    arguments = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={own}",
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(["prometheus", *arguments], stderr=log)
        try:
            with httpx.Client(base_url=f"http://{own}", timeout=PATIENCE_S, trust_env=False) as one:
                _wait(process, one, folder / "log")
                yield Prometheus(client=one)
        finally:
            process.terminate()
            process.wait(PATIENCE_S)


def _wait(process: "subprocess.Popen[bytes]", client: httpx.Client, log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError(f"Prometheus is not ready: {log.read_text()}")
