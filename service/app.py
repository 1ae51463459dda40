"""The ASGI application."""

import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from contract.records import MAX_ITEM
from service import admin, api, browse, problems, site
from service.access import Guard, describe, route_of
from service.body_limit import BodyLimit
from service.errors import (
    HeadTooLargeError,
    MalformedRequestError,
    RequestTooSlowError,
    ServiceError,
)
from service.experiment import Experiment
from service.history import HistoryStore
from service.http_protocol import METRICS
from service.logs import log_event
from service.model import Model
from service.problems import responses
from service.request_log import RequestLog, ids_of
from service.score_endpoint import score_endpoint
from service.settings import Settings
from service.supervised import Supervised
from service.titles import read_titles
from service.wanted import wanted_experiment
from service.wiring import ARM, running

_log = logging.getLogger(__name__)
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


def create_app(
    settings: Settings,
    open_model: Callable[[Path], Model],
    *,
    experiment: Experiment | None = None,
    history: HistoryStore | None = None,
    supervised: Supervised | None = None,
) -> FastAPI:
    """Return the application that serves an experiment, by default what the settings name.

    `open_model`: loads a bundle. `history`: replaces the store of the settings. `supervised`: what
    the supervisor says meanwhile, where there is one. Raises SettingsError where the file of titles
    cannot be read, BundleError or ExperimentError where what the settings name cannot.
    """
    experiment = experiment or wanted_experiment(settings)
    supervised = supervised or Supervised()
    titles = read_titles(settings.titles)

    requests = RequestLog(settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[dict[str, object]]:
        async with running(
            settings,
            experiment,
            open_model,
            supervised=supervised,
            titles=titles,
            history=history,
        ) as services:
            app.state.services = services
            if supervised.serving:
                services.arms.show(is_served=True)
            yield {METRICS: services.metrics}
        await requests.close()

    app = _App(
        title="Mneme",
        summary="Scores candidate items for a user by that user's last 1,000 behaviors.",
        docs_url=None,  # `site` has its own
        redoc_url=None,
        lifespan=lifespan,
        responses=responses(MalformedRequestError, RequestTooSlowError, HeadTooLargeError),
        redirect_slashes=False,  # to wherever the Host header says
    )
    app.include_router(api.router)
    app.include_router(browse.router)
    app.include_router(admin.router)
    site.install(app)
    problems.install(app)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    app.add_middleware(_JsonBody)
    app.add_middleware(Guard)
    app.add_middleware(_AlwaysAnswer, requests=requests, supervised=supervised)
    limited = BodyLimit(score_endpoint, max_bytes=settings.max_body_bytes)
    app.score = _AlwaysAnswer(Guard(limited), requests=requests, supervised=supervised)
    app.asks_for_keys = settings.api_keys is not None
    return app


class _App(FastAPI):
    """Hands `POST /score` over before any routing, and everything else to FastAPI."""

    score: ASGIApp
    asks_for_keys: bool

    def openapi(self) -> dict[str, Any]:
        """Return the description of the routes, made once.

        With the largest item id as it is, which FastAPI rounds to a float, and the keys.
        """
        if self.openapi_schema is None:
            document = super().openapi()
            for schema in document["components"]["schemas"].values():
                _restore_largest_id(schema)
            self.openapi_schema = describe(document) if self.asks_for_keys else document
        return self.openapi_schema

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/score" and scope["method"] == "POST":
            scope["app"] = self
            await self.score(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _restore_largest_id(schema: Any) -> None:
    if isinstance(schema, dict):
        if schema.get("maximum") == float(MAX_ITEM):
            schema["maximum"] = MAX_ITEM
        for part in schema.values():
            _restore_largest_id(part)


class _JsonBody:
    """ASGI middleware: a body is JSON, whatever its sender calls it. curl says form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = [(k, v) for k, v in scope["headers"] if k != b"content-type"]
            # In place: what a route leaves in the scope is read outside.
            scope["headers"] = [*headers, (b"content-type", b"application/json")]
        await self._app(scope, receive, send)


class _AlwaysAnswer:
    """ASGI middleware: counts answers by route and status, and answers where nobody else did.

    Every answer says the ids of its request.
    """

    def __init__(self, app: ASGIApp, *, requests: RequestLog, supervised: Supervised) -> None:
        self._app = app
        self._requests = requests
        self._supervised = supervised

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        began = time.perf_counter()
        route = route_of(scope["path"])
        context = self._requests.begin(scope, route)
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                arm = scope.get(ARM)
                scope["app"].state.services.metrics.count_answer(
                    route,
                    status,
                    arm=arm.name if arm else "",
                    version=arm.metrics.version if arm else "",
                )
                message["headers"] = [
                    *message["headers"],
                    *context.headers,
                    _NO_SNIFFING,
                    *self._supervised.closing,
                ]
            await send(message)

        try:
            await self._app(scope, receive, counted)
        except Exception as error:  # whatever it is, the client must hear of it
            if status:
                raise
            ids = ids_of(context)
            log_event(_log, logging.ERROR, "request-failed", error=error, **ids, route=route)
            answer = problems.problem_response(ServiceError(f"unexpected {type(error).__name__}"))
            await answer(scope, receive, counted)
        finally:
            self._requests.end(
                context,
                scope,
                route=route,
                status=status,
                began=began,
                ended=time.perf_counter(),
            )
