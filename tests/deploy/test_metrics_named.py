"""What a rule, a dashboard or the documentation names is measured, and the other way round."""

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.app import create_app
from service.metrics import SupervisorMetrics
from tests.service.conftest import patient_settings
from tests.service.dummy_model import DummyModel
from tests.service.live_service import live_service

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/rules.yml"
DOCUMENT = ROOT / "docs/metrics.md"
GRAFANA = ROOT / "deploy/grafana"
DASHBOARDS = sorted((GRAFANA / "dashboards").glob("*.json"))


@pytest.fixture(scope="module")
def exposed() -> dict[str, str]:
    """Types by name, as a running service says them on /metrics."""
    model = DummyModel()
    settings = patient_settings("redis://127.0.0.1:1/0")  # a closed port: nobody is asked
    with live_service(create_app(settings, lambda _: model), model) as service:
        text = service.client.get("/metrics").text
        text += generate_latest(SupervisorMetrics().registry).decode()
        families = text_string_to_metric_families(text)
        # The parser leaves out what every counter's name ends with.
        return {
            f"{one.name}_total" if one.type == "counter" else one.name: one.type for one in families
        }


def named(path: Path) -> set[str]:
    """Return the names of metrics in a file; a recorded series has a colon, and is none."""
    return set(re.findall(r"(?<![\w:])mneme_[a-z0-9_]+(?![\w:])", path.read_text()))


def recorded(path: Path) -> set[str]:
    return set(re.findall(r"(?<![\w:])(?:job|job_arm|mneme):\w+:\w+", path.read_text()))


def ids(path: Path) -> str:
    return path.name


@pytest.mark.parametrize("path", [RULES, DOCUMENT, *DASHBOARDS], ids=ids)
def test_what_is_named_is_measured(path, exposed):
    of_histograms = {
        f"{name}_{part}"
        for name, kind in exposed.items()
        if kind == "histogram"
        for part in ("bucket", "sum", "count")
    }
    assert named(path)
    assert named(path) <= set(exposed) | of_histograms


def test_what_is_measured_is_documented(exposed):
    assert set(exposed) <= named(DOCUMENT)


def test_each_metric_is_seen_on_a_dashboard_or_by_a_rule(exposed):
    text = "".join(path.read_text() for path in (RULES, *DASHBOARDS))
    assert [name for name in exposed if name not in text] == []


@pytest.mark.parametrize("path", [RULES, DOCUMENT, *DASHBOARDS], ids=ids)
def test_a_recorded_series_that_is_named_is_recorded(path):
    assert recorded(path) <= set(re.findall(r"- record: (\S+)", RULES.read_text()))


def test_each_alert_is_documented():
    alerts = set(re.findall(r"- alert: (\w+)", RULES.read_text()))
    assert set(re.findall(r"`(Mneme\w+)`", DOCUMENT.read_text())) == alerts


def test_the_dashboards_are_three_and_each_has_a_name_of_its_own():
    boards = [json.loads(path.read_text()) for path in DASHBOARDS]
    assert [board["uid"] for board in boards] == [
        "mneme-experiments",
        "mneme-redis",
        "mneme-service",
    ]


@pytest.mark.parametrize("path", DASHBOARDS, ids=ids)
class TestDashboard:
    def panels(self, path: Path) -> list[dict[str, Any]]:
        panels: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
        return panels

    def test_every_question_goes_to_the_provisioned_source(self, path):
        source = (GRAFANA / "provisioning/datasources/prometheus.yml").read_text()
        (uid,) = re.findall(r"uid: (\S+)", source)
        asked = [one for panel in self.panels(path) for one in [panel, *panel.get("targets", [])]]
        sources = {one["datasource"]["uid"] for one in asked if one.get("type") != "row"}
        assert sources == {uid}

    def test_panels_have_ids_and_places_of_their_own(self, path):
        panels = self.panels(path)
        assert len({panel["id"] for panel in panels}) == len(panels)
        places = [panel["gridPos"] for panel in panels]
        assert all(place["x"] + place["w"] <= 24 for place in places)
        for one, other in combinations(places, 2):
            beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
            below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
            assert beside or below, (one, other)

    def test_panels_say_what_they_show(self, path):
        titles = [panel["title"] for panel in self.panels(path)]
        assert all(titles)
        assert len(set(titles)) == len(titles)


def test_the_line_of_30_ms_is_drawn_where_latencies_are():
    """Where a panel shows how long answers take, 0.03 is its threshold."""
    board = json.loads((GRAFANA / "dashboards/service.json").read_text())
    shown = {panel["title"]: panel for panel in board["panels"]}
    for title in ("Latency of answers", "p99 of each stage"):
        defaults = shown[title]["fieldConfig"]["defaults"]
        assert defaults["custom"]["thresholdsStyle"] == {"mode": "line"}
        assert defaults["thresholds"]["steps"][-1] == {"color": "red", "value": 0.03}
