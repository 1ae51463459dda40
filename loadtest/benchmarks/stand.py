"""The test stand: a Redis with histories on one core, what is measured on another."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import redis
from prometheus_client.parser import text_string_to_metric_families

from contract.records import encode_records
from loadtest.open_loop import Target
from loadtest.redis_server import free_port, redis_server

USERS = 500
CANDIDATES = 100
_START_TIMEOUT_S = 120.0
_PREFIX = "history"
_YEAR_S = 365 * 86_400


class StandError(RuntimeError):
    """What was to be measured did not start."""


@dataclass(frozen=True, kw_only=True)
class Requests:
    """`users` and their `candidates` [N, C], drawn from a bundle's catalogue."""

    users: Sequence[str]
    candidates: Sequence[Sequence[int]]

    def bodies(self) -> list[bytes]:
        """Return the JSON of `POST /score`."""
        return [
            json.dumps({"user_id": user, "candidates": list(items)}).encode()
            for user, items in zip(self.users, self.candidates, strict=True)
        ]


def make_requests(bundle: Path, n: int = USERS, candidates: int = CANDIDATES) -> Requests:
    """Return requests of `n` users."""
    rng = np.random.default_rng(1)
    known = np.load(bundle / "catalogue.npy")
    return Requests(
        users=[f"user-{number}" for number in range(n)],
        candidates=[rng.choice(known, candidates).tolist() for _ in range(n)],
    )


@contextmanager
def histories(bundle: Path, length: int, n: int = USERS) -> Iterator[str]:
    """Run a Redis with the full histories of those users, and yield its URL."""
    rng = np.random.default_rng(2)
    known = np.load(bundle / "catalogue.npy")
    now = int(time.time())
    with redis_server() as url, redis.Redis.from_url(url) as client:
        for number in range(n):
            times = np.sort(now - rng.integers(0, _YEAR_S, length))
            value = encode_records(rng.choice(known, length), times)
            client.set(f"{_PREFIX}:user-{number}", value)
        yield url


@dataclass(frozen=True, kw_only=True)
class RunningService:
    """A service under measurement. `process`: the one that was started."""

    target: Target
    process: "subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """Of the process that supervises those that serve."""
        return self.process.pid

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.target.host}:{self.target.port}"

    def cpu_s(self) -> float:
        """Return the processor seconds that all its processes have used."""
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in self.pids()]
        fields = [stat.rpartition(")")[2].split() for stat in stats]
        return sum(int(one[11]) + int(one[12]) for one in fields) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Return the resident memory of all its processes."""
        pages = [int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self.pids()]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def pids(self) -> list[int]:
        """Return its process and all that descend from it, oldest first."""
        found = [self.pid]
        for pid in found:
            for thread in Path(f"/proc/{pid}/task").glob("*"):
                with suppress(OSError):  # a thread or a process may have ended meanwhile
                    found += map(int, (thread / "children").read_text().split())
        return found

    def metric(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of /metrics that have these labels, 0 without any."""
        return sum(
            float(sample.value)
            for family in text_string_to_metric_families(httpx.get(f"{self.url}/metrics").text)
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )


@contextmanager
def service(
    bundle: Path,
    redis_url: str,
    *,
    cores: Sequence[int],
    threads: int,
    flags: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    log: Path | None = None,
) -> Iterator[RunningService]:
    """Run `python -m service` on the cores, with so many threads for the model.

    `environment`: variables beside those of this process. `log`: where its stderr goes, to this
    process's unless said.
    """
    port = free_port()
    command = [
        *(sys.executable, "-m", "service", "--bundle", str(bundle), "--redis-url", redis_url),
        *("--port", str(port), "--threads", str(threads), "--drain-s", "0", *flags),
    ]
    with nullcontext() if log is None else log.open("ab") as stderr:
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env=os.environ | dict(environment or {}),
            process_group=0,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
    try:
        _wait_until_ready(process, f"http://127.0.0.1:{port}/readyz", log)
        target = Target(host="127.0.0.1", port=port, path="/score")
        yield RunningService(target=target, process=process)
    finally:
        process.terminate()
        process.wait()


def two_cores() -> tuple[list[int], list[int]]:
    """Return the cores for what is measured and for what measures: one, and another one."""
    available = sorted(os.sched_getaffinity(0))
    if len(available) < 2:
        raise StandError("two cores are needed: one is measured, the other one measures")
    return [available[0]], [available[1]]


@contextmanager
def pinned(cores: Sequence[int]) -> Iterator[None]:
    """Keep this process, and those that it starts, on the cores until the block ends."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _wait_until_ready(process: "subprocess.Popen[bytes]", url: str, log: Path | None) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text().strip().rpartition("\n")[2] if log else ""
            raise StandError(
                f"the service ended with status {process.returncode}{': ' if said else ''}{said}"
            )
        try:
            if httpx.get(url).is_success:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise StandError(f"the service was not ready within {_START_TIMEOUT_S:.0f} s")
