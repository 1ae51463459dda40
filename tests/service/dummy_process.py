"""A service around the dummy model in a process of its own, for what must not happen to pytest's.

`python -m tests.service.dummy_process SETTINGS FLAG`: settings as JSON, and a file. Once that is
there, every run of the device hangs; `GET /hang` lets the event loop hang.
"""

import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from loadtest.redis_server import free_port
from service.app import create_app
from service.connections import limited_protocol
from service.logs import configure
from service.settings import Settings
from tests.service.dummy_model import DummyModel
from tests.service.live_service import PATIENCE_S, wait_until

_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True, kw_only=True)
class DummyProcess:
    """The process, where it answers, and the file whose presence lets its runs hang."""

    process: "subprocess.Popen[str]"
    url: str
    flag: Path

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=PATIENCE_S, trust_env=False, verify=False)

    def score(self) -> httpx.Response:
        return httpx.post(
            f"{self.url}/score",
            json={"user_id": "ann", "candidates": [1]},
            headers={"X-Deadline-Ms": "30000"},
            timeout=PATIENCE_S,
            trust_env=False,
            verify=False,
        )

    @property
    def n_files(self) -> int:
        """Return how many descriptors are open."""
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def resident_bytes_from_here_on(self) -> int:
        """Return the resident memory, and let its peak count anew."""
        Path(f"/proc/{self.process.pid}/clear_refs").write_text("5")
        return self._memory_bytes("VmRSS")

    @property
    def peak_resident_bytes(self) -> int:
        return self._memory_bytes("VmHWM")

    def _memory_bytes(self, name: str) -> int:
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

    @property
    def cpu_s(self) -> float:
        """Return the seconds that it has computed so far."""
        stat = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(stat[11]) + int(stat[12])) / os.sysconf("SC_CLK_TCK")

    def allow_files(self, count: int) -> None:
        """Let it open so many files and no more."""
        resource.prlimit(self.process.pid, resource.RLIMIT_NOFILE, (count, count))


@contextmanager
def dummy_process(folder: Path, **settings: Any) -> Iterator[DummyProcess]:
    """Run one until the block ends. `folder`: for its file; `settings`: those of the service."""
    port, flag = free_port(), folder / "hang"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", __name__),
            *(json.dumps({"bundle": "unused", "port": port, **settings}), str(flag)),
        ],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    found = DummyProcess(process=process, url=f"http://127.0.0.1:{port}", flag=flag)
    try:
        wait_until(lambda: _answers(found), "the service answers")
        yield found
    finally:
        process.kill()
        process.communicate()


def _answers(found: DummyProcess) -> bool:
    assert found.process.poll() is None, "the service has ended"
    try:
        return found.get("/healthz").is_success
    except httpx.TransportError:
        return False


class _Model(DummyModel):
    def __init__(self, flag: Path) -> None:
        super().__init__()
        self._flag = flag

    def run(self, inputs):
        self.runs.clear()  # which would be kept for ever
        if self._flag.exists():
            threading.Event().wait()
        time.sleep(0.001)
        return super().run(inputs)


def _serve() -> None:
    settings = Settings(**json.loads(sys.argv[1]))
    configure(level="info", style="json", personal_data=False)
    app = create_app(settings, lambda _: _Model(Path(sys.argv[2])))

    @app.get("/hang")
    async def hang() -> None:
        threading.Event().wait()

    uvicorn.run(
        app,
        port=settings.port,
        http=limited_protocol(settings),
        ws="none",
        log_config=None,
        access_log=False,
    )


if __name__ == "__main__":
    _serve()
