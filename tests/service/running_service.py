"""`python -m service` in processes of its own, as people run it."""

import os
import signal
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.mmap_dict import MmapedDict
from prometheus_client.parser import text_string_to_metric_families

from loadtest.redis_server import free_port
from tests.service.live_service import PATIENCE_S, wait_until
from tests.service.tiny_bundle import ITEM_IDS

_RELOAD_PATIENCE_S = 120.0


class RunningService:
    """A running service. `folder`: of its temporary files."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, folder: Path) -> None:
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._folder = folder

    @property
    def pids(self) -> set[int]:
        """The workers, those that are being started too."""
        return workers_of(self.process.pid)

    @property
    def metrics_folders(self) -> list[Path]:
        return list(self._folder.glob("mneme-metrics-*"))

    def get(self, path: str) -> httpx.Response:
        """Ask on a connection of its own."""
        return httpx.get(f"{self.url}{path}", trust_env=False, verify=False, timeout=PATIENCE_S)

    def post(self, path: str, body: object = None, **headers: str) -> httpx.Response:
        return httpx.post(
            f"{self.url}{path}",
            json=body,
            headers=headers,
            trust_env=False,
            verify=False,
            timeout=PATIENCE_S,
        )

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.get("/admin/status").json()
        return found

    def serving(self) -> set[int]:
        """Return the workers that serve, by what one of them knows."""
        return {one["pid"] for one in self.status()["workers"] if one["state"] == "serving"}

    def wait_for_reload(self, number: int) -> dict[str, Any]:
        """Return what became of a reload when it has ended."""
        found: dict[str, Any] = {}

        def has_ended() -> bool:
            found.update(self.status()["last_reload"] or {"number": 0})
            return int(found["number"]) >= number

        # It has only what other processes leave of the machine, until the service hurries it.
        wait_until(
            has_ended, f"reload {number} has ended", patience_s=_RELOAD_PATIENCE_S, pause_s=0.05
        )
        assert found["number"] == number
        return found

    def is_ready(self) -> bool:
        assert self.process.poll() is None, "the service has ended"
        try:
            return self.get("/readyz").is_success
        except httpx.TransportError:
            return False

    def wait_until_ready(self) -> None:
        wait_until(self.is_ready, "the service is ready")

    def score(self, user_id: str = "ann") -> dict[str, Any]:
        """Return the answer to a request that must be answered."""
        answer = self.post(
            "/score",
            {"user_id": user_id, "candidates": [int(ITEM_IDS[0])]},
            **{"X-Deadline-Ms": "30000"},
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    def have_answered(self) -> set[int]:
        """Return the workers that have a count of a scored request."""
        (folder,) = self.metrics_folders
        counters = {path.stem.split("_")[1]: path for path in folder.glob("counter_*.db")}
        return {int(pid) for pid, path in counters.items() if pid.isdigit() and _has_answered(path)}

    def score_until_all_have(self, pids: set[int]) -> int:
        """Send requests, eight at a time, until all the workers have scored; return how many."""
        n = 0

        def all_have() -> bool:
            nonlocal n
            if n and pids <= self.have_answered():
                return True
            list(pool.map(lambda _: self.score(), range(8)))
            n += 8
            return False

        with ThreadPoolExecutor(max_workers=8) as pool:
            wait_until(all_have, "each worker has scored")
        return n

    def samples(self) -> dict[str, float]:
        """Return samples of /metrics, summed over arms, by name and the label that tells most."""
        sums: defaultdict[str, float] = defaultdict(float)
        for family in text_string_to_metric_families(self.get("/metrics").text):
            for sample in family.samples:
                part = next(
                    (
                        sample.labels[name]
                        for name in ("route", "stage", "outcome", "reason")
                        if name in sample.labels
                    ),
                    "",
                )
                sums[f"{sample.name} {part}".rstrip()] += sample.value
        return sums

    def wait_for(self, name: str, value: float) -> None:
        """Return when a sample has the value: workers write now and then what they count."""
        wait_until(lambda: self.samples()[name] == value, f"{name} = {value}")

    def end(self, number: int = signal.SIGTERM) -> tuple[str, str]:
        """Signal that it should end; return stdout and stderr when it has."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> tuple[str, str]:
        """Return stdout and stderr when it has ended."""
        self.process.wait(PATIENCE_S)
        return (self._folder / "stdout").read_text(), (self._folder / "stderr").read_text()

    def living(self) -> list[str]:
        """Return the processes of its group; one that waits for its parent is none."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(FileNotFoundError, ProcessLookupError):
                pid, rest = path.parent.name, path.read_text().rpartition(")")[2].split()
                state, process_group = rest[0], int(rest[2])
                if process_group == self.process.pid and state not in "ZX":
                    found.append(f"{pid} {state}")
        return found


def workers_of(supervisor: int) -> set[int]:
    """Return the workers, those that are being started too, of a process that supervises them."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text()
    return {int(pid) for pid in children.split() if _name(pid) == "mneme-worker"}


def put(path: Path, text: str) -> None:
    """Write a file that a service looks at, whole."""
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text)
    staging.replace(path)


@contextmanager
def running_service(
    *arguments: str | Path,
    folder: Path,
    drain_s: float = 0.0,
    output: Path | None = None,
    **environment: str,
) -> Iterator[RunningService]:
    """Run the service in a process group of its own; kill all of it that the test did not end.

    `output`: what its stdout is, a file in the folder unless said.
    """
    port = free_port()
    # Files, because whoever writes to a pipe that nobody reads comes to a halt.
    with (
        (output or folder / "stdout").open("wb") as stdout,
        (folder / "stderr").open("wb") as stderr,
    ):
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "service", "--port", str(port), "--threads", "1"),
                *("--redis-timeout-s", "5", "--reload-poll-s", "0.05", "--drain-s", str(drain_s)),
                # Of which a read of Redis may take half.
                *("--deadline-s", "10"),
                # On a busy machine many are; what a test counts is other events.
                *("--slow-log-per-s", "0"),
                *arguments,
            ],
            env={**os.environ, "TMPDIR": str(folder), **environment},
            stdout=stdout,
            stderr=stderr,
            process_group=0,
        )
    try:
        yield RunningService(process, port, folder)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _has_answered(counters: Path) -> bool:
    samples = MmapedDict.read_all_values_from_file(str(counters))
    return any('"/score"' in key and value for key, value, *_ in samples)


def _name(pid: str) -> str:
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
