"""A process that hangs ends itself; one that was only held up does not."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from loadtest.redis_server import free_port
from service.watchdog import WEDGED, Watchdog
from tests.service.live_service import PATIENCE_S, wait_until
from tests.service.logged import events_of

# A service whose every run hangs once the file is there, in the device's thread or in the loop.
HANGING_SERVICE = """
import sys, threading, uvicorn
from pathlib import Path
from service.app import create_app
from service.logs import configure
from service.settings import Settings
from tests.service.dummy_model import DummyModel

url, port, flag, wedged_s, what = sys.argv[1:]
configure(level="info", style="json", personal_data=False)

class Model(DummyModel):
    def run(self, inputs):
        if what == "device" and Path(flag).exists():
            threading.Event().wait()
        return super().run(inputs)

settings = Settings(
    bundle=Path("unused"), redis_url=url, redis_timeout_s=5.0, wedged_s=float(wedged_s)
)
app = create_app(settings, lambda _: Model())

@app.get("/hang")
async def hang():
    threading.Event().wait()

uvicorn.run(app, port=int(port), log_config=None, access_log=False, ws="none")
"""


class Device:
    """What the watchdog is told of runs, and whether it has ended the process."""

    def __init__(self) -> None:
        self.running_since: float | None = None
        self.codes: list[int] = []

    @asynccontextmanager
    async def watched(self, wedged_s: float = 0.2) -> AsyncIterator[Watchdog]:
        watchdog = Watchdog(lambda: self.running_since, wedged_s=wedged_s, end=self.codes.append)
        watchdog.start()
        try:
            yield watchdog
        finally:
            watchdog.stop()

    async def ended(self) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not self.codes:  # noqa: ASYNC110  # set by another thread
                await asyncio.sleep(0.001)


class TestDevice:
    async def test_a_run_that_does_not_end_ends_the_process(self):
        device = Device()
        async with device.watched():
            device.running_since = 1.0
            await device.ended()
        assert device.codes == [WEDGED]

    async def test_it_is_suspected_before(self):
        device = Device()
        async with device.watched() as watchdog:
            assert not watchdog.suspects_device
            device.running_since = 1.0
            await device.ended()
            assert watchdog.suspects_device

    async def test_one_run_after_the_other_is_no_hang(self):
        device = Device()
        async with device.watched() as watchdog:
            for n in range(100):
                device.running_since = float(n)
                await asyncio.sleep(0.005)
                assert not watchdog.suspects_device
        assert device.codes == []

    async def test_neither_is_an_idle_device(self):
        device = Device()
        async with device.watched(0.02):
            await asyncio.sleep(0.2)
        assert device.codes == []


class TestEventLoop:
    async def test_one_that_does_not_turn_ends_the_process(self):
        device = Device()
        async with device.watched():
            began = time.monotonic()
            while not device.codes:
                time.sleep(0.001)  # noqa: ASYNC251  # which is what must be noticed
                assert time.monotonic() < began + PATIENCE_S
        assert device.codes == [WEDGED]

    async def test_it_may_stop_before_it_was_started_and_after(self):
        before = set(threading.enumerate())
        watchdog = Watchdog(lambda: None, wedged_s=1.0)
        watchdog.stop()
        other = Watchdog(lambda: None, wedged_s=1.0)
        other.start()
        other.stop()
        other.stop()
        assert "watchdog" not in {one.name for one in set(threading.enumerate()) - before}


class TestProcess:
    """A real one."""

    @pytest.fixture
    def hanging(self, redis_url, tmp_path):
        started: list[subprocess.Popen[str]] = []

        def start(what: str, wedged_s: float) -> tuple[Any, str, Path]:
            port, flag = free_port(), tmp_path / "hang"
            process = subprocess.Popen(
                [
                    *(sys.executable, "-c", HANGING_SERVICE),
                    *(redis_url, str(port), str(flag), str(wedged_s), what),
                ],
                env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
            url = f"http://127.0.0.1:{port}"
            wait_until(lambda: answers(url), "the service answers")
            return process, url, flag

        yield start
        for process in started:
            process.kill()
            process.communicate()

    def test_a_run_that_never_ends_makes_it_unready_and_then_ends_it(self, hanging):
        process, url, flag = hanging("device", 2.0)
        score(url)
        flag.touch()
        with ThreadPoolExecutor() as pool:
            noticing = pool.submit(notice, url)
            with pytest.raises(httpx.TransportError):
                score(url)
            seen = noticing.result()
        _, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == WEDGED == 75
        assert {"status": "not ready", "redis": "up", "device": "stuck"} in seen
        (event,) = [event for event in events_of(stderr) if event["event"] == "wedged"]
        assert event["level"] == "error"
        assert event["what"] == "device"
        assert event["seconds"] >= 2.0
        assert "in run" in event["stacks"]["device_0"]
        assert "MainThread" in event["stacks"]

    def test_a_loop_that_never_turns_ends_it(self, hanging):
        process, url, _ = hanging("event loop", 1.0)
        with pytest.raises(httpx.TransportError):
            httpx.get(f"{url}/hang", timeout=PATIENCE_S, trust_env=False)
        _, stderr = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == WEDGED
        (event,) = [event for event in events_of(stderr) if event["event"] == "wedged"]
        assert event["what"] == "event loop"
        assert "in hang" in event["stacks"]["MainThread"]

    def test_one_that_was_stopped_for_longer_goes_on(self, hanging):
        """As on a machine that slept, whose clock has gone on."""
        process, url, _ = hanging("nothing", 1.0)
        process.send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        process.send_signal(signal.SIGCONT)
        score(url)
        time.sleep(0.3)  # some looks more
        score(url)
        assert process.poll() is None


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/healthz", trust_env=False).is_success
    except httpx.TransportError:
        return False


def score(url: str) -> None:
    answer = httpx.post(
        f"{url}/score",
        json={"user_id": "ann", "candidates": [1]},
        headers={"X-Deadline-Ms": "30000"},
        timeout=PATIENCE_S,
        trust_env=False,
    )
    assert answer.status_code == 200, answer.text


def notice(url: str) -> list[dict[str, str]]:
    """Return what /readyz says until nobody answers."""
    seen = []
    with suppress(httpx.TransportError):
        while True:
            seen.append(httpx.get(f"{url}/readyz", timeout=PATIENCE_S, trust_env=False).json())
            time.sleep(0.05)
    return seen
