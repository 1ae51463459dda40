"""What is claimed of batches, overload and deadlines, proven over HTTP from /metrics."""

import socket
import time

import pytest

from tests.service.dummy_model import HISTORY_LENGTH, score_of
from tests.service.live_service import in_background
from tests.service.problem_answers import assert_problem, assert_retry

UNIT = HISTORY_LENGTH  # the work of one candidate


def test_requests_that_arrive_while_the_device_is_busy_are_one_batch(serve):
    service = serve()
    with in_background() as begin, service.model.held():
        first = begin(service.scores, "ann", [1])
        service.model.wait_until_busy()
        later = [begin(service.scores, f"user {n}", [n, n + 1]) for n in range(1, 8)]
        service.wait_for("mneme_queued_work", 7 * 2 * UNIT)
    assert first.result() == [score_of(1)]
    assert [call.result() for call in later] == [
        [score_of(n), score_of(n + 1)] for n in range(1, 8)
    ]
    assert service.metric("mneme_batch_requests_count") == 2
    assert service.metric("mneme_batch_requests_sum") == 8
    assert service.metric("mneme_batch_requests_bucket", le="1.0") == 1
    assert service.metric("mneme_batch_requests_bucket", le="8.0") == 2
    assert service.metric("mneme_queued_work") == 0
    assert service.model.batch_sizes == [1, 7]


def test_an_idle_device_waits_for_no_company(serve):
    service = serve()
    for _ in range(3):
        service.scores()
    assert service.metric("mneme_batch_requests_count") == 3
    assert service.metric("mneme_batch_requests_sum") == 3


def test_a_batch_has_no_more_work_than_the_setting_allows(serve):
    """Room for three requests of two candidates, or two of three: the widest counts."""
    service = serve(max_batch_work=3 * 2 * UNIT)
    with in_background() as begin, service.model.held():
        begin(service.scores)
        service.model.wait_until_busy()
        for n in range(1, 8):
            begin(service.scores, "ann", [1, 2])
            service.wait_for("mneme_queued_work", n * 2 * UNIT)
        begin(service.scores, "ann", [1, 2, 3])
        service.wait_for("mneme_queued_work", 17 * UNIT)
        begin(service.scores, "ann", [1])
        service.wait_for("mneme_queued_work", 18 * UNIT)
    assert service.model.batch_sizes == [1, 3, 3, 2, 1]
    assert service.metric("mneme_batch_requests_sum") == 10
    assert service.metric("mneme_batch_requests_count") == 5
    assert service.metric("mneme_batch_requests_bucket", le="4.0") == 5


def test_a_request_larger_than_a_batch_is_scored_alone(serve):
    service = serve(max_batch_work=2 * UNIT)
    with in_background() as begin, service.model.held():
        begin(service.scores)
        service.model.wait_until_busy()
        small = begin(service.scores, "ann", [1])
        service.wait_for("mneme_queued_work", UNIT)
        large = begin(service.scores, "ann", [1, 2, 3, 4, 5])
        service.wait_for("mneme_queued_work", 6 * UNIT)
    assert small.result() == [score_of(1)]
    assert large.result() == [score_of(n) for n in range(1, 6)]
    assert service.model.batch_sizes == [1, 1, 1]


def test_more_work_than_may_wait_is_refused_at_once(serve):
    service = serve(max_queue_work=4 * UNIT)
    with in_background() as begin, service.model.held():
        begin(service.scores)
        service.model.wait_until_busy()
        waiting = begin(service.scores, "ann", [1, 2, 3])
        service.wait_for("mneme_queued_work", 3 * UNIT)
        assert_retry(service.score("bob", [1, 2]), 429, "overloaded")
        assert_retry(service.score("bob", [1, 2]), 429, "overloaded")
        fits = begin(service.scores, "bob", [1])
        service.wait_for("mneme_queued_work", 4 * UNIT)
    assert waiting.result() == [score_of(n) for n in (1, 2, 3)]
    assert fits.result() == [score_of(1)]
    assert service.metric("mneme_dropped_total", reason="overloaded") == 2
    assert service.metric("mneme_requests_total", route="/score", status="429") == 2
    assert service.scores("bob", [1, 2]) == [score_of(1), score_of(2)]


@pytest.mark.parametrize(
    ("settings", "deadline_ms"),
    [({}, 1), ({"deadline_s": 0.001}, None)],
    ids=["of the request", "of the settings"],
)
def test_a_request_past_its_deadline_is_dropped_before_it_costs_a_run(serve, settings, deadline_ms):
    service = serve(**settings)
    with in_background() as begin, service.model.held():
        begin(service.scores, deadline_ms=30_000)
        service.model.wait_until_busy()
        late = begin(service.score, "late", [1, 2], deadline_ms=deadline_ms)
        patient = begin(service.scores, "patient", [3], deadline_ms=30_000)
        service.wait_for("mneme_queued_work", 3 * UNIT)
        time.sleep(0.005)
    assert_retry(late.result(), 503, "deadline-exceeded")
    assert patient.result() == [score_of(3)]
    assert service.metric("mneme_dropped_total", reason="deadline") == 1
    assert service.model.batch_sizes == [1, 1]


def test_a_request_whose_client_left_is_dropped_before_it_costs_a_run(serve):
    service = serve()
    with in_background() as begin, service.model.held():
        begin(service.scores)
        service.model.wait_until_busy()
        body = b'{"user_id": "gone", "candidates": [1, 2]}'
        with socket.create_connection(service.address) as client:
            client.sendall(
                b"POST /score HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
            )
            service.wait_for("mneme_queued_work", 2 * UNIT)
        time.sleep(0.05)  # until the server's event loop has seen the connection close
        patient = begin(service.scores, "patient", [3])
        service.wait_for("mneme_queued_work", 3 * UNIT)
    assert patient.result() == [score_of(3)]
    assert service.model.batch_sizes == [1, 1]
    assert service.metric("mneme_dropped_total", reason="client left") == 1


class TestModelFailures:
    def test_a_model_that_raises_fails_its_batch_and_nothing_after(self, serve):
        service = serve()
        with in_background() as begin, service.model.held():
            begin(service.score)
            service.model.wait_until_busy()
            batch = [begin(service.score, user, [1]) for user in ("ann", "bob")]
            service.wait_for("mneme_queued_work", 2 * UNIT)
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
