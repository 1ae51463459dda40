"""What is claimed of batches, overload and deadlines, proven over HTTP from /metrics."""

import json
import logging
import time

import pytest

from tests.service.dummy_model import HISTORY_LENGTH, score_of
from tests.service.histories import NOW, records, steps
from tests.service.live_service import PATIENCE_S, LiveService, in_background, wait_until
from tests.service.logged import Logged
from tests.service.problem_answers import assert_problem, assert_retry

# The work of one candidate for somebody with a full history.
UNIT = HISTORY_LENGTH
FULL = steps(*range(1, HISTORY_LENGTH + 1))
# A warm-up that predicts more than a second for each pair of candidate and behavior.
SLOW = ((8, 10.0), (16, 20.0))


def full_score(candidate: int) -> float:
    """Return the score of somebody with a full history."""
    return score_of(candidate, behaviors=HISTORY_LENGTH, oldest=1)


@pytest.fixture
def ann(redis) -> str:
    """A user with a full history: her work is known before it is read."""
    redis.set("history:ann", records(*FULL))
    return "ann"


@pytest.fixture
def logged():
    found = Logged()
    with found.listening(logging.WARNING, personal_data=False):
        yield found


def n_fetched(redis) -> int:
    stats = redis.info("commandstats").get("cmdstat_getrange", {"calls": 0})
    return int(stats["calls"])


class TestBatches:
    def test_requests_that_arrive_while_the_device_is_busy_are_one_batch(self, serve):
        service = serve()
        with in_background() as begin, service.model.held():
            first = begin(service.scores, "ann", [1])
            service.model.wait_until_busy()
            later = [begin(service.scores, f"user {n}", [n, n + 1]) for n in range(1, 8)]
            service.wait_for("mneme_queued_requests", 7)
        assert first.result() == [score_of(1)]
        assert [call.result() for call in later] == [
            [score_of(n), score_of(n + 1)] for n in range(1, 8)
        ]
        assert service.metric("mneme_batch_requests_count") == 2
        assert service.metric("mneme_batch_requests_sum") == 8
        assert service.metric("mneme_batch_requests_bucket", le="1.0") == 1
        assert service.metric("mneme_batch_requests_bucket", le="8.0") == 2
        assert service.metric("mneme_queued_work") == 0
        assert service.metric("mneme_queued_requests") == 0
        assert service.model.batch_sizes == [1, 7]

    def test_under_load_batches_form_by_themselves(self, serve):
        """16 clients, each with one request at a time."""
        service = serve()
        service.model.takes_s = 0.01

        def client(n: int) -> None:
            for _ in range(10):
                assert service.scores(f"user {n}", [n]) == [score_of(n)]

        with in_background() as begin:
            for call in [begin(client, n) for n in range(1, 17)]:
                call.result()
        assert service.metric("mneme_batch_requests_sum") == 160
        assert service.metric("mneme_batch_requests_count") < 160
        assert service.metric("mneme_batch_requests_bucket", le="1.0") < service.metric(
            "mneme_batch_requests_count"
        )

    def test_an_idle_service_answers_a_lone_request_without_waiting(self, serve):
        """A timer would let each of them wait; a busy machine delays only some."""
        service = serve()
        for _ in range(20):
            service.scores()
        assert service.metric("mneme_batch_requests_count") == 20
        assert service.metric("mneme_batch_requests_bucket", le="1.0") == 20
        assert service.metric("mneme_stage_seconds_bucket", stage="queue", le="0.01") >= 10
        assert service.metric("mneme_stage_seconds_bucket", stage="queue", le="0.002") > 0

    def test_the_next_batch_is_read_while_the_device_is_busy(self, serve, redis):
        service = serve()
        redis.config_resetstat()
        with in_background() as begin, service.model.held():
            begin(service.scores, "ann")
            service.model.wait_until_busy()
            begin(service.scores, "bob")
            service.wait_for("mneme_queued_requests", 1)
            wait_until(lambda: n_fetched(redis) == 2, "the second history is read")
            assert service.model.batch_sizes == [1]

    def test_a_request_waits_with_the_work_of_the_history_that_it_has(self, serve, redis):
        service = serve()
        redis.set("history:bob", records((5, NOW), (6, NOW)))
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            begin(service.scores, "bob", [1, 2, 3])
            service.wait_for("mneme_queued_work", 2 * 3)
            begin(service.scores, "nobody", [1, 2, 3])
            service.wait_for("mneme_queued_work", 2 * 3 + 3)

    def test_a_batch_has_no_more_work_than_the_setting_allows(self, serve, ann):
        """Room for three requests of two candidates, or two of three: the widest counts."""
        service = serve(max_batch_work=3 * 2 * UNIT)
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            for n in range(1, 8):
                begin(service.scores, ann, [1, 2])
                service.wait_for("mneme_queued_work", n * 2 * UNIT)
            begin(service.scores, ann, [1, 2, 3])
            service.wait_for("mneme_queued_work", 17 * UNIT)
            begin(service.scores, ann, [1])
            service.wait_for("mneme_queued_work", 18 * UNIT)
        assert service.model.batch_sizes == [1, 3, 3, 2, 1]
        assert service.metric("mneme_batch_requests_sum") == 10
        assert service.metric("mneme_batch_requests_count") == 5
        assert service.metric("mneme_batch_requests_bucket", le="4.0") == 5

    def test_a_request_larger_than_a_batch_is_scored_alone(self, serve, ann):
        service = serve(max_batch_work=2 * UNIT)
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            small = begin(service.scores, ann, [1], ranking_time=NOW)
            service.wait_for("mneme_queued_work", UNIT)
            large = begin(service.scores, ann, [1, 2, 3, 4, 5], ranking_time=NOW)
            service.wait_for("mneme_queued_work", 6 * UNIT)
        assert small.result() == [full_score(1)]
        assert large.result() == [full_score(n) for n in range(1, 6)]
        assert service.model.batch_sizes == [1, 1, 1]


class TestOverload:
    def test_more_work_than_may_wait_is_refused_at_once(self, serve, ann):
        service = serve(max_queue_work=4 * UNIT)
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            waiting = begin(service.scores, ann, [1, 2, 3], ranking_time=NOW)
            service.wait_for("mneme_queued_work", 3 * UNIT)
            assert_retry(service.score("bob", [1, 2]), 429, "overloaded")
            assert_retry(service.score("bob", [1, 2]), 429, "overloaded")
            fits = begin(service.scores, ann, [1], ranking_time=NOW)
            service.wait_for("mneme_queued_work", 4 * UNIT)
        assert waiting.result() == [full_score(n) for n in (1, 2, 3)]
        assert fits.result() == [full_score(1)]
        assert service.metric("mneme_dropped_total", reason="overloaded") == 2
        assert service.metric("mneme_requests_total", route="/score", status="429") == 2
        assert service.scores("bob", [1, 2]) == [score_of(1), score_of(2)]

    def test_what_cannot_be_answered_in_time_is_refused_before_it_costs_anything(
        self, serve, redis
    ):
        service = serve(warm_up_took=SLOW)
        redis.config_resetstat()
        with in_background() as begin, service.model.held():
            first = begin(service.scores)
            service.model.wait_until_busy()
            refused = service.score("bob", [1, 2], deadline_ms=5000)
            assert_retry(refused, 429, "overloaded")
            assert "the deadline is in" in refused.json()["detail"]
            assert service.metric("mneme_queued_requests") == 0
        assert first.result() == [score_of(1)]
        assert service.metric("mneme_dropped_total", reason="hopeless") == 1
        assert n_fetched(redis) == 1
        assert service.model.batch_sizes == [1]

    def test_an_idle_service_takes_a_request_whatever_the_prediction(self, serve):
        """More than 10 s are predicted."""
        service = serve(warm_up_took=SLOW)
        assert service.scores(deadline_ms=5000) == [score_of(1)]
        assert service.scores(candidates=[1, 2], deadline_ms=5000) == [score_of(1), score_of(2)]

    def test_it_recovers_from_predictions_that_were_absurd(self, serve, ann):
        service = serve(warm_up_took=SLOW)
        assert is_taken_beside_another(service, ann) is False
        for _ in range(300):
            service.scores(ann)
        assert is_taken_beside_another(service, ann) is True


def is_taken_beside_another(service: LiveService, user: str) -> bool:
    """Return whether a request is taken while the device is busy with another one."""
    with in_background() as begin:
        with service.model.held():
            begin(service.scores, user)
            service.model.wait_until_busy()
            waited = service.metric("mneme_dropped_total", reason="hopeless")
            second = begin(service.score, user, deadline_ms=1000 * PATIENCE_S / 6)
            wait_until(
                lambda: (
                    service.metric("mneme_queued_requests") == 1
                    or service.metric("mneme_dropped_total", reason="hopeless") > waited
                ),
                "the second is taken or refused",
            )
        status: int = second.result().status_code
    assert status in (200, 429)
    return status == 200


class TestDropped:
    @pytest.mark.parametrize(
        ("settings", "deadline_ms"),
        [({}, 500), ({"deadline_s": 0.5}, None)],
        ids=["of the request", "of the settings"],
    )
    def test_a_request_past_its_deadline_is_dropped_before_it_costs_a_run(
        self, serve, settings, deadline_ms
    ):
        service = serve(**settings)
        with in_background() as begin, service.model.held():
            begin(service.scores, deadline_ms=30_000)
            service.model.wait_until_busy()
            late = begin(service.score, "late", [1, 2], deadline_ms=deadline_ms)
            patient = begin(service.scores, "patient", [3], deadline_ms=30_000)
            service.wait_for("mneme_queued_requests", 2)
            time.sleep(0.51)
        assert_retry(late.result(), 503, "deadline-exceeded")
        assert patient.result() == [score_of(3)]
        assert service.metric("mneme_dropped_total", reason="deadline") == 1
        assert service.metric("mneme_batch_requests_sum") == 2
        assert service.model.batch_sizes == [1, 1]

    def test_a_request_whose_client_left_is_dropped_before_it_costs_a_run(self, serve):
        service = serve()
        body = json.dumps({"user_id": "gone", "candidates": [1, 2]}).encode()
        with in_background() as begin, service.model.held():
            begin(service.scores)
            service.model.wait_until_busy()
            with service.client_that_leaves(
                b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n%b"
                % (len(body), body)
            ):
                service.wait_for("mneme_queued_requests", 1)
            patient = begin(service.scores, "patient", [3])
            service.wait_for("mneme_queued_requests", 2)
        assert patient.result() == [score_of(3)]
        assert service.model.batch_sizes == [1, 1]
        assert service.metric("mneme_dropped_total", reason="client left") == 1


class TestOutOfMemory:
    """The device has memory for three requests of two candidates each."""

    def test_all_of_a_batch_that_does_not_fit_are_answered_rightly(self, serve):
        service = serve()
        with in_background() as begin:
            with service.model.held():
                begin(service.scores, "first", [1])
                service.model.wait_until_busy()
                service.model.memory = 3 * 2
                later = [begin(service.scores, f"user {n}", [n, n + 1]) for n in range(1, 9)]
                service.wait_for("mneme_queued_requests", 8)
            assert [call.result() for call in later] == [
                [score_of(n), score_of(n + 1)] for n in range(1, 9)
            ]
        assert service.model.batch_sizes == [1, 8, 4, 2, 2, 2, 2]
        assert service.metric("mneme_device_memory_failures_total") == 2
        assert service.metric("mneme_batch_work_limit") == 2 * 2
        assert service.metric("mneme_requests_total", route="/score", status="200") == 9

    def test_it_is_told_once_for_each_time_that_batches_become_smaller(self, serve, logged):
        service = serve()
        service.model.memory = 0
        assert_retry(service.score("ann", [1, 2, 3, 4]), 503, "device-memory")
        assert_retry(service.score("ann", [1, 2, 3, 4]), 503, "device-memory")
        (event,) = logged.events("device-out-of-memory")
        assert event["level"] == "warning"
        assert event["arm"] == "main"
        assert (event["failed_work"], event["max_batch_work"]) == (4, 2)

    def test_a_recommendation_is_made_of_smaller_blocks(self, serve, logged):
        service = serve(recommend_block_items=90)
        service.model.memory = 30
        assert service.recommended("nobody", 3) == [90, 89, 88]
        assert [event["block_items"] for event in logged.events("device-out-of-memory")] == [45, 22]
        service.model.memory = 10**9
        assert service.scores("ann", [1]) == [score_of(1)]


class TestModelFailures:
    def test_a_model_that_raises_fails_its_batch_and_nothing_after(self, serve):
        service = serve()
        with in_background() as begin, service.model.held():
            begin(service.score)
            service.model.wait_until_busy()
            batch = [begin(service.score, user, [1]) for user in ("ann", "bob")]
            service.wait_for("mneme_queued_requests", 2)
            service.model.fails_with = RuntimeError("CUDA error")
        for call in batch:
            problem = assert_problem(call.result(), 500, "model-failed")
            assert problem["detail"] == "the model failed: CUDA error"
        service.model.fails_with = None
        assert service.scores() == [score_of(1)]

    @pytest.mark.parametrize("number", [float("nan"), float("-inf")])
    def test_a_score_that_is_no_number_is_an_error_and_never_json(self, service, number):
        service.model.answers_with = number
        problem = assert_problem(service.score(), 500, "model-failed")
        assert "not a finite number" in problem["detail"]
        service.model.answers_with = None
        assert service.scores() == [score_of(1)]
