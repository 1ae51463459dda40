"""The rules by promtool: that they are valid, and which alert fires when."""

import re
import subprocess

import pytest

from tests.deploy.prometheus_server import DEPLOYED, needs_prometheus

SCENARIOS = sorted(DEPLOYED.glob("*_test.yml"))


def promtool(*arguments: str) -> None:
    done = subprocess.run(
        ["promtool", *arguments], cwd=DEPLOYED, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_the_configuration_and_the_rules_that_it_names_are_valid():
    promtool("check", "config", "prometheus.yml")


@needs_prometheus
def test_no_rule_stands_there_twice():
    promtool("check", "rules", "--lint=all", "--lint-fatal", "rules.yml")


@needs_prometheus
@pytest.mark.parametrize("path", SCENARIOS, ids=lambda path: path.stem)
def test_each_alert_fires_when_it_should_and_no_other_does(path):
    promtool("test", "rules", path.name)


def test_each_alert_is_seen_to_fire():
    alerts = re.findall(r"- alert: (\w+)", (DEPLOYED / "rules.yml").read_text())
    seen = {
        name for path in SCENARIOS for name in re.findall(r'alertname="(\w+)"', path.read_text())
    }
    assert seen == set(alerts)
    assert len(alerts) == len(seen)
