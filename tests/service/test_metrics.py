"""Metrics of one process, and of several that share a folder."""

import os
import platform
import subprocess
import sys
from importlib.metadata import version

import pytest
from prometheus_client.parser import text_string_to_metric_families

from service.metrics import (
    DROP_REASONS,
    FOLDER_VARIABLE,
    STAGES,
    Metrics,
    fold_ended_process,
)
from tests.service.arm_metrics import of_arm, sample
from tests.service.live_service import PATIENCE_S

# A worker that has answered, has requests waiting, and ends without a word.
WORKER = """
import os
from service.metrics import Metrics
metrics = Metrics()
metrics.model_info.labels("dummy", "main", "dummy-1").set(1)
metrics.count_answer("/score", 200, arm="main", version="dummy-1")
metrics.count_answer("/score", 200, arm="main", version="dummy-1")
main = metrics.of_arm("main", "dummy-1")
main.observe_stage("total", 0.02)
main.queued_requests.set(5)
main.queued_work.set(500)
metrics.queue_work_limit.set(1000)
metrics.redis_up.set(0)
"""
SEE_REDIS = "metrics.redis_up.set(1)\n"
SAY = "print(metrics.text().decode())"
DIE = "metrics.flush(); os._exit(0)"


def samples(text: str) -> dict[tuple[str, tuple[str, ...]], float]:
    """Return the value of each sample by its name and the values of its labels, by their names."""
    return {
        (sample.name, tuple(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_two_applications_of_a_process_count_for_themselves():
    one, other = Metrics(), Metrics()
    one.count_answer("/score", 200)
    assert samples(one.text().decode())["mneme_requests_total", ("", "/score", "200", "")] == 1
    assert not [key for key in samples(other.text().decode()) if key[0] == "mneme_requests_total"]


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_is_there_before_anything_was_scored(stage):
    metrics = Metrics()
    arm = of_arm(metrics)
    assert sample(metrics, "mneme_stage_seconds_count", stage=stage) == 0
    arm.observe_stage(stage, 0.02)
    assert sample(metrics, "mneme_stage_seconds_sum", stage=stage) == 0.02


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_of_a_recommendation_is_there_before_the_first(stage):
    metrics = Metrics()
    of_arm(metrics)
    assert sample(metrics, "mneme_recommend_seconds_count", stage=stage) == 0


@pytest.mark.parametrize(
    ("seconds", "within"), [(0.2, 1), (0.201, 0)], ids=["within the deadline", "beyond"]
)
def test_the_deadline_of_a_recommendation_is_an_edge(seconds, within):
    metrics = Metrics()
    of_arm(metrics).observe_recommend_stage("total", seconds)
    found = sample(metrics, "mneme_recommend_seconds_bucket", le="0.2", stage="total")
    assert found == within


@pytest.mark.parametrize(
    ("seconds", "within"), [(0.03, 1), (0.0301, 0)], ids=["within the budget", "beyond"]
)
def test_the_budget_of_30_ms_is_an_edge(seconds, within):
    metrics = Metrics()
    of_arm(metrics).observe_stage("total", seconds)
    assert sample(metrics, "mneme_stage_seconds_bucket", le="0.03", stage="total") == within


def test_gauges_are_brought_up_to_date_when_somebody_looks():
    metrics = Metrics()
    waiting = iter([3, 4])
    arm = of_arm(metrics)
    end = metrics.before_scrape(lambda: arm.queued_requests.set(next(waiting)))
    metrics.text()
    assert sample(metrics, "mneme_queued_requests") == 3
    metrics.text()
    assert sample(metrics, "mneme_queued_requests") == 4
    end()
    metrics.text()
    assert sample(metrics, "mneme_queued_requests") == 4


def test_arms_count_for_themselves():
    metrics = Metrics()
    old, new = (metrics.of_arm("imn", version) for version in ("imn-1", "imn-2"))
    old.count_dropped("deadline")
    for outcome in ("scored", "scored", "failed"):
        new.count_shadowed(outcome)
    found = samples(metrics.text().decode())
    assert found["mneme_dropped_total", ("imn", "deadline", "imn-1")] == 1
    assert found["mneme_shadowed_total", ("imn", "scored", "imn-2")] == 2
    assert found["mneme_shadowed_total", ("imn", "failed", "imn-2")] == 1
    assert found["mneme_dropped_total", ("imn", "deadline", "imn-2")] == 0


@pytest.mark.parametrize("reason", DROP_REASONS)
def test_each_reason_is_there_before_anybody_was_dropped(reason):
    """A counter that begins above zero hides its first requests from every rate."""
    metrics = Metrics()
    arm = of_arm(metrics)
    assert sample(metrics, "mneme_dropped_total", reason=reason) == 0
    arm.count_dropped(reason)
    assert sample(metrics, "mneme_dropped_total", reason=reason) == 1


@pytest.mark.parametrize("status", ["200", "429", "500", "503"])
def test_each_answer_that_counts_is_there_before_the_first(status):
    metrics = Metrics()
    of_arm(metrics)
    assert sample(metrics, "mneme_requests_total", route="/score", status=status) == 0


def test_the_program_says_its_version():
    found = samples(Metrics().text().decode())
    assert found["mneme_build_info", (platform.python_version(), version("mneme"))] == 1


def test_no_series_say_when_others_were_created():
    metrics = Metrics()
    of_arm(metrics)
    assert b"_created" not in metrics.text()


def test_workers_that_ended_leave_what_they_counted_and_nothing_that_waits(tmp_path):
    def worker(last_words: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", WORKER + last_words],
            env={**os.environ, FOLDER_VARIABLE: str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        assert done.stderr == ""
        return done.stdout

    for _ in range(2):
        worker(DIE)
        (counter,) = tmp_path.glob("counter_[0-9]*.db")
        fold_ended_process(tmp_path, int(counter.stem.removeprefix("counter_")))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "counter_ended.db",
        "histogram_ended.db",
    ]
    found = samples(worker(SEE_REDIS + SAY))
    main = ("main", "dummy-1")
    assert found["mneme_requests_total", ("main", "/score", "200", "dummy-1")] == 3 * 2
    assert found["mneme_stage_seconds_count", ("main", "total", "dummy-1")] == 3
    assert found["mneme_stage_seconds_bucket", ("main", "0.02", "total", "dummy-1")] == 3
    assert found["mneme_stage_seconds_bucket", ("main", "0.015", "total", "dummy-1")] == 0
    assert found["mneme_queued_requests", main] == 5
    assert found["mneme_queued_work", main] == 500
    assert found["mneme_queue_work_limit", ()] == 1000
    assert found["mneme_redis_up", ()] == 1
    assert found["mneme_model_info", ("main", "dummy", "dummy-1")] == 1


def test_of_workers_that_live_the_limits_add_up_and_the_latest_look_at_redis_counts(tmp_path):
    environment = {**os.environ, FOLDER_VARIABLE: str(tmp_path)}
    waiting = subprocess.Popen(
        [sys.executable, "-c", WORKER + "print('there', flush=True); input()"],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with waiting:
        assert waiting.stdout is not None
        assert waiting.stdout.readline() == "there\n"
        asked = subprocess.run(
            [sys.executable, "-c", WORKER + SEE_REDIS + SAY],
            env=environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=True,
        )
        waiting.communicate("\n", timeout=PATIENCE_S)
    found = samples(asked.stdout)
    assert found["mneme_queue_work_limit", ()] == 2 * 1000
    assert found["mneme_queued_work", ("main", "dummy-1")] == 2 * 500
    assert found["mneme_redis_up", ()] == 1
    assert found["mneme_build_info", (platform.python_version(), version("mneme"))] == 1
