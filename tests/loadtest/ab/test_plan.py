"""A plan is checked when it is made, and comes back from JSON as it was."""

import dataclasses
import json
import math

import pytest

from loadtest.ab.people import Habits
from loadtest.ab.plan import Plan

PLAN = Plan(world="w.npz", url="http://here", users=6, processes=2, visits=20)


def test_settings_come_back_from_json_with_others_beside_them():
    plan = dataclasses.replace(PLAN, rate=2.5, habits=Habits(eta=1.0, seed=9))
    settings = json.loads(json.dumps(plan.as_settings())) | {"comment": "any"}
    assert Plan.from_settings(settings) == plan


def test_quotas_are_even_and_add_up_to_the_visits():
    assert [PLAN.quota(number) for number in range(6)] == [4, 4, 3, 3, 3, 3]


def test_without_a_number_of_visits_there_is_no_quota():
    assert dataclasses.replace(PLAN, visits=None, run_time_s=1.0).quota(0) == math.inf


def test_the_worlds_time_starts_at_the_start_day_and_is_sped_up():
    plan = dataclasses.replace(PLAN, start_days=1.5, speedup=10.0)
    assert plan.world_time_s(1000, 0.0) == 1000 + 129_600
    assert plan.world_time_s(1000, 2.55) == 1000 + 129_600 + 25


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"users": 0}, "users must be at least 1, got 0", id="users"),
        pytest.param({"processes": 0}, "processes must be at least 1", id="processes"),
        pytest.param({"users": 5}, r"multiple of processes \(2\), got 5", id="uneven"),
        pytest.param({"visits": 5}, r"visits must be at least users \(6\), got 5", id="visits"),
        pytest.param({"rate": 0.0}, "rate must be positive, got 0", id="rate"),
        pytest.param({"speedup": -1.0}, "speedup must be positive", id="speedup"),
        pytest.param({"run_time_s": math.inf}, "run_time_s must be positive, got inf", id="time"),
        pytest.param({"deadline_ms": math.nan}, "deadline_ms must be positive", id="deadline"),
        pytest.param({"start_days": -1.0}, "start_days must be 0 or more", id="start"),
        pytest.param({"visits": None}, "must say when the run ends", id="no end"),
        pytest.param({"ui_port": 8089}, "neither must be given", id="web page with an end"),
    ],
)
def test_what_cannot_be_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PLAN, **changes)
