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
    (errors.MalformedRequestError, 400, "malformed-request", None),
    (errors.HeadTooLargeError, 431, "head-too-large", None),
    (errors.RequestTooSlowError, 408, "request-too-slow", None),
    (errors.BodyTooLargeError, 413, "body-too-large", None),
    (errors.UnsupportedEncodingError, 415, "unsupported-encoding", None),
    (errors.HistoryUnavailableError, 503, "history-unavailable", "1"),
    (errors.CorruptHistoryError, 500, "corrupt-history", None),
    (errors.OverloadedError, 429, "overloaded", "1"),
    (errors.DeadlineExceededError, 503, "deadline-exceeded", "1"),
    (errors.ModelFailedError, 500, "model-failed", None),
    (errors.DeviceMemoryError, 503, "device-memory", "1"),
    (errors.TooManyConnectionsError, 503, "too-many-connections", "1"),
    (errors.NotRecommendableError, 409, "not-recommendable", None),
    (errors.NotExplainableError, 409, "not-explainable", None),
    (errors.UnauthenticatedError, 401, "unauthenticated", None),
    (errors.ForbiddenError, 403, "forbidden", None),
    (errors.RateLimitedError, 429, "rate-limited", "1"),
    (errors.ForeignPageError, 403, "foreign-page", None),
    (errors.NotHereError, 404, "not-found", None),
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


@pytest.mark.parametrize(
    ("error", "challenge"),
    [
        (errors.UnauthenticatedError, 'Bearer realm="mneme"'),
        (errors.ForbiddenError, 'Bearer realm="mneme", error="insufficient_scope"'),
        (errors.InvalidRequestError, None),
    ],
    ids=["no key", "no role", "another error"],
)
def test_who_lacks_a_key_is_told_what_kind_is_asked_for(error, challenge):
    assert problem_response(error("the reason")).headers.get("WWW-Authenticate") == challenge


def test_a_rate_limit_says_when_to_come_again():
    answer = problem_response(errors.RateLimitedError("the reason", retry_after_s=7))
    assert answer.headers["Retry-After"] == "7"


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
