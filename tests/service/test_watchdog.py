"""A process that hangs ends itself; one that was only held up does not."""

import asyncio
import signal
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from service.watchdog import WEDGED, Watchdog
from tests.service.dummy_process import DummyProcess, dummy_process
from tests.service.live_service import PATIENCE_S
from tests.service.logged import events_of


class Device:
    """What the watchdog is told of runs, and whether it has ended the process."""

    def __init__(self) -> None:
        self.running_since: float | None = None
        self.failing_since: float | None = None
        self.failures = 0
        self.codes: list[int] = []

    @asynccontextmanager
    async def watched(self, wedged_s: float = 0.2) -> AsyncIterator[Watchdog]:
        watchdog = Watchdog(self, wedged_s=wedged_s, end=self.codes.append)
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
        async with device.watched(0.1):
            await asyncio.sleep(0.5)
        assert device.codes == []


class TestFailures:
    async def test_a_device_that_fails_every_run_ends_the_process(self):
        device = Device()
        async with device.watched() as watchdog:
            device.failing_since, device.failures = 1.0, 10
            await device.ended()
            assert watchdog.suspects_device
        assert device.codes == [WEDGED]

    async def test_a_few_failures_do_not(self):
        """They may be those of what was asked, and nobody has asked since."""
        device = Device()
        async with device.watched(0.1):
            device.failing_since, device.failures = 1.0, 9
            await asyncio.sleep(0.5)
        assert device.codes == []

    async def test_neither_do_many_between_successes(self):
        device = Device()
        async with device.watched() as watchdog:
            for n in range(100):
                device.failing_since, device.failures = float(n), 1000
                await asyncio.sleep(0.005)
                assert not watchdog.suspects_device
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
        watchdog = Watchdog(Device(), wedged_s=1.0)
        watchdog.stop()
        other = Watchdog(Device(), wedged_s=1.0)
        other.start()
        other.stop()
        other.stop()
        assert "watchdog" not in {one.name for one in set(threading.enumerate()) - before}


class TestProcess:
    """A real one."""

    @pytest.fixture
    def start(self, redis_url, tmp_path):
        def begin(wedged_s: float):
            return dummy_process(
                tmp_path, redis_url=redis_url, redis_timeout_s=5.0, wedged_s=wedged_s
            )

        return begin

    def test_a_run_that_never_ends_makes_it_unready_and_then_ends_it(self, start):
        with start(2.0) as service:
            assert service.score().status_code == 200
            service.flag.touch()
            with ThreadPoolExecutor() as pool:
                noticing = pool.submit(notice, service)
                with pytest.raises(httpx.TransportError):
                    service.score()
                seen = noticing.result()
            _, stderr = service.process.communicate(timeout=PATIENCE_S)
        assert service.process.returncode == WEDGED == 75
        assert {"status": "not ready", "redis": "up", "device": "stuck"} in seen
        (event,) = [event for event in events_of(stderr) if event["event"] == "wedged"]
        assert event["level"] == "error"
        assert event["what"] == "device hangs"
        assert event["seconds"] >= 2.0
        assert "in run" in event["stacks"]["device_0"]
        assert "MainThread" in event["stacks"]

    def test_a_loop_that_never_turns_ends_it(self, start):
        with start(1.0) as service:
            with pytest.raises(httpx.TransportError):
                service.get("/hang")
            _, stderr = service.process.communicate(timeout=PATIENCE_S)
        assert service.process.returncode == WEDGED
        (event,) = [event for event in events_of(stderr) if event["event"] == "wedged"]
        assert event["what"] == "event loop hangs"
        assert "in hang" in event["stacks"]["MainThread"]

    def test_one_that_was_stopped_for_longer_goes_on(self, start):
        """As on a machine that slept, whose clock has gone on."""
        with start(1.0) as service:
            service.process.send_signal(signal.SIGSTOP)
            time.sleep(2.0)
            service.process.send_signal(signal.SIGCONT)
            assert service.score().status_code == 200
            time.sleep(0.3)  # some looks more
            assert service.score().status_code == 200


def notice(service: DummyProcess) -> list[dict[str, str]]:
    """Return what /readyz says until nobody answers."""
    seen = []
    with suppress(httpx.TransportError):
        while True:
            seen.append(service.get("/readyz").json())
            time.sleep(0.05)
    return seen
