"""A real Prometheus that watches a real service, by the deployed configuration."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from contract.errors import BundleError
from service.app import create_app
from service.metrics import SupervisorMetrics
from tests.deploy.prometheus_server import Prometheus, needs_prometheus, prometheus_server
from tests.service.conftest import StoppableRedis, patient_settings
from tests.service.dummy_model import DummyModel
from tests.service.histories import NOW
from tests.service.live_service import LiveService, live_service, wait_until

pytestmark = needs_prometheus
DASHBOARDS = sorted((Path(__file__).parents[2] / "deploy/grafana/dashboards").glob("*.json"))
# Two arms and a shadow, so that no panel of experiments is empty.
EXPERIMENTS = """
salt = "s"
[arms.din]
bundle = "din"
share = 0.5
[arms.imn]
bundle = "imn"
share = 0.5
[arms.next]
bundle = "next"
share = 1
shadow = true
"""
# What Grafana puts in place of its variables.
VARIABLES = {"$__rate_interval": "1m", "$__range": "5m", "$arm": ".*"}
# There is none here: the service is a thread of the test.
OF_SUPERVISOR = [f"{one.name}_total" for one in SupervisorMetrics().registry.collect()]
SHARE = "job:mneme_within_30ms:ratio_rate5m"


class Watched:
    """A service, its Redis, and the Prometheus that watches it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.redis = StoppableRedis()
        stack.callback(self.redis.stop)
        experiments = folder / "experiments.toml"
        experiments.write_text(EXPERIMENTS)
        models = {name: _model(name) for name in ("din", "imn", "next")}

        def open_model(bundle: Path) -> DummyModel:
            if bundle.name not in models:
                raise BundleError(f"bundle {bundle}: no such folder")
            return models[bundle.name]

        settings = patient_settings(self.redis.url, bundle=None, experiments=experiments)
        app = create_app(settings, open_model)
        self.service: LiveService = stack.enter_context(live_service(app, None))
        host, port = self.service.address
        self.prometheus: Prometheus = stack.enter_context(
            prometheus_server(folder, f"{host}:{port}")
        )
        self._n_asked = 0

    def ask(self) -> None:
        """Do once what callers do: ask for scores of some users, for items, and post events."""
        for n in range(8):
            assert self.service.score(f"user {n}", [1, 95]).status_code == 200
        assert self.service.recommend().status_code == 200
        self._n_asked += 1
        assert self.service.events(("ann", 5, NOW + self._n_asked)).status_code == 200


def _model(name: str) -> DummyModel:
    model = DummyModel()
    model.manifest = model.manifest.model_copy(update={"model_version": f"{name}-v"})
    return model


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Iterator[Watched]:
    with ExitStack() as stack:
        yield Watched(tmp_path_factory.mktemp("watched"), stack)


def test_the_share_within_30_ms_is_recorded(watched):
    def is_recorded() -> bool:
        watched.ask()
        return watched.prometheus.value(SHARE) is not None

    wait_until(is_recorded, "the share is recorded")
    share = watched.prometheus.value(SHARE)
    assert share is not None
    assert 0 <= share <= 1
    arms = watched.prometheus.query("job_arm:mneme_within_30ms:ratio_rate5m")
    # The shadow answers nobody.
    assert {one["metric"]["arm"] for one in arms} == {"din", "imn"}


def test_a_redis_that_goes_away_fires_its_alert_and_no_alert_of_the_service(watched):
    prometheus = watched.prometheus
    wait_until(lambda: prometheus.value("mneme_redis_up") == 1, "Prometheus has seen Redis")
    wait_until(lambda: prometheus.value('up{job="mneme"}') == 1, "and the service")
    wait_until(lambda: "MnemeDown" not in prometheus.firing(), "nothing is down")
    assert "MnemeRedisAway" not in prometheus.firing()
    watched.redis.stop()
    wait_until(lambda: "MnemeRedisAway" in prometheus.firing(), "Redis is away")
    assert not {"MnemeDown", "MnemeQueueFull", "MnemeReloadRefused"} & prometheus.firing()
    watched.redis.start()
    wait_until(lambda: "MnemeRedisAway" not in prometheus.firing(), "Redis is back")


def test_every_question_of_the_dashboards_is_answered(watched):
    """But those of a GPU, which this service does not run on."""
    waiting = [
        (f"{path.name}: {panel['title']}", target["expr"])
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", [])
        if not any(name in target["expr"] for name in (*OF_SUPERVISOR, "mneme_gpu_"))
    ]
    assert waiting

    def are_answered() -> bool:
        watched.ask()
        waiting[:] = [(where, asked) for where, asked in waiting if not _answer(watched, asked)]
        time.sleep(0.2)
        return not waiting

    try:
        wait_until(are_answered, "every panel has data")
    except AssertionError as error:
        raise AssertionError(f"without data: {waiting}") from error


def _answer(watched: Watched, asked: str) -> bool:
    for variable, value in VARIABLES.items():
        asked = asked.replace(variable, value)
    return bool(watched.prometheus.query(asked))
