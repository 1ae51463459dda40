"""The process that starts those that serve, replaces them, and ends them.

It holds the listening sockets, which all workers accept from, so that no connection is lost while
one set of workers, a generation, takes over from another. It opens no model, and so has nothing to
crash with.
"""

import asyncio
import json
import logging
import math
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Literal

from contract.errors import ContractError
from service.closing import refuse_new_connections
from service.control import HEARTBEAT_S, Link
from service.experiment import ExperimentError
from service.forks import Fork, Template
from service.listening import listen
from service.logs import log_event
from service.metrics import SupervisorMetrics, fold_ended_process
from service.schemas import ReloadStatus, Status, WorkerStatus
from service.settings import Settings, write_settings
from service.wanted import Wanted, read_wanted

# Opening the largest of bundles on a busy machine ends well within it.
_READY_WITHIN_S = 600.0
_IN_BACKGROUND_WITHIN_S = 60.0
_SERVING_WITHIN_S = 10.0
# A worker that ends sooner has not served; the pauses before further attempts grow.
_SHORT_LIFE_S = 10.0
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# Before another try of what the machine had no room for: one more may cost what serves its own.
_FIRST_RETRY_S = 30.0
_LONGEST_RETRY_S = 600.0
# A worker that notices by itself that it is wedged can say where, and ends with this status.
_WEDGED = os.EX_TEMPFAIL
_LAST_WORDS_S = 5.0
# For those who connected before nobody may any more: accepted by then, and answered.
_QUEUE_S = 0.1
_LAST_CONNECTIONS_S = 1.0
# A worker cancels its last requests well before: 10 s after their connections were to end.
_FINISH_S = 15.0

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """A generation of workers that cannot serve; the message says why.

    `may_pass`: by the machine, as far as one can tell, and not by what was to be served.
    """

    def __init__(self, reason: str, *, may_pass: bool = True) -> None:
        super().__init__(reason)
        self.may_pass = may_pass


class _Worker:
    """One process. `ready` and `serving` fail with RefusedError when it ends before."""

    state: Literal["starting", "ready", "serving", "leaving"]

    def __init__(self, process: Fork, link: Link, number: int) -> None:
        self.link = link
        self.generation = number
        self.state = "starting"
        self.may_accept = False
        self.heard = self.began = time.monotonic()
        loop = asyncio.get_running_loop()
        self.ready: asyncio.Future[None] = loop.create_future()
        self.serving: asyncio.Future[None] = loop.create_future()
        self.ended = asyncio.Event()
        self.is_wedged = False
        self._process = process
        self._reason: str | None = None

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def lived_s(self) -> float:
        """Since it may serve, however long it took to open what it serves."""
        return time.monotonic() - self.began

    def hear(self, said: dict[str, Any]) -> None:
        """Take in what it says of itself."""
        self.heard = time.monotonic()
        match said["message"]:
            case "ready" if not self.ready.done():
                self.state = "ready"
                self.ready.set_result(None)
            case "serving" if not self.serving.done():
                self.state = "serving"
                self.serving.set_result(None)
            case "failed":
                self._reason = said["reason"]

    def accept(self) -> None:
        """Let it serve. From now on it is replaced when it ends."""
        self.may_accept = True
        self.began = time.monotonic()
        self.link.say("accept")

    def leave(self, within_s: float) -> None:
        """End it when its connections have ended; at once where it has none."""
        if self.state == "serving":
            self.state = "leaving"
            self.link.say("leave", within_s=within_s)
        elif self.state != "leaving":
            self.kill()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    async def wait(self) -> str:
        """Return how it ended."""
        status = await self._process.wait()
        self.is_wedged = self.is_wedged or status == _WEDGED
        how = f"signal {-status}" if status < 0 else f"exit status {status}"
        refusal = RefusedError(
            self._reason or f"a worker ended with {how} before it could serve",
            may_pass=self._reason is None,
        )
        for future in (self.ready, self.serving):
            if not future.done():
                future.set_exception(refusal)
                future.exception()  # perhaps nobody waits for it any more
        self.ended.set()
        return self._reason or how


class Supervisor:
    """Workers, and what they serve. `folder`: of the metrics that all processes share."""

    def __init__(
        self, settings: Settings, listeners: Sequence[socket.socket], *, folder: Path
    ) -> None:
        self._settings = settings
        self._listeners = listeners
        self._folder = folder
        self._metrics = SupervisorMetrics()
        self._workers: set[_Worker] = set()
        self._following: set[asyncio.Task[None]] = set()
        self._replacing: set[asyncio.Task[None]] = set()
        self._template = Template({**os.environ, **write_settings(settings)})
        # Of the generation that serves; 0 before the first and after the last.
        self._generation = 0
        self._served: Wanted | None = None
        self._short_lives = 0
        self._tried: str | None = None
        self._retry_from = math.inf
        self._retry_s = _FIRST_RETRY_S
        self._refused: str | None = None
        self._reload: ReloadStatus | None = None
        self._reloading = False
        self._asked = asyncio.Event()
        self._ending = asyncio.Event()
        self._at_once = asyncio.Event()

    async def run(self, wanted: Wanted, *, announce: Callable[[str], None]) -> int:
        """Serve until a signal says to end; return the exit status.

        `announce`: is told the URL when the first generation serves. Raises RefusedError when that
        cannot, and SettingsError when somebody else listens at its address by then.
        """
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGHUP, self._asked.set)
        try:
            if await self._unless(self._ending, self._change(wanted)):
                announce(self._url())
                await self._unless(self._ending, self._watch(), self._tend())
            return await self._drain()
        finally:
            self._replace_nobody()
            await asyncio.gather(*self._replacing, return_exceptions=True)
            await self._kill(self._workers)
            self._template.close()

    def _end(self) -> None:
        (self._at_once if self._ending.is_set() else self._ending).set()

    async def _unless(self, event: asyncio.Event, *work: Awaitable[None]) -> bool:
        """Return whether the work came to its end before the event did, which breaks it off."""
        happened = asyncio.ensure_future(event.wait())
        tasks = [asyncio.ensure_future(one) for one in work]
        done, left = await asyncio.wait([happened, *tasks], return_when=asyncio.FIRST_COMPLETED)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        for task in done:
            task.result()
        return happened not in done

    def _url(self) -> str:
        port = self._listeners[0].getsockname()[1]
        host = self._settings.host
        return f"http://{f'[{host}]' if ':' in host else host}:{port}"

    # Generations

    async def _change(self, wanted: Wanted) -> None:
        """Let new workers take over from those that serve, all of them or none."""
        number = self._generation + 1
        count = self._settings.workers
        made = await self._make(wanted, number, count, background=self._served is not None)
        if self._served is None:
            listen(self._settings, self._listeners)
        before = [worker for worker in self._workers if worker not in made]
        self._generation, self._served, self._short_lives = number, wanted, 0
        for task in self._replacing:
            task.cancel()
        for worker in made:
            worker.accept()
        # One that ends instead is replaced as any other.
        await asyncio.wait([worker.serving for worker in made], timeout=_SERVING_WITHIN_S)
        for worker in before:
            self._let_leave(worker, self._settings.drain_s)
        self._tell()

    async def _make(
        self, wanted: Wanted, number: int, count: int, *, background: bool
    ) -> list[_Worker]:
        """Return so many workers that are ready, or raise RefusedError and leave none behind."""
        within_s = _IN_BACKGROUND_WITHIN_S if background else _READY_WITHIN_S
        made: list[_Worker] = []
        try:
            for _ in range(count):
                # One by one, so that those before one that cannot be started are known.
                made.append(await self._start(wanted, number, background=background))  # noqa: PERF401
            async with asyncio.timeout(within_s):
                await asyncio.gather(*(worker.ready for worker in made))
            if any(worker.ended.is_set() for worker in made):
                raise RefusedError("a worker ended while it waited for the others")
        except TimeoutError as error:
            await self._kill(made)
            if not background:
                raise RefusedError(f"workers were not ready within {within_s:g} s") from error
            # On a machine that is busy with everything else they would never be. Whoever rolls back
            # what made it so busy cannot wait.
            log_event(_log, logging.WARNING, "reload-hurried", after_s=within_s)
            return await self._make(wanted, number, count, background=False)
        except OSError as error:
            await self._kill(made)
            raise RefusedError(f"a worker cannot be started: {error}") from error
        except BaseException:
            await self._kill(made)
            raise
        return made

    async def _start(self, wanted: Wanted, number: int, *, background: bool) -> _Worker:
        start = {
            "experiment": wanted.experiment.model_dump(mode="json"),
            "background": background,
        }
        ours, theirs = socket.socketpair()
        with theirs, _file_of(start) as file:
            # First: nothing may fail between the start of a process and its place in the set.
            link = Link(ours)
            sockets = [one.fileno() for one in (theirs, *self._listeners)]
            try:
                process = self._template.fork([file.fileno(), *sockets])
            except BaseException:
                await link.close()
                raise
        worker = _Worker(process, link, number)
        self._workers.add(worker)
        task = asyncio.create_task(self._follow(worker))
        self._following.add(task)
        task.add_done_callback(self._following.discard)
        self._tell()
        return worker

    async def _follow(self, worker: _Worker) -> None:
        """Hear what a worker says until it has ended; replace it if it should not have."""
        async for said in worker.link:
            worker.hear(said)
            match said["message"]:
                case "reload":
                    self._asked.set()
                case "ready" | "serving":
                    self._tell()
        how = await worker.wait()
        await worker.link.close()
        try:
            await asyncio.to_thread(fold_ended_process, self._folder, worker.pid)
        except Exception as error:  # noqa: BLE001  # damaged, or no room: it is replaced all the same
            log_event(_log, logging.WARNING, "counts-lost", error=error, worker=worker.pid)
        self._workers.discard(worker)
        # Until it may accept it is the concern of those who started it.
        if worker.generation == self._generation and worker.may_accept:
            self._short_lives = self._short_lives + 1 if worker.lived_s < _SHORT_LIFE_S else 0
            reason = "wedged" if worker.is_wedged else "ended"
            self._metrics.worker_restarts.labels(reason).inc()
            log_event(_log, logging.ERROR, "worker-ended", worker=worker.pid, how=how)
            task = asyncio.create_task(self._replace())
            self._replacing.add(task)
            task.add_done_callback(self._replacing.discard)
        self._tell()

    async def _replace(self) -> None:
        """Start a worker of the generation that serves, again and again until one is ready."""
        assert self._served is not None, "what is replaced has served"
        while True:
            await asyncio.sleep(pause_s(self._short_lives))
            try:
                (worker,) = await self._make(self._served, self._generation, 1, background=False)
            except RefusedError as error:
                self._short_lives += 1
                log_event(_log, logging.ERROR, "worker-refused", reason=str(error))
            else:
                worker.accept()
                return

    async def _tend(self) -> None:
        """Kill workers that give no sign of life."""
        wedged_s = self._settings.wedged_s
        looked = time.monotonic()
        while True:
            await asyncio.sleep(min(HEARTBEAT_S, wedged_s / 2))
            now = time.monotonic()
            slept_s, looked = now - looked, now
            for worker in self._workers:
                if slept_s > wedged_s / 2 + HEARTBEAT_S:
                    # This process was stopped itself: what was said meanwhile is still unread.
                    worker.heard = now
                elif worker.state != "starting" and now - worker.heard > wedged_s + _LAST_WORDS_S:
                    log_event(_log, logging.ERROR, "worker-wedged", worker=worker.pid)
                    worker.is_wedged = True
                    worker.kill()

    # Reloads

    async def _watch(self) -> None:
        """Look at the files, again and again, and when somebody asks for it."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(self._settings.reload_poll_s):
                    await self._asked.wait()
            asked = self._asked.is_set()
            self._asked.clear()
            await self._look(asked=asked)

    async def _look(self, *, asked: bool) -> None:
        """Serve what the files say, where that is something else or somebody asked for it."""
        began = time.monotonic()
        is_served = False
        try:
            wanted = await asyncio.to_thread(read_wanted, self._settings)
            is_served = wanted.fingerprint == self._fingerprint
            if is_served and self._refused:
                # What could not be served is gone again.
                self._tried = self._refused = None
                self._tell()
            is_new = not is_served and wanted.fingerprint != self._tried
            is_due = not is_served and began >= self._retry_from
            if asked or is_new or is_due:
                if is_new:
                    self._retry_s = _FIRST_RETRY_S
                self._tried, self._retry_from = wanted.fingerprint, math.inf
                await self._try(wanted, began)
        except RefusedError as error:
            self._refuse(str(error), began, asked=asked, is_served=is_served)
            if error.may_pass:
                self._retry_from = time.monotonic() + self._retry_s
                self._retry_s = min(2 * self._retry_s, _LONGEST_RETRY_S)
        except (ContractError, ExperimentError) as error:
            self._tried = None
            self._refuse(str(error), began, asked=asked, is_served=is_served)
        except Exception as error:  # noqa: BLE001  # whatever it is, what is served goes on
            reason = f"unexpected {type(error).__name__}"
            self._refuse(reason, began, asked=asked, is_served=is_served, error=error)

    @property
    def _fingerprint(self) -> str:
        assert self._served is not None, "it is looked at while something is served"
        return self._served.fingerprint

    async def _try(self, wanted: Wanted, began: float) -> None:
        self._reloading = True
        self._tell()
        try:
            await self._change(wanted)
        finally:
            self._reloading = False
        self._refused = self._tried = None
        self._count("applied", None, began)
        assert self._reload is not None
        log_event(
            _log,
            logging.INFO,
            "reload-applied",
            generation=self._generation,
            versions=wanted.versions,
            took_s=self._reload.took_s,
        )

    def _refuse(
        self,
        reason: str,
        began: float,
        *,
        asked: bool,
        is_served: bool,
        error: Exception | None = None,
    ) -> None:
        """Tell of a reload that failed. `is_served`: it was asked for, of what is served anyway."""
        if reason == self._refused and not asked:  # a file that is away is away at every look
            return
        self._refused = None if is_served else reason
        self._count("refused", reason, began)
        log_event(_log, logging.ERROR, "reload-refused", error=error, reason=reason)

    def _count(
        self, outcome: Literal["applied", "refused"], reason: str | None, began: float
    ) -> None:
        self._metrics.reloads.labels(outcome).inc()
        self._reload = ReloadStatus(
            number=1 if self._reload is None else self._reload.number + 1,
            outcome=outcome,
            reason=reason,
            ended=time.time(),
            took_s=round(time.monotonic() - began, 3),
        )
        self._tell()

    def _tell(self) -> None:
        """Let every worker know what anybody may ask of it."""
        status = Status(
            generation=self._generation,
            workers=[
                WorkerStatus(pid=worker.pid, generation=worker.generation, state=worker.state)
                for worker in sorted(self._workers, key=lambda one: one.pid)
            ],
            reloading=self._reloading,
            refused=self._refused,
            last_reload=self._reload,
        ).model_dump()
        for worker in self._workers:
            worker.link.say("status", status=status)

    # The end

    async def _drain(self) -> int:
        """Say that no more should come, serve on, finish what is in flight; return the status."""
        self._replace_nobody()
        log_event(_log, logging.INFO, "draining", for_s=self._settings.drain_s)
        for worker in self._workers:
            worker.link.say("drain")
        if await self._unless(self._at_once, self._end_all()):
            return 0
        log_event(_log, logging.WARNING, "drain-broken-off")
        return 1

    def _replace_nobody(self) -> None:
        self._generation = 0
        for task in self._replacing:
            task.cancel()

    async def _end_all(self) -> None:
        if any(worker.state == "serving" for worker in self._workers):
            await asyncio.sleep(self._settings.drain_s)
            refuse_new_connections(self._listeners)
            await asyncio.sleep(_QUEUE_S)
        for listener in self._listeners:
            listener.close()
        within_s = min(_LAST_CONNECTIONS_S, self._settings.drain_s)
        for worker in list(self._workers):
            self._let_leave(worker, within_s)
        while self._following:
            await asyncio.wait(list(self._following))

    def _let_leave(self, worker: _Worker, within_s: float) -> None:
        worker.leave(within_s)
        # It has cancelled what was in flight, whatever its deadline: what is left hangs.
        asyncio.get_running_loop().call_later(within_s + _FINISH_S, worker.kill)

    async def _kill(self, workers: Iterable[_Worker]) -> None:
        killed = list(workers)
        for worker in killed:
            worker.kill()
        await asyncio.gather(*(worker.ended.wait() for worker in killed))


def _file_of(value: object) -> BinaryIO:
    """Return a file without a name that holds the JSON of a value, at its beginning."""
    file = os.fdopen(os.memfd_create("mneme"), "w+b")
    file.write(json.dumps(value).encode())
    file.seek(0)
    return file


def pause_s(short_lives: int) -> float:
    """Return how long to wait after so many workers that ended soon; nothing after the first."""
    if short_lives <= 1:
        return 0.0
    return float(min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2 ** min(short_lives - 2, 10)))
