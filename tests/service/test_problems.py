"""Every error as a problem with a stable type: changing this table breaks callers."""

import json

import pytest

from service import errors
from service.errors import ServiceError
from service.history import HistoryStore
from service.problems import problem_response
from service.redis_nodes import connect
from tests.service.problem_answers import assert_problem

PROBLEMS = [
    (errors.InvalidRequestError, 422, "invalid-request", None),
    (errors.IdempotencyKeyReusedError, 422, "idempotency-key-reused", None),
    (errors.UnknownArmError, 422, "unknown-arm", None),
    (errors.BodyTooLargeError, 413, "body-too-large", None),
    (errors.HistoryUnavailableError, 503, "history-unavailable", "1"),
    (errors.CorruptHistoryError, 500, "corrupt-history", None),
    (errors.OverloadedError, 429, "overloaded", "1"),
    (errors.DeadlineExceededError, 503, "deadline-exceeded", "1"),
    (errors.ModelFailedError, 500, "model-failed", None),
    (errors.NotRecommendableError, 409, "not-recommendable", None),
    (errors.NotExplainableError, 409, "not-explainable", None),
    (ServiceError, 500, "internal-error", None),
]


@pytest.mark.parametrize(
    ("error", "status", "kind", "retry_after"), PROBLEMS, ids=[kind for _, _, kind, _ in PROBLEMS]
)
def test_each_error_has_its_status_and_type(error, status, kind, retry_after):
    answer = problem_response(error("the reason"))
    assert answer.status_code == status
    assert answer.media_type == "application/problem+json"
    assert answer.headers.get("Retry-After") == retry_after
    assert json.loads(bytes(answer.body)) == {
        "type": f"urn:mneme:problem:{kind}",
        "title": error.title,
        "status": status,
        "detail": "the reason",
    }


def test_the_table_above_holds_all_errors():
    assert {error for error, *_ in PROBLEMS} == {ServiceError, *ServiceError.__subclasses__()}


class BrokenStore(HistoryStore):
    """Has a bug."""

    async def fetch(self, user_ids, length, *, timeout_s=0.0):
        del user_ids, length, timeout_s
        raise ZeroDivisionError("a secret")


class TestUnexpectedErrors:
    """A bug of the service itself, here in its history store."""

    @pytest.fixture
    def broken(self, serve, redis_url):
        store = BrokenStore(connect(redis_url, timeout_s=5.0), prefix="history", keep=8)
        return serve(history=store)

    def test_they_are_problems_that_give_nothing_away(self, broken):
        problem = assert_problem(broken.score(), 500, "internal-error")
        assert problem["detail"] == "unexpected ZeroDivisionError"

    def test_the_connection_goes_on(self, broken):
        broken.score()
        assert broken.client.get("/readyz").status_code == 200

    def test_they_are_counted_like_every_answer(self, broken):
        body = {"user_id": "ann", "candidates": [1]}
        broken.client.post("/score", json=body, headers={"Connection": "close"})
        assert broken.metric("mneme_requests_total", route="/score", status="500") == 1
