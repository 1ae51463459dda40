"""What POST /events has acknowledged is stored, once: whatever is killed, and however often it is
posted.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

import httpx
import pytest
from redis import Redis

from loadtest.redis_server import RedisProcess, free_port
from tests.service.histories import NOW
from tests.service.live_service import wait_until
from tests.service.tiny_bundle import HISTORY_LENGTH

ROOT = Path(__file__).parents[2]
N_CLIENTS = 4
N_KILLS = 3
LULL_S = 0.4
# Redis waits two seconds for its disk, and no longer; the rest is for a busy machine.
HELD_BACK_S = 5.0


class Client(threading.Thread):
    """Posts behaviors one after the other, each until it is acknowledged, and notes them.

    Each is of another item, so that each can be counted; with a key, its time is the service's. No
    user gets more of them than the service keeps.
    """

    def __init__(self, url: str, name: str, *, keyed: bool) -> None:
        super().__init__(name=name)
        self._url = url
        self._keyed = keyed
        self.stop_it = threading.Event()
        self.acknowledged: dict[tuple[str, int], float] = {}
        self.n_repeated = 0
        self.failure: Exception | None = None

    def run(self) -> None:
        try:
            with httpx.Client(timeout=2.0, trust_env=False) as client:
                item = 0
                while not self.stop_it.is_set():
                    item += 1
                    self._post(client, f"{self.name}-{item // HISTORY_LENGTH}", item)
        except Exception as error:  # noqa: BLE001  # told in the thread of the test
            self.failure = error

    def finish(self) -> None:
        self.stop_it.set()
        self.join()

    def _post(self, client: httpx.Client, user: str, item: int) -> None:
        event: dict[str, object] = {"user_id": user, "item_id": item}
        headers = {}
        if self._keyed:
            headers["Idempotency-Key"] = str(uuid4())
        else:
            event["time"] = NOW + item
        # What is begun is acknowledged: who gave up would not know what became of it.
        while True:
            try:
                answer = client.post(f"{self._url}/events", json=event, headers=headers)
            except httpx.HTTPError:
                answer = None
            if answer is not None and answer.status_code == 200:
                told = answer.json()["appended"]
                # A key gets the first call's answer; without one it is seen that it was a second.
                assert told == 1 or (told == 0 and not self._keyed)
                self.acknowledged[user, item] = time.monotonic()
                return
            assert answer is None or answer.status_code == 503, answer.text
            self.n_repeated += 1
            time.sleep(0.01)


@contextmanager
def service(bundle: Path, redis: RedisProcess, port: int) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "service", "--bundle", str(bundle), "--port", str(port)),
            *("--redis-url", redis.url, "--threads", "1"),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        wait_until(lambda: _lives(port), "the service listens")
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _lives(port: int) -> bool:
    try:
        url = f"http://127.0.0.1:{port}/healthz"
        return httpx.get(url, trust_env=False, verify=False).status_code == 200
    except httpx.HTTPError:
        return False


def stored(redis: RedisProcess) -> Counter[tuple[str, int]]:
    """Return how often each item stands in the history of each user."""
    found: Counter[tuple[str, int]] = Counter()
    with Redis(port=redis.port) as client:
        for key in client.keys("history:*"):
            raw = client.get(key)
            assert isinstance(raw, bytes)
            user = key.decode().removeprefix("history:")
            found.update(
                (user, int.from_bytes(raw[at : at + 8], "little")) for at in range(0, len(raw), 12)
            )
    return found


@pytest.mark.parametrize(
    ("fsync", "keyed"),
    [
        pytest.param("always", True, id="always, keyed"),
        pytest.param("always", False, id="always, by what they are"),
        pytest.param("everysec", True, id="everysec, keyed"),
    ],
)
def test_nothing_is_lost_and_nothing_is_there_twice(good_bundle, tmp_path, fsync, keyed):
    """kill -9 of the service, and of Redis with an append-only file, in turn, under load."""
    redis = RedisProcess(free_port(), tmp_path, "--appendonly", "yes", "--appendfsync", fsync)
    redis.start()
    port = free_port()
    clients = [
        Client(f"http://127.0.0.1:{port}", f"client-{n}", keyed=keyed) for n in range(N_CLIENTS)
    ]
    killed: list[float] = []

    def kill_redis() -> None:
        redis.kill()
        killed.append(time.monotonic())
        time.sleep(LULL_S)
        redis.start()

    try:
        with service(good_bundle, redis, port) as process:
            for client in clients:
                client.start()
            for _ in range(N_KILLS):
                time.sleep(LULL_S)
                kill_redis()
            time.sleep(LULL_S)
            os.killpg(process.pid, signal.SIGKILL)
        with service(good_bundle, redis, port):
            time.sleep(LULL_S)
            for client in clients:
                client.finish()
        kill_redis()
        found = stored(redis)
    finally:
        for client in clients:
            client.stop_it.set()
        redis.stop()
    assert [client.failure for client in clients] == [None] * N_CLIENTS
    assert all(client.n_repeated for client in clients)
    acknowledged = {one: at for client in clients for one, at in client.acknowledged.items()}
    assert set(found.values()) == {1}
    assert set(found) <= set(acknowledged)
    lost = [at for one, at in acknowledged.items() if one not in found]
    if fsync == "always":
        assert lost == []
    # While the disk is busy with the second before, Redis keeps back what it has acknowledged.
    assert all(any(0 <= end - at <= HELD_BACK_S for end in killed) for at in lost)
