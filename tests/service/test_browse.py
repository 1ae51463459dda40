"""The routes for people who look, over real HTTP."""

import json
import re
from typing import Any

import pytest

from service.schemas import MAX_EXPLAINED, ExplainAnswer
from tests.service.dummy_model import HISTORY_LENGTH, KNOWN_ITEMS, score_of
from tests.service.histories import NOW, records, steps
from tests.service.live_service import LiveService
from tests.service.problem_answers import assert_invalid, assert_problem, assert_retry


@pytest.fixture
def explaining(serve, tmp_path) -> LiveService:
    """A service whose model explains, and where some items have titles."""
    (tmp_path / "titles.json").write_text(json.dumps({"5": "Five", "3": "Three"}))
    service: LiveService = serve(explains=True, titles=tmp_path / "titles.json")
    return service


def explain(service: LiveService, user_id: Any = "ann", candidates: Any = (3,), **fields: Any):
    body = {"user_id": user_id, "candidates": candidates, **fields}
    return service.client.post("/explain", json=body)


class TestExplain:
    def test_the_answer_says_what_weighed_what(self, explaining, redis):
        redis.set("history:ann", records((5, NOW - 2), (7, NOW - 1)))
        answer = explain(explaining, "ann", [3, 91], ranking_time=NOW)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            "behaviors": [
                {"item_id": 5, "time": NOW - 2, "title": "Five"},
                {"item_id": 7, "time": NOW - 1, "title": None},
            ],
            "candidates": [
                {
                    "item_id": 3,
                    "title": "Three",
                    "known": True,
                    "score": score_of(3, behaviors=2, oldest=5),
                    "weights": [[305, 307], [305.5, 307.5], [306, 308]],
                },
                {
                    "item_id": 91,
                    "title": None,
                    "known": False,
                    "score": score_of(99, behaviors=2, oldest=5),
                    "weights": [[9905, 9907], [9905.5, 9907.5], [9906, 9908]],
                },
            ],
            "iterations": 3,
            "score_kind": "affinity",
            "arm": "main",
            "model": "dummy",
            "version": "dummy-1",
            "history_length": 2,
            "degraded": False,
        }

    def test_the_scores_are_those_of_score(self, explaining, redis):
        redis.set("history:ann", records(*steps(*range(1, 12), start=NOW - 20)))
        items = list(range(1, MAX_EXPLAINED + 1))
        found = explain(explaining, "ann", items, ranking_time=NOW).json()["candidates"]
        assert [one["score"] for one in found] == explaining.scores("ann", items, ranking_time=NOW)

    def test_an_unknown_user_has_no_behaviors(self, explaining):
        found = explain(explaining, "nobody").json()
        assert found["behaviors"] == []
        assert found["candidates"][0]["weights"] == [[], [], []]

    def test_server_timing_says_where_the_time_went(self, explaining):
        timing = explain(explaining).headers["Server-Timing"]
        stages = re.findall(r"(\w+);dur=\d+\.\d{3}", timing)
        assert stages == ["fetch", "encode", "infer", "queue", "respond", "total"]

    def test_it_is_counted_as_a_route_of_its_own(self, explaining):
        explain(explaining)
        assert explaining.metric("mneme_requests_total", route="/explain", status="200") == 1

    def test_the_documented_fields_are_those_of_the_answer(self, explaining):
        """The answer is written without the schema; this is what keeps them together."""
        answer = explain(explaining).json()
        assert set(answer) == set(ExplainAnswer.model_fields)
        ExplainAnswer.model_validate(answer, strict=True)

    def test_a_bundle_without_an_explain_graph_is_a_conflict(self, service):
        problem = assert_problem(explain(service), 409, "not-explainable")
        assert "dummy-1 has no explain graph" in problem["detail"]
        assert service.client.get("/models").json()["models"][0]["explains"] is False

    def test_more_candidates_than_can_be_looked_at_are_refused(self, explaining):
        asked = list(range(1, MAX_EXPLAINED + 2))
        assert_invalid(explain(explaining, "ann", asked), "candidates", "at most 20 items")

    def test_an_unknown_arm_is_named(self, explaining):
        assert_problem(explain(explaining, arm="other"), 422, "unknown-arm")

    def test_redis_away_is_told(self, serve, away_url):
        service = serve(explains=True, redis_url=away_url)
        assert_retry(explain(service), 503, "history-unavailable")


class TestHistory:
    def test_the_newest_behaviors_are_told_oldest_first(self, explaining, redis):
        redis.set("history:ann", records((1, NOW - 3), (5, NOW - 2), (7, NOW - 1)))
        answer = explaining.client.get("/users/ann/history?limit=2")
        assert answer.json() == {
            "user_id": "ann",
            "behaviors": [
                {"item_id": 5, "time": NOW - 2, "title": "Five"},
                {"item_id": 7, "time": NOW - 1, "title": None},
            ],
        }

    def test_it_is_read_and_not_changed(self, service, redis):
        value = records(*steps(*range(1, 4 * HISTORY_LENGTH)))
        redis.set("history:ann", value)
        assert len(service.client.get("/users/ann/history").json()["behaviors"]) == 31
        assert redis.get("history:ann") == value

    def test_an_unknown_user_has_none(self, service, redis):
        answer = service.client.get("/users/nobody/history")
        assert answer.json() == {"user_id": "nobody", "behaviors": []}
        assert redis.keys() == []

    @pytest.mark.parametrize("quoted", ["%FF", "a%C3", "%ED%A0%80"])
    def test_bytes_that_are_no_text_are_nobody(self, service, redis, quoted):
        """And not the user whose id is what stands in for them."""
        redis.set("history:\ufffd", records((5, NOW)))
        answer = service.client.get(f"/users/{quoted}/history")
        problem = assert_problem(answer, 422, "invalid-request")
        assert problem["detail"] == "user_id: the path is not valid UTF-8"

    @pytest.mark.parametrize("user", ["a/b", "ä ?", "sample", "a\nb", "\n", "\0", "../x"])
    def test_any_user_id_can_be_asked_for(self, service, redis, user):
        redis.set(f"history:{user}", records((5, NOW)))
        quoted = "".join(f"%{byte:02X}" for byte in user.encode())
        answer = service.client.get(f"/users/{quoted}/history").json()
        assert answer["user_id"] == user
        assert len(answer["behaviors"]) == 1

    def test_what_is_no_user_id_is_refused(self, service):
        answer = service.client.get(f"/users/{'x' * 129}/history")
        assert "user_id" in assert_problem(answer, 422, "invalid-request")["detail"]

    def test_a_corrupt_history_is_told(self, service, redis):
        redis.set("history:ann", b"x" * 13)
        assert_problem(service.client.get("/users/ann/history"), 500, "corrupt-history")

    def test_redis_away_is_told_and_counted(self, serve, away_url):
        service = serve(redis_url=away_url)
        answer = service.client.get("/users/ann/history")
        assert_retry(answer, 503, "history-unavailable")
        assert service.metric("mneme_redis_failures_total", operation="fetch") == 1

    def test_users_are_no_labels(self, serve):
        service = serve()
        service.client.get("/users/ann/history")
        route = "/users/{user_id}/history"
        assert service.metric("mneme_requests_total", route=route, status="200") == 1


class TestSamples:
    def test_users_are_those_who_have_a_history(self, service, redis):
        redis.set("history:ann", records((5, NOW)))
        redis.set("history:bob", records((5, NOW)))
        redis.set("other:eve", b"x")
        found = set()
        for _ in range(30):
            found.update(service.client.get("/users/sample?limit=20").json()["user_ids"])
        assert found == {"ann", "bob"}

    def test_there_are_none_in_an_empty_redis(self, service):
        assert service.client.get("/users/sample").json() == {"user_ids": []}

    def test_redis_away_is_told(self, serve, away_url):
        answer = serve(redis_url=away_url).client.get("/users/sample")
        assert_retry(answer, 503, "history-unavailable")

    def test_items_are_of_the_catalogue_and_different(self, explaining):
        items = explaining.client.get("/items/sample?limit=90").json()["items"]
        assert sorted(item["item_id"] for item in items) == list(range(1, KNOWN_ITEMS + 1))
        assert {item["title"] for item in items} == {"Three", "Five", None}

    def test_items_are_of_the_arm_that_is_named(self, service):
        found = service.client.get("/items/sample?limit=3&arm=main").json()["items"]
        assert len(found) == 3
        assert_problem(service.client.get("/items/sample?arm=other"), 422, "unknown-arm")

    @pytest.mark.parametrize("kind", ["users", "items"])
    @pytest.mark.parametrize("limit", ["0", "101", "x"])
    def test_a_limit_is_a_number_of_some(self, service, kind, limit):
        assert_invalid(service.client.get(f"/{kind}/sample?limit={limit}"), "limit", "Input should")
