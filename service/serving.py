"""What a worker does, from its bundles to its last connection."""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import uvicorn
import uvloop
from fastapi import FastAPI

from contract.errors import ContractError
from service.api_keys import ApiKeysError
from service.app import create_app
from service.connections import limited_protocol
from service.control import HEARTBEAT_S, Link
from service.errors import ServiceError
from service.experiment import Experiment, ExperimentError
from service.logs import configure, log_event
from service.model import OnnxModel
from service.priority import in_background, may_rise, rise
from service.schemas import Status
from service.settings import Settings, SettingsError, read_settings
from service.supervised import Supervised

# What is in flight when connections are ended may take so long, whatever its deadline; then it is
# cancelled.
_FINISH_S = 10
_LOOK_S = 0.02

_log = logging.getLogger(__name__)


def serve(control: socket.socket, listeners: list[socket.socket], start: Mapping[str, Any]) -> int:
    """Serve what `start` says until the supervisor says to leave; return the exit status.

    `start`: an `experiment`, and whether to open it in the `background`.
    """
    settings = read_settings({})
    configure(
        level=settings.log_level,
        style=settings.log_format,
        personal_data=settings.log_personal_data,
    )

    async def work() -> int:
        link = Link(control)
        try:
            return await _Worker(settings, link, listeners).run(start)
        except Exception as error:  # noqa: BLE001  # whatever it is, the supervisor must hear of it
            log_event(_log, logging.ERROR, "worker-failed", error=error)
            link.say("failed", reason=f"unexpected {type(error).__name__}")
            return 1
        finally:
            await link.close()

    return uvloop.run(work())


class _Server(uvicorn.Server):
    """A server that listens to the supervisor and not to signals. `state`: what the lifespan has
    yielded, for its connections.
    """

    def __init__(self, config: uvicorn.Config, state: Mapping[str, Any]) -> None:
        super().__init__(config)
        self.accepting = asyncio.Event()
        self._state = state

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave them alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        self.lifespan.state.update(self._state)
        await super().startup(sockets)
        self.accepting.set()

    async def let_connections_end(self, within_s: float) -> None:
        """Accept no more of them; return when all are gone, or the time is."""
        for listener in self.servers:
            listener.close()
        deadline = time.monotonic() + within_s
        # One that has just been accepted is not among them yet. And they end within uvicorn, which
        # has no event for it.
        await asyncio.sleep(_LOOK_S)
        while self.server_state.connections and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)


class _Worker:
    """One worker. It serves when told to, and leaves when told to or when it is alone."""

    def __init__(self, settings: Settings, link: Link, listeners: list[socket.socket]) -> None:
        self._settings = settings
        self._link = link
        self._listeners = listeners
        self._supervised = Supervised(serving=False, ask_reload=lambda: link.say("reload"))
        self._may_accept = asyncio.Event()
        self._leave_within_s: asyncio.Future[float] = asyncio.Future()

    async def run(self, start: Mapping[str, Any]) -> int:
        tasks = [asyncio.create_task(self._listen()), asyncio.create_task(self._beat())]
        try:
            experiment = Experiment.model_validate(start["experiment"])
            app = await self._open(experiment, background=start["background"])
            async with app.router.lifespan_context(app) as state:
                self._link.say("ready")
                await self._may_accept.wait()
                await self._serve(app, state or {})
        except (ApiKeysError, ContractError, ExperimentError, ServiceError, SettingsError) as error:
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

    async def _open(self, experiment: Experiment, *, background: bool) -> FastAPI:
        settings = self._settings
        opened = partial(_application, settings, experiment, self._supervised)
        # The threads of onnxruntime's own pool give way as the thread does that makes them.
        has_pool = settings.provider != "cpu" or settings.threads != 1
        if not background or (has_pool and not may_rise()):
            return await asyncio.to_thread(opened)
        app = await asyncio.to_thread(in_background, opened)
        rise()
        return app

    async def _serve(self, app: FastAPI, state: Mapping[str, Any]) -> None:
        server = _Server(_server_config(app, self._settings), state)
        serving = asyncio.create_task(server.serve(sockets=self._listeners))
        accepting = asyncio.create_task(server.accepting.wait())
        await asyncio.wait((serving, accepting), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()  # what kept it from accepting goes on from here
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


def _application(settings: Settings, experiment: Experiment, supervised: Supervised) -> FastAPI:
    """Return the application with all bundles open."""
    opened = {
        bundle: OnnxModel(bundle, provider=settings.provider, threads=settings.threads)
        for bundle in {arm.bundle for arm in experiment.arms.values()}
    }
    return create_app(settings, opened.pop, experiment=experiment, supervised=supervised)


def _server_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=limited_protocol(settings),
        ws="none",
        lifespan="off",  # it is the worker's: what cannot be opened is told to the supervisor
        log_config=None,  # the root's handler writes what the server says
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_FINISH_S,
    )
