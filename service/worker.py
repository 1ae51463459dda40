"""One serving process: `python -m service.worker CONTROL LISTENER...`, of the supervisor's.

The arguments are descriptors that it inherits: its end of the control channel, and the sockets to
listen on. Everything that takes processor time before it serves is imported and opened in a thread
that gives way to those who serve.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from threading import get_native_id
from typing import TYPE_CHECKING, Any, TypeVar

import uvicorn
import uvloop

from contract.errors import ContractError
from service.control import HEARTBEAT_S, Link
from service.errors import ServiceError
from service.experiment import Experiment, ExperimentError
from service.logs import configure, log_event
from service.schemas import Status
from service.settings import Settings, SettingsError, read_settings
from service.supervised import Supervised

if TYPE_CHECKING:
    from fastapi import FastAPI

# What is in flight when connections are ended may take so long.
FINISH_S = 10
# In steps of niceness.
_FURTHER_BEHIND = 10
_LOOK_S = 0.02

_log = logging.getLogger("service.worker")  # it is run as a program, by another name
_ResultT = TypeVar("_ResultT")


class _Server(uvicorn.Server):
    """A server that listens to the supervisor and not to signals."""

    def __init__(self, config: uvicorn.Config, state: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self._state = state

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections, which know the state that the lifespan has yielded."""
        self.lifespan.state.update(self._state)
        await super().startup(sockets)
        self.accepting.set()

    async def let_connections_end(self, within_s: float) -> None:
        """Accept no more of them; return when all are gone, or the time is."""
        for listener in self.servers:
            listener.close()
        deadline = time.monotonic() + within_s
        # Connections end within uvicorn, which has no event for it.
        while self.server_state.connections and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)


class _Worker:
    """What one worker does, from its first message to its last connection."""

    def __init__(self, settings: Settings, link: Link, listeners: list[socket.socket]) -> None:
        self._settings = settings
        self._link = link
        self._listeners = listeners
        self._supervised = Supervised(serving=False, ask_reload=lambda: link.say("reload"))
        self._started: asyncio.Future[dict[str, Any]] = asyncio.Future()
        self._may_accept = asyncio.Event()
        self._leave_within_s: asyncio.Future[float] = asyncio.Future()

    async def run(self) -> int:
        """Serve until told to leave; return the exit status."""
        tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
        try:
            app = await self._open(await self._started)
            async with app.router.lifespan_context(app) as state:
                self._link.say("ready")
                await self._may_accept.wait()
                await self._serve(app, state or {})
        except (ContractError, ExperimentError, ServiceError, SettingsError) as error:
            self._link.say("failed", reason=str(error))
            return 1
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return 0

    async def _listen(self) -> None:
        async for said in self._link:
            match said["message"]:
                case "start":
                    self._started.set_result(said)
                case "accept":
                    self._may_accept.set()
                case "status":
                    self._supervised.status = Status.model_validate(said["status"])
                case "drain":
                    self._supervised.drain()
                case "leave":
                    self._leave(said["within_s"])
        # Without a supervisor nobody would ever end this process.
        if not self._may_accept.is_set():
            os._exit(1)
        self._leave(self._settings.drain_s)

    def _leave(self, within_s: float) -> None:
        self._supervised.let_clients_leave()
        if not self._leave_within_s.done():
            self._leave_within_s.set_result(within_s)

    async def _beat(self) -> None:
        while True:
            self._link.say("alive")
            await asyncio.sleep(HEARTBEAT_S)

    async def _open(self, start: dict[str, Any]) -> "FastAPI":
        experiment = Experiment.model_validate(start["experiment"])
        settings, in_background = self._settings, start["background"]
        may_rise = await _in_thread(_import_what_serves, in_background=in_background)
        # The threads of onnxruntime's own pool are as far behind as the thread that makes them.
        has_pool = settings.provider != "cpu" or settings.threads != 1
        app = await _in_thread(
            partial(_application, settings, experiment, self._supervised),
            in_background=in_background and (may_rise or not has_pool),
        )
        if in_background and may_rise:
            _rise()
        return app

    async def _serve(self, app: "FastAPI", state: Mapping[str, Any]) -> None:
        server = _Server(_server_config(app), state)
        serving = asyncio.create_task(server.serve(sockets=self._listeners))
        accepting = asyncio.create_task(server.accepting.wait())
        await asyncio.wait((serving, accepting), return_when=asyncio.FIRST_COMPLETED)
        arms = app.state.services.arms
        arms.show(is_served=True)
        self._link.say("serving")
        versions = {arm.name: arm.metrics.version for arm in arms}
        log_event(_log, logging.INFO, "service-started", arms=versions)
        within_s = await self._leave_within_s
        arms.show(is_served=False)
        await server.let_connections_end(within_s)
        server.should_exit = True
        await serving
        log_event(_log, logging.INFO, "service-stopped")


async def _in_thread(work: Callable[[], _ResultT], *, in_background: bool) -> _ResultT:
    """Do work in a thread of its own, which gives way to all others if it is in the background."""
    with ThreadPoolExecutor(1, initializer=_give_way if in_background else None) as thread:
        return await asyncio.get_running_loop().run_in_executor(thread, work)


def _import_what_serves() -> bool:
    """Import it; return whether a thread that gave way may rise again."""
    import_module("service.app")
    import_module("service.model")
    own = get_native_id()
    try:
        os.setpriority(os.PRIO_PROCESS, own, os.getpriority(os.PRIO_PROCESS, own) - 1)
    except PermissionError:
        return False
    return True


def _application(settings: Settings, experiment: Experiment, supervised: Supervised) -> "FastAPI":
    """Return the application with all bundles open."""
    from service.app import create_app
    from service.model import OnnxModel

    opened = {
        bundle: OnnxModel(bundle, provider=settings.provider, threads=settings.threads)
        for bundle in {arm.bundle for arm in experiment.arms.values()}
    }
    return create_app(settings, opened.pop, experiment=experiment, supervised=supervised)


def _server_config(app: "FastAPI") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",  # it is the worker's: what cannot be opened is told to the supervisor
        log_config=None,  # the root's handler writes what the server says
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=FINISH_S,
    )


def _give_way() -> None:
    """Let other threads of the machine go before this one, and before those that it starts."""
    os.setpriority(os.PRIO_PROCESS, get_native_id(), _own_niceness() + _FURTHER_BEHIND)


def _rise() -> None:
    """Let all threads of this process be as the first."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(ProcessLookupError):  # it has just ended
            os.setpriority(os.PRIO_PROCESS, int(thread.name), _own_niceness())


def _own_niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, os.getpid())


def main(arguments: Sequence[str]) -> int:
    """Run one worker; return its exit status."""
    # A terminal and some supervisors of services signal all processes of a group.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    control, *listeners = (socket.socket(fileno=int(one)) for one in arguments)
    settings = read_settings({})
    configure(
        level=settings.log_level,
        style=settings.log_format,
        personal_data=settings.log_personal_data,
    )

    async def work() -> int:
        link = await Link.over(control)
        try:
            return await _Worker(settings, link, listeners).run()
        except Exception as error:  # noqa: BLE001  # whatever it is, the supervisor must hear of it
            log_event(_log, logging.ERROR, "worker-failed", error=error)
            link.say("failed", reason=f"unexpected {type(error).__name__}")
            return 1
        finally:
            await link.close()

    return uvloop.run(work())


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main(sys.argv[1:]))
