"""What operators ask, and what a service that is about to end says."""

from collections.abc import Iterator

import pytest

from service.app import create_app
from service.schemas import ReloadStatus, Status, WorkerStatus
from service.supervised import Supervised
from tests.service.conftest import patient_settings
from tests.service.dummy_model import DummyModel
from tests.service.live_service import LiveService, live_service

REFUSED = Status(
    generation=3,
    workers=[WorkerStatus(pid=4711, generation=3, state="serving")],
    reloading=False,
    refused="bundle b: no such folder",
    last_reload=ReloadStatus(
        number=4, outcome="refused", reason="bundle b: no such folder", ended=1.5, took_s=0.25
    ),
)


@pytest.fixture
def asked() -> list[str]:
    return []


@pytest.fixture
def supervised(asked) -> Supervised:
    return Supervised(ask_reload=lambda: asked.append("reload"))


@pytest.fixture
def service(supervised, redis_url) -> Iterator[LiveService]:
    model = DummyModel()
    app = create_app(patient_settings(redis_url), lambda _: model, supervised=supervised)
    with live_service(app, model) as running:
        yield running


def test_the_status_is_what_the_supervisor_told_last(service, supervised):
    assert service.client.get("/admin/status").json()["generation"] == 0
    supervised.status = REFUSED
    assert service.client.get("/admin/status").json() == REFUSED.model_dump()


def test_a_refusal_is_seen_by_those_who_look_at_experiments_and_metrics(service, supervised):
    assert service.metric("mneme_reload_refused") == 0
    supervised.status = REFUSED
    assert service.client.get("/experiments").json()["refused"] == "bundle b: no such folder"
    assert service.metric("mneme_reload_refused") == 1


def test_a_reload_is_asked_for_and_not_awaited(service, asked):
    answer = service.client.post("/admin/reload")
    assert (answer.status_code, answer.json()["reloading"]) == (202, True)
    assert asked == ["reload"]


def test_reload_is_no_question(service, asked):
    assert service.client.get("/admin/reload").status_code == 405
    assert asked == []


def test_who_drains_is_not_ready_and_serves_on_and_closes_connections(service, supervised):
    assert "connection" not in service.score().headers
    supervised.drain()
    ready = service.client.get("/readyz")
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    for answer in (ready, service.score(), service.client.get("/healthz")):
        assert answer.headers["connection"] == "close"
    assert service.scores() == [1.0]


def test_who_is_replaced_is_ready_and_closes_connections(service, supervised):
    supervised.let_clients_leave()
    ready = service.client.get("/readyz")
    assert (ready.status_code, ready.headers["connection"]) == (200, "close")
