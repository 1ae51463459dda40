"""A Redis that is away, comes back, or holds what is no history, seen over real HTTP."""

import pytest

from tests.service.dummy_model import HISTORY_LENGTH, score_of
from tests.service.histories import NOW, records
from tests.service.live_service import in_background
from tests.service.problem_answers import assert_problem, assert_retry


@pytest.fixture
def refusing(serve, away_url):
    return serve(redis_url=away_url)


@pytest.fixture
def cold(serve, away_url):
    return serve(redis_url=away_url, on_redis_failure="cold")


class TestRefuse:
    def test_scores_that_need_a_history_are_answered_503(self, refusing):
        assert_retry(refusing.score(), 503, "history-unavailable")

    def test_a_request_with_its_own_history_is_scored(self, refusing):
        given = [{"item_id": 5, "time": NOW}]
        answer = refusing.score("ann", [1], ranking_time=NOW, history=given).json()
        assert answer["scores"] == [score_of(1, behaviors=1, oldest=5)]
        assert answer["degraded"] is False

    def test_events_are_answered_503(self, refusing):
        assert_retry(refusing.events(("ann", 1, NOW)), 503, "history-unavailable")

    def test_it_lives_but_is_not_ready(self, refusing):
        assert refusing.client.get("/healthz").status_code == 200
        answer = refusing.client.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"status": "not ready", "redis": "away"}


class TestCold:
    def test_scores_are_cold_and_flagged(self, cold):
        answer = cold.score("ann", [3, 1])
        assert answer.status_code == 200
        assert answer.json()["scores"] == [score_of(3), score_of(1)]
        assert answer.json()["history_length"] == 0
        assert answer.json()["degraded"] is True
        assert cold.metric("mneme_degraded_total") == 1

    def test_a_request_with_its_own_history_is_not_flagged(self, cold):
        assert cold.score(history=[]).json()["degraded"] is False
        assert cold.metric("mneme_degraded_total") == 0

    def test_events_are_answered_503_all_the_same(self, cold):
        """A behavior that is not stored must not look as if it were."""
        assert_retry(cold.events(("ann", 1, NOW)), 503, "history-unavailable")

    def test_it_is_ready(self, cold):
        answer = cold.client.get("/readyz")
        assert answer.status_code == 200
        assert answer.json() == {"status": "ready", "redis": "away"}


def test_it_recovers_when_redis_comes_back(serve, stoppable_redis):
    service = serve(redis_url=stoppable_redis.url)
    service.events(("ann", 5, NOW))
    assert service.scores("ann", ranking_time=NOW) == [score_of(1, behaviors=1, oldest=5)]
    assert service.metric("mneme_redis_up") == 1
    stoppable_redis.stop()
    assert_retry(service.score("ann"), 503, "history-unavailable")
    assert_retry(service.events(("ann", 6, NOW)), 503, "history-unavailable")
    assert service.client.get("/readyz").status_code == 503
    assert service.metric("mneme_redis_up") == 0
    assert service.metric("mneme_redis_failures_total", operation="fetch") == 1
    assert service.metric("mneme_redis_failures_total", operation="append") == 1
    stoppable_redis.start()
    assert service.metric("mneme_redis_up") == 1
    assert service.client.get("/readyz").status_code == 200
    assert service.events(("ann", 7, NOW)).json() == {"appended": 1, "duplicates": 0}
    assert service.scores("ann", ranking_time=NOW) == [score_of(1, behaviors=1, oldest=7)]


def test_cold_scores_end_when_redis_comes_back(serve, stoppable_redis):
    service = serve(redis_url=stoppable_redis.url, on_redis_failure="cold")
    stoppable_redis.stop()
    assert service.score("ann").json()["degraded"] is True
    stoppable_redis.start()
    assert service.score("ann").json()["degraded"] is False


CORRUPT = [
    pytest.param(b"x" * 13, id="length"),
    pytest.param(b"\x01" * (12 * HISTORY_LENGTH + 1), id="length, longer than what is read"),
    pytest.param(records((5, NOW), (0, NOW)), id="item 0"),
    pytest.param(records((-1, NOW)), id="negative item"),
]


class TestCorruptHistories:
    @pytest.mark.parametrize("value", CORRUPT)
    def test_the_user_gets_a_clear_error_and_it_is_counted(self, service, redis, value):
        redis.set("history:eve", value)
        before = service.metric("mneme_corrupt_histories_total")
        problem = assert_problem(service.score("eve"), 500, "corrupt-history")
        assert "the history of user 'eve' cannot be read" in problem["detail"]
        assert service.metric("mneme_corrupt_histories_total") == before + 1
        assert redis.get("history:eve") == value

    def test_a_value_of_another_type_is_corrupt_too(self, service, redis):
        redis.rpush("history:eve", "x")
        problem = assert_problem(service.score("eve"), 500, "corrupt-history")
        assert "something other than a string" in problem["detail"]

    def test_others_in_the_same_batch_are_scored(self, serve, redis):
        service = serve()
        redis.set("history:ann", records((5, NOW)))
        broken = {f"broken {n}": param.values[0] for n, param in enumerate(CORRUPT)}
        redis.mset({f"history:{user}": value for user, value in broken.items()})
        redis.rpush("history:list", "x")
        with in_background() as begin, service.model.held():
            begin(service.scores, "nobody")
            service.model.wait_until_busy()
            ann = begin(service.scores, "ann", [3], ranking_time=NOW)
            eves = [begin(service.score, user) for user in (*broken, "list")]
            for eve in eves:
                assert_problem(eve.result(), 500, "corrupt-history")
            service.wait_for("mneme_queued_requests", 1)
        assert ann.result() == [score_of(3, behaviors=1, oldest=5)]
        assert service.metric("mneme_corrupt_histories_total") == 5
        assert service.metric("mneme_batch_requests_count") == 2
        assert service.metric("mneme_batch_requests_sum") == 2

    def test_even_cold_scores_do_not_hide_them(self, serve, redis):
        redis.set("history:eve", b"x")
        assert_problem(serve(on_redis_failure="cold").score("eve"), 500, "corrupt-history")
