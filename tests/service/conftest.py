"""A real Redis, real servers around a predictable model, and one real bundle."""

import logging
import shutil
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from redis import Redis

from contract.bundle import ScoreKind
from loadtest.redis_server import free_port, redis_server
from service.app import create_app
from service.history import HistoryStore
from service.redis_nodes import connect
from service.settings import Settings
from tests.service.dummy_model import HISTORY_LENGTH, QUICK, DummyModel
from tests.service.live_service import PATIENCE_S, LiveService, live_service
from tests.service.logged import Logged
from tests.service.tiny_bundle import make_bundle

# The machine may be busy with anything: where a test is not about time, there is plenty of it.
_TIMEOUT_S = 5.0


@pytest.fixture(scope="session")
def _redis_server() -> Iterator[str]:
    with redis_server() as url:
        yield url


@pytest.fixture
def redis_url(_redis_server) -> str:
    """Where Redis is; it is empty when a test begins."""
    with Redis.from_url(_redis_server) as client:
        client.flushall()
    return str(_redis_server)


@pytest.fixture
def redis(redis_url) -> Iterator[Redis]:
    with Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def away_url() -> str:
    """Where no Redis is."""
    return f"redis://127.0.0.1:{free_port()}/0"


class StoppableRedis:
    """A Redis of the test's own, that comes back on the same port, empty."""

    def __init__(self) -> None:
        self._port = free_port()
        self._running = ExitStack()
        self.url = f"redis://127.0.0.1:{self._port}/0"
        self.start()

    def start(self) -> None:
        self._running.enter_context(redis_server(self._port))

    def stop(self) -> None:
        self._running.close()


@pytest.fixture
def stoppable_redis() -> Iterator[StoppableRedis]:
    server = StoppableRedis()
    yield server
    server.stop()


@pytest.fixture
async def store(redis_url) -> AsyncIterator[HistoryStore]:
    """A store on the empty Redis that keeps as many behaviors as the dummy model reads."""
    store = HistoryStore(
        connect(redis_url, timeout_s=_TIMEOUT_S), prefix="history", keep=HISTORY_LENGTH
    )
    yield store
    await store.close()


@pytest.fixture
async def away_store(away_url) -> AsyncIterator[HistoryStore]:
    store = HistoryStore(
        connect(away_url, timeout_s=_TIMEOUT_S), prefix="history", keep=HISTORY_LENGTH
    )
    yield store
    await store.close()


def patient_settings(redis_url: str, **changes: Any) -> Settings:
    return Settings(
        **{
            "bundle": Path("unused"),
            "redis_url": redis_url,
            "redis_timeout_s": _TIMEOUT_S,
            "deadline_s": PATIENCE_S,
            "recommend_deadline_s": PATIENCE_S,
            "wedged_s": 10 * PATIENCE_S,  # it would be pytest that ends
            **changes,
        }
    )


@pytest.fixture(scope="session")
def _shared_service(_redis_server) -> Iterator[LiveService]:
    model = DummyModel()
    with live_service(
        create_app(patient_settings(_redis_server), lambda _: model), model
    ) as service:
        yield service


@pytest.fixture
def service(_shared_service: LiveService, redis_url) -> LiveService:  # noqa: ARG001  # emptied
    """The service that most tests share; its metrics have counted other tests too."""
    _shared_service.model.reset()
    return _shared_service


Serve = Callable[..., LiveService]


@pytest.fixture
def serve(redis_url) -> Iterator[Serve]:
    """Start services of the test's own, with other settings or from zero."""
    with ExitStack() as stack:

        def start(
            *,
            history: HistoryStore | None = None,
            warm_up_took: Sequence[tuple[int, float]] = QUICK,
            score_kind: ScoreKind = "affinity",
            explains: bool = False,
            **changes: Any,
        ) -> LiveService:
            model = DummyModel(warm_up_took=warm_up_took, score_kind=score_kind, explains=explains)
            settings = patient_settings(changes.pop("redis_url", redis_url), **changes)
            service = stack.enter_context(
                live_service(
                    create_app(settings, lambda _: model, history=history), model, settings
                )
            )
            model.reset()  # what it ran to become warm is no test's
            return service

        yield start


@pytest.fixture(scope="session")
def good_bundle(tmp_path_factory) -> Path:
    """A bundle to read; for tampering there is `bundle`."""
    return make_bundle(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def bundle(good_bundle, tmp_path) -> Path:
    """A bundle of the test's own."""
    return Path(shutil.copytree(good_bundle, tmp_path / "bundle"))


@pytest.fixture
def logged() -> Iterator[Logged]:
    """All that is written, debugging too, by services that do not ask for personal data."""
    found = Logged()
    with found.listening(logging.DEBUG, personal_data=False):
        yield found
