"""Generations of workers: what takes over, what stays, and that no client is failed."""

import asyncio
import errno
import json
import logging
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from pathlib import Path
from typing import Any

import httpx
import pytest

from contract.errors import BundleError
from loadtest.redis_server import free_port
from service import supervisor
from service.forks import Fork, Template
from service.listening import bind
from service.metrics import FOLDER_VARIABLE
from service.pointer import publish, rollback
from service.settings import Settings, SettingsError
from service.wanted import read_wanted
from tests.service.keep_alive_clients import KeepAliveClients
from tests.service.live_service import PATIENCE_S, wait_until
from tests.service.logged import Logged, events_of
from tests.service.running_service import RunningService, put, running_service, workers_of
from tests.service.tiny_bundle import change_manifest, flip_a_byte

Start = Callable[..., AbstractContextManager[RunningService]]


@pytest.fixture
def bundles(good_bundle, tmp_path) -> tuple[Path, Path]:
    """Two bundles, of the versions tiny-1 and tiny-2."""
    first = Path(shutil.copytree(good_bundle, tmp_path / "first"))
    second = Path(shutil.copytree(good_bundle, tmp_path / "second"))
    change_manifest(second, model_version="tiny-2")
    return first, second


@pytest.fixture
def logged() -> Iterator[Logged]:
    found = Logged()
    with found.listening(logging.INFO, personal_data=False):
        yield found


@pytest.fixture
def pointer(bundles, tmp_path) -> Path:
    path: Path = tmp_path / "pointer"
    publish(path, bundles[0])
    return path


@pytest.fixture
def start(pointer, redis_url, tmp_path) -> Start:
    """Start a service of two workers that serves what the pointer names."""

    @contextmanager
    def begin(*arguments: str, drain_s: float = 0.0) -> Iterator[RunningService]:
        given = ("--bundle", pointer, "--redis-url", redis_url, "--workers", "2", *arguments)
        with running_service(*given, folder=tmp_path, drain_s=drain_s) as service:
            service.wait_until_ready()
            wait_until(lambda: len(service.serving()) == 2, "both workers serve")
            yield service

    return begin


class Supervised:
    """A service whose supervisor is the test's own process."""

    def __init__(self, client: httpx.AsyncClient) -> None:
        self._client = client

    async def get(self, path: str) -> Any:
        return (await self._client.get(path)).json()

    async def reload(self, number: int) -> dict[str, Any]:
        """Ask for the reload of that number; return what became of it."""
        os.kill(os.getpid(), signal.SIGHUP)
        async with asyncio.timeout(PATIENCE_S):
            while True:
                reload: dict[str, Any] | None = (await self.get("/admin/status"))["last_reload"]
                if reload is not None and reload["number"] == number:
                    return reload
                await asyncio.sleep(0.01)


Supervise = Callable[..., AbstractAsyncContextManager[Supervised]]


@pytest.fixture
def supervise(pointer, redis_url, tmp_path, monkeypatch) -> Supervise:
    """Supervise workers, one by default, from within the test: what it stands on can be changed."""
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))

    @asynccontextmanager
    async def begin(**changes: Any) -> AsyncIterator[Supervised]:
        settings = Settings(
            bundle=pointer,
            redis_url=redis_url,
            port=0,
            threads=1,
            reload_poll_s=0.05,
            drain_s=0,
            **changes,
        )
        url = asyncio.get_running_loop().create_future()
        tested = supervisor.Supervisor(settings, bind(settings), folder=tmp_path)
        running = asyncio.create_task(tested.run(read_wanted(settings), announce=url.set_result))
        await asyncio.wait([url, running], return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            running.result()
        try:
            async with httpx.AsyncClient(
                base_url=await url, trust_env=False, verify=False, timeout=PATIENCE_S
            ) as client:
                yield Supervised(client)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            assert await running == 0

    return begin


def hinder_forks(monkeypatch: pytest.MonkeyPatch, fails: Callable[[int], bool]) -> list[int]:
    """Let there be no room for the n-th fork from now on where it says so of n, from 1 on.

    Returns the numbers of those that have been asked for, as they are.
    """
    fork = Template.fork
    asked: list[int] = []

    def tried(template: Template, handed: Sequence[int]) -> Fork:
        asked.append(len(asked) + 1)
        if fails(asked[-1]):
            raise BlockingIOError(errno.EAGAIN, "no process")
        return fork(template, handed)

    monkeypatch.setattr(Template, "fork", tried)
    return asked


def priorities(pid: int) -> set[tuple[int, int]]:
    """Return scheduling policy and niceness of the threads of a process."""
    threads = [int(path.name) for path in Path(f"/proc/{pid}/task").iterdir()]
    return {
        (os.sched_getscheduler(thread), os.getpriority(os.PRIO_PROCESS, thread))
        for thread in threads
    }


class TestReload:
    def test_what_is_published_takes_over_and_what_was_counted_stays(self, start, pointer, bundles):
        with start() as service:
            before = service.serving()
            as_started = priorities(min(before))
            assert {service.score()["version"] for _ in range(8)} == {"tiny-1"}
            publish(pointer, bundles[1])
            assert service.wait_for_reload(1)["outcome"] == "applied"
            assert {service.score()["version"] for _ in range(8)} == {"tiny-2"}
            wait_until(lambda: len(service.status()["workers"]) == 2, "the old ones have ended")
            status = service.status()
            assert (status["generation"], status["reloading"], status["refused"]) == (
                2,
                False,
                None,
            )
            assert {one["generation"] for one in status["workers"]} == {2}
            assert not before & service.pids
            # The old ones have left what they counted, and none of their gauges.
            (folder,) = service.metrics_folders
            assert [pid for pid in before if list(folder.glob(f"*_{pid}.db"))] == []
            service.wait_for("mneme_requests_total /score", 16)
            found = service.samples()
            assert found["mneme_history_behaviors_count"] == 16
            assert found["mneme_model_info"] == 1
            assert found["mneme_reloads_total applied"] == 1
            for pid in service.serving():
                assert priorities(pid) == as_started
            _, stderr = service.end()
        (event,) = [one for one in events_of(stderr) if one["event"] == "reload-applied"]
        assert (event["generation"], event["versions"]) == (2, ["tiny-2"])

    def test_a_bad_bundle_changes_nothing_and_says_why(self, start, pointer, bundles):
        with start() as service:
            before = service.serving()
            publish(pointer, bundles[1])
            service.wait_for_reload(1)
            flip_a_byte(bundles[0] / "model.onnx")
            with pytest.raises(BundleError, match=r"model\.onnx has sha256"):
                rollback(pointer)
            put(pointer, "first\nsecond\n")  # by hand, past the check
            reload = service.wait_for_reload(2)
            assert reload["outcome"] == "refused"
            assert f"bundle {bundles[0]}: model.onnx has sha256 " in reload["reason"]
            assert service.get("/experiments").json()["refused"] == reload["reason"]
            assert service.samples()["mneme_reload_refused"] == 1
            assert service.samples()["mneme_reloads_total refused"] == 1
            assert {service.score()["version"] for _ in range(8)} == {"tiny-2"}
            assert service.status()["generation"] == 2

            rollback(pointer)  # to what is served all the time
            wait_until(lambda: service.status()["refused"] is None, "nothing is refused any more")
            assert service.samples()["mneme_reload_refused"] == 0
            assert service.status()["generation"] == 2
            assert not before & service.pids
            _, stderr = service.end()
        told = Counter(one["event"] for one in events_of(stderr))
        assert told["reload-refused"] == 1

    @pytest.mark.parametrize("asked", ["by a signal", "by HTTP"])
    def test_whoever_asks_gets_new_workers_of_the_same(self, start, asked):
        with start() as service:
            before = service.serving()
            if asked == "by a signal":
                service.process.send_signal(signal.SIGHUP)
            else:
                answer = service.post("/admin/reload")
                assert (answer.status_code, answer.json()["reloading"]) == (202, True)
            assert service.wait_for_reload(1)["outcome"] == "applied"
            assert not before & service.serving()
            assert service.score()["version"] == "tiny-1"


class TestHurry:
    async def test_workers_that_give_way_for_too_long_are_started_again(
        self, bundles, pointer, supervise, monkeypatch, logged
    ):
        monkeypatch.setattr(supervisor, "_IN_BACKGROUND_WITHIN_S", 0.01)
        async with supervise() as supervised:
            publish(pointer, bundles[1])
            version = ""
            while version != "tiny-2":
                await asyncio.sleep(0.05)
                version = (await supervised.get("/models"))["models"][0]["version"]
        (event,) = logged.events("reload-hurried")
        assert event["after_s"] == 0.01
        assert len(logged.events("reload-applied")) == 1


class TestWhatCannotBeStarted:
    async def test_of_a_generation_that_cannot_all_be_started_nobody_is_left(
        self, supervise, monkeypatch
    ):
        async with supervise(workers=2) as supervised:
            before = workers_of(os.getpid())
            hinder_forks(monkeypatch, lambda n: n > 1)
            reload = await supervised.reload(1)
            assert workers_of(os.getpid()) == before
            assert reload["outcome"] == "refused"
            assert reload["reason"] == "a worker cannot be started: [Errno 11] no process"
            status = await supervised.get("/admin/status")
            assert {one["pid"] for one in status["workers"]} == before
            assert status["generation"] == 1

    async def test_what_the_machine_had_no_room_for_is_tried_again(
        self, supervise, monkeypatch, pointer, bundles, logged
    ):
        monkeypatch.setattr(supervisor, "_FIRST_RETRY_S", 0.1)
        async with supervise() as supervised:
            asked = hinder_forks(monkeypatch, lambda n: n <= 2)
            publish(pointer, bundles[1])
            await asyncio.to_thread(logged.wait_for, "reload-applied")
            assert asked == [1, 2, 3]
            # The same again is no news.
            assert len(logged.events("reload-refused")) == 1
            assert (await supervised.get("/admin/status"))["refused"] is None

    async def test_what_a_worker_has_found_wrong_is_not_tried_again(
        self, supervise, monkeypatch, pointer, bundles, logged
    ):
        monkeypatch.setattr(supervisor, "_FIRST_RETRY_S", 0.1)
        async with supervise():
            asked = hinder_forks(monkeypatch, lambda _: False)
            flip_a_byte(bundles[1] / "model.onnx")
            put(pointer, f"{bundles[1]}\n")
            await asyncio.to_thread(logged.wait_for, "reload-refused")
            await asyncio.sleep(0.5)
            assert asked == [1]

    async def test_a_replacement_that_is_not_ready_in_time_is_given_up(
        self, supervise, monkeypatch, logged
    ):
        async with supervise() as supervised:
            (killed,) = workers_of(os.getpid())
            with monkeypatch.context() as patch:
                patch.setattr(supervisor, "_READY_WITHIN_S", 0.01)
                os.kill(killed, signal.SIGKILL)
                event, *_ = await asyncio.to_thread(logged.wait_for, "worker-refused")
            assert event["reason"] == "workers were not ready within 0.01 s"
            # The client waits in the queue of a socket that listens, until there is a worker.
            (worker,) = (await supervised.get("/admin/status"))["workers"]
            assert workers_of(os.getpid()) == {worker["pid"]}

    async def test_a_reload_of_what_is_served_that_fails_refuses_no_files(self, supervise, bundles):
        """They are served, as they stand, by those who opened them earlier."""
        graph = bundles[0] / "model.onnx"
        async with supervise() as supervised:
            found = graph.stat()
            flip_a_byte(graph)
            os.utime(graph, ns=(found.st_atime_ns, found.st_mtime_ns))
            reload = await supervised.reload(1)
            assert reload["outcome"] == "refused"
            assert "model.onnx has sha256 " in reload["reason"]
            assert (await supervised.get("/admin/status"))["refused"] is None
            assert (await supervised.get("/experiments"))["refused"] is None

    async def test_who_finds_another_listening_when_all_is_open_is_refused(
        self, pointer, redis_url, tmp_path, monkeypatch
    ):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        settings = Settings(bundle=pointer, redis_url=redis_url, port=free_port(), threads=1)
        (listener,) = bind(settings)
        (other,) = bind(settings)
        urls: list[str] = []
        with listener, other:
            other.listen()
            tested = supervisor.Supervisor(settings, [listener], folder=tmp_path)
            with pytest.raises(
                SettingsError, match=f"^host: cannot listen on .*:{settings.port}: "
            ):
                async with asyncio.timeout(PATIENCE_S):
                    await tested.run(read_wanted(settings), announce=urls.append)
        assert urls == []
        assert workers_of(os.getpid()) == set()


class TestNobodyIsFailed:
    def test_by_reloads_and_a_restart_of_a_worker_and_the_end(self, start, pointer, bundles):
        """Clients ask without a pause over three reloads, until the port is closed."""
        with start(drain_s=1.0) as service:
            clients = KeepAliveClients(service.port)
            with clients.asking(6, pause_s=0.001):
                for number in (1, 2, 3):
                    n_before = clients.n_answered
                    publish(pointer, bundles[number % 2])
                    assert service.wait_for_reload(number)["outcome"] == "applied"
                    wait_until(lambda: clients.n_answered > n_before, "they go on")  # noqa: B023
                opened = clients.connections
                service.process.send_signal(signal.SIGTERM)
                wait_until(lambda: service.get("/readyz").status_code == 503, "it says so")
                n_told, n_then = clients.told_to_close, clients.n_answered
                wait_until(lambda: clients.n_answered > n_then + 20, "it serves on")
                assert clients.told_to_close > n_told
                assert clients.connections > opened
                service.wait()
                clients.wait_until_nobody_listens()
            assert service.process.returncode == 0
        assert clients.failures == []
        assert set(clients.answers) == {(200, "tiny-1"), (200, "tiny-2")}

    def test_who_keeps_a_connection_is_told_to_leave_it(self, start, pointer, bundles):
        with (
            start(drain_s=60.0) as service,
            httpx.Client(base_url=service.url, trust_env=False, verify=False) as client,
        ):
            publish(pointer, bundles[1])
            answers = [client.get("/models")]

            def has_changed() -> bool:
                answers.append(client.get("/models"))
                return bool(answers[-1].json()["models"][0]["version"] == "tiny-2")

            wait_until(has_changed, "the new generation answers")
            *_, told, new = answers
            assert told.json()["models"][0]["version"] == "tiny-1"
            assert told.headers["connection"] == "close"
            assert "connection" not in new.headers

    def test_what_is_in_flight_when_it_ends_is_answered(self, start):
        """A request whose body comes late: it is inside when the service stops to accept."""
        with start(drain_s=0.0) as service, httpx.Client(trust_env=False, verify=False) as client:
            body = json.dumps({"user_id": "ann", "candidates": [10]}).encode()

            def late() -> Iterator[bytes]:
                yield body[:5]
                service.process.send_signal(signal.SIGTERM)
                time.sleep(0.5)
                yield body[5:]

            headers = {"X-Deadline-Ms": "30000", "Content-Length": str(len(body))}
            answer = client.post(f"{service.url}/score", content=late(), headers=headers)
            assert answer.status_code == 200, answer.text
            service.wait()
            assert service.process.returncode == 0


class TestWorkers:
    def test_one_that_is_killed_is_replaced(self, start):
        with start() as service:
            before = service.serving()
            n_scored = service.score_until_all_have(before)
            service.wait_for("mneme_requests_total /score", n_scored)
            killed = min(before)
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: len(service.serving() - {killed}) == 2, "there is a new worker")
            assert service.serving() & before == before - {killed}
            found = service.samples()
            assert found["mneme_requests_total /score"] == n_scored
            assert found["mneme_worker_restarts_total ended"] == 1
            assert found["mneme_model_info"] == 1
            assert service.status()["generation"] == 1
            _, stderr = service.end()
        (event,) = [one for one in events_of(stderr) if one["event"] == "worker-ended"]
        assert (event["worker"], event["how"]) == (killed, "signal 9")

    def test_one_whose_counts_are_damaged_is_replaced_and_metrics_answer(self, start):
        with start() as service:
            before = service.serving()
            service.score_until_all_have(before)
            killed = min(before)
            os.kill(killed, signal.SIGSTOP)
            (folder,) = service.metrics_folders
            (folder / f"counter_{killed}.db").write_bytes(b"\x7f" * 64)
            os.kill(killed, signal.SIGKILL)
            wait_until(lambda: len(service.serving() - {killed}) == 2, "there is a new worker")
            assert service.samples()["mneme_worker_restarts_total ended"] == 1
            _, stderr = service.end()
        (event,) = [one for one in events_of(stderr) if one["event"] == "counts-lost"]
        assert event["worker"] == killed

    def test_one_that_gives_no_sign_of_life_is_replaced(self, start):
        with start("--wedged-s", "2") as service:
            before = service.serving()
            stopped = max(before)
            os.kill(stopped, signal.SIGSTOP)
            wait_until(lambda: stopped not in service.pids, "it is killed")
            wait_until(lambda: len(service.pids) == 2, "there is a new worker")
            wait_until(lambda: len(service.serving()) == 2, "which serves")
            assert service.samples()["mneme_worker_restarts_total wedged"] == 1

    def test_without_their_supervisor_they_end(self, start):
        with start() as service:
            service.process.kill()
            service.process.wait()
            wait_until(lambda: service.living() == [], "all processes have ended")

    def test_a_supervisor_that_was_stopped_kills_nobody(self, start):
        with start("--wedged-s", "1.5") as service:
            before = service.serving()
            service.process.send_signal(signal.SIGSTOP)
            time.sleep(7)  # longer than any worker may be silent
            service.process.send_signal(signal.SIGCONT)
            time.sleep(2)
            assert service.serving() == before


class TestBeginning:
    def test_who_ends_it_then_finds_nothing_left_of_it(self, pointer, redis_url, tmp_path):
        given = ("--bundle", pointer, "--redis-url", redis_url)
        with running_service(*given, folder=tmp_path) as service:
            wait_until(lambda: service.metrics_folders != [], "it has begun")
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(PATIENCE_S) in (0, 128 + signal.SIGTERM)
            assert service.metrics_folders == []
            wait_until(lambda: service.living() == [], "all processes have ended")

    def test_that_nobody_can_be_told_its_url_is_no_reason_not_to_serve(
        self, pointer, redis_url, tmp_path
    ):
        given = ("--bundle", pointer, "--redis-url", redis_url)
        with running_service(*given, folder=tmp_path, output=Path("/dev/full")) as service:
            service.wait_until_ready()
            assert service.score()["version"] == "tiny-1"
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(PATIENCE_S) == 0

    async def test_whoever_fails_to_announce_it_leaves_no_worker_behind(
        self, pointer, redis_url, tmp_path, monkeypatch
    ):
        monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
        settings = Settings(bundle=pointer, redis_url=redis_url, port=0, threads=1, workers=2)
        listeners = bind(settings)
        tested = supervisor.Supervisor(settings, listeners, folder=tmp_path)

        def announce(_url: str) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            async with asyncio.timeout(PATIENCE_S):
                await tested.run(read_wanted(settings), announce=announce)
        assert workers_of(os.getpid()) == set()
        for listener in listeners:
            listener.close()


class TestEnd:
    def test_a_second_signal_ends_it_at_once(self, start):
        with start(drain_s=3600.0) as service:
            service.process.send_signal(signal.SIGTERM)
            wait_until(lambda: service.get("/readyz").status_code == 503, "it drains")
            _, stderr = service.end()
            assert service.process.returncode == 1
            wait_until(lambda: service.living() == [], "all processes have ended")
        assert [one["event"] for one in events_of(stderr)][-1] == "drain-broken-off"

    def test_a_terminal_that_interrupts_all_of_them_drains_too(self, start):
        with start() as service:
            os.killpg(service.process.pid, signal.SIGINT)
            _, stderr = service.wait()
            assert service.process.returncode == 0
        told = Counter(one["event"] for one in events_of(stderr))
        assert (told["draining"], told["service-stopped"]) == (1, 2)


@pytest.mark.parametrize(
    ("short_lives", "expected"),
    [(0, 0.0), (1, 0.0), (2, 0.5), (3, 1.0), (5, 4.0), (9, 30.0), (10_000, 30.0)],
)
def test_pauses_grow_with_workers_that_end_soon(short_lives, expected):
    assert supervisor.pause_s(short_lives) == expected
